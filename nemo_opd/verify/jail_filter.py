"""The system calls that jailed code may make: a seccomp filter (Linux, x86-64 and 64-bit ARM), without a library.

What is not listed fails with EPERM. So there are no sockets, no new processes (threads only), no other program, no
signals to others, no tracing, no namespaces and no mounts, whatever the machine permits otherwise. Stands alone: it
is loaded by an interpreter that sees nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

READ: dict[str, tuple[int | None, int | None]] = {
    "access": (21, None), "arch_prctl": (158, None), "brk": (12, 214), "chdir": (80, 49), "clock_getres": (229, 114),
    "clock_gettime": (228, 113), "clock_nanosleep": (230, 115), "close": (3, 57), "dup": (32, 23), "dup2": (33, None),
    "dup3": (292, 24), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_pwait": (281, 22),
    "epoll_wait": (232, None), "eventfd2": (290, 19), "exit": (60, 93), "exit_group": (231, 94),
    "faccessat": (269, 48), "faccessat2": (439, 439), "fcntl": (72, 25), "fstat": (5, 80), "futex": (202, 98),
    "getcwd": (79, 17), "getdents64": (217, 61), "getegid": (108, 177), "geteuid": (107, 175), "getgid": (104, 176),
    "getitimer": (36, 102), "getpid": (39, 172), "getppid": (110, 173), "getrandom": (318, 278),
    "getrlimit": (97, 163), "getrusage": (98, 165), "gettid": (186, 178), "gettimeofday": (96, 169),
    "getuid": (102, 174), "ioctl": (16, 29), "lseek": (8, 62), "lstat": (6, None), "madvise": (28, 233),
    "mmap": (9, 222), "mprotect": (10, 226), "mremap": (25, 216), "munmap": (11, 215), "nanosleep": (35, 101),
    "newfstatat": (262, 79), "pipe": (22, None), "pipe2": (293, 59), "poll": (7, None), "ppoll": (271, 73),
    "pread64": (17, 67), "pselect6": (270, 72), "pwrite64": (18, 68), "read": (0, 63), "readlink": (89, None),
    "readlinkat": (267, 78), "readv": (19, 65), "restart_syscall": (219, 128), "rseq": (334, 293),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sched_getaffinity": (204, 123), "sched_yield": (24, 124), "select": (23, None), "set_robust_list": (273, 99),
    "set_tid_address": (218, 96), "setitimer": (38, 103), "sigaltstack": (131, 132), "stat": (4, None),
    "statx": (332, 291), "sysinfo": (99, 179), "time": (201, None), "times": (100, 153), "uname": (63, 160),
    "write": (1, 64), "writev": (20, 66),
}  # fmt: skip
"""Name -> its number on x86-64 and on 64-bit ARM; None where an architecture has no such call."""

WRITE: dict[str, tuple[int | None, int | None]] = {
    "fdatasync": (75, 83), "fsync": (74, 82), "ftruncate": (77, 46), "mkdir": (83, None), "mkdirat": (258, 34),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "rmdir": (84, None), "unlink": (87, None),
    "unlinkat": (263, 35),
}  # fmt: skip
"""Calls that change files: permitted where the jail has a file system of its own."""

SPECIAL: dict[str, tuple[int | None, int | None]] = {
    "clone": (56, 220), "clone3": (435, 435), "open": (2, None), "openat": (257, 56), "prlimit64": (302, 261),
}  # fmt: skip
"""Calls that depend on their arguments."""

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the tables above, and the kernel's name of the architecture."""
_CLONE_THREAD = 0x00010000
_OPEN_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
"""Offsets in the kernel's ``struct seccomp_data``; an argument takes 8 bytes, its low half first."""

Instruction = tuple[int, int, int, int]
"""Operation, jump if true, jump if false, constant."""


def install(writable: bool) -> None:
    """Put this thread, and all that it starts, under the filter for good. Wants no-new-privileges to be set.

    Args:
        writable: permit files to be changed.

    Raises:
        OSError: the kernel refuses, or the architecture is not in the tables.
    """
    if platform.machine() not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no table of system calls for {platform.machine()}")
    column, architecture = _ARCHITECTURES[platform.machine()]
    filter_ = program(column, architecture, writable)
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in filter_))
    # struct sock_fprog: a count, padding, a pointer
    header = ctypes.create_string_buffer(struct.pack("<H6xQ", len(filter_), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no seccomp filter")


def program(column: int, architecture: int, writable: bool) -> list[Instruction]:
    """The filter's instructions."""
    refuse, allow = (_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ALLOW)
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, architecture),  # 32-bit calls have other numbers
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]

    def when(name: str, then: list[Instruction]) -> None:
        number = SPECIAL[name][column]
        if number is not None:
            steps.extend([(_EQUAL, 0, len(then), number), *then])

    when("clone3", [(_RETURN, 0, 0, _ERRNO | errno.ENOSYS)])  # its flags are out of sight; libc falls back to clone
    when("clone", [(_LOAD, 0, 0, _argument(0)), (_ANY_BIT, 0, 1, _CLONE_THREAD), allow, refuse])
    when("prlimit64", [(_LOAD, 0, 0, _argument(0)), (_EQUAL, 0, 1, 0), allow, refuse])  # one's own limits only
    for name, flags in (("open", 1), ("openat", 2)):
        unless = [] if writable else [(_LOAD, 0, 0, _argument(flags)), (_ANY_BIT, 0, 1, _OPEN_FOR_WRITING), refuse]
        when(name, [*unless, allow])
    for numbers in (*READ.values(), *(WRITE.values() if writable else ())):
        if (number := numbers[column]) is not None:
            steps.extend([(_EQUAL, 0, 1, number), allow])
    return [*steps, refuse]


def _argument(position: int) -> int:
    return _ARGUMENTS_AT + 8 * position
