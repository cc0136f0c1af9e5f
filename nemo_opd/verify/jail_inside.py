"""The process jail, from inside: `python -P -S -s jail_inside.py ROLE SETTINGS` (driven by `nemo_opd.verify.jail`).

It takes away what it can before any text of a stranger is run, in this order: the parent's survival (it dies with the
parent), the environment, namespaces (new user, process, network, mount and IPC ones), the file system (the standard
library and shared libraries read-only, a small folder in memory to write in), resources, the user, all privileges, and
system calls. Then it plays its role (`nemo_opd.verify.jail_roles`). Stands alone: nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import json
import os
import resource
import signal
import struct
import sys
import sysconfig
from collections.abc import Callable
from types import ModuleType
from typing import Any

_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
_CLONE_NEWPID, _CLONE_NEWNET = 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = -100, 0x8000, 1
_MOUNT_SETATTR = 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITIES_VERSION = 0x20080522
_FIRST_USER = 0x40000000
"""From here on user ids belong to nobody; each jail started by root takes one of its own."""
_NOBODY = 65534
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    """Isolate, then play the role that the command line names."""
    settings = json.loads(sys.argv[2])
    try:
        play = _isolate(settings)
    except (OSError, ValueError, KeyError) as error:
        sys.stdout.write(json.dumps({"failed": f"{type(error).__name__}: {error}"}) + "\n")
        return 1
    play(sys.argv[1], settings)
    return 0


def _isolate(settings: dict[str, Any]) -> Callable[[str, dict[str, Any]], None]:
    """Take everything away; then what plays a role."""
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.environ.clear()
    roles, system_calls = _neighbour("jail_roles"), _neighbour("jail_filter")
    if settings["namespaces"]:
        _new_namespaces()
        _go_on_as_first_process()
        _own_file_system(settings["scratch_bytes"])
    _limit(settings)
    _drop_privileges()
    system_calls.install(writable=settings["namespaces"])
    return roles.play


def _neighbour(name: str) -> ModuleType:
    """A file of this folder, which is not on the path: it holds modules with names of the standard library's."""
    loader = importlib.machinery.SourceFileLoader(name, os.path.join(os.path.dirname(__file__), name + ".py"))
    spec = importlib.machinery.ModuleSpec(name, loader, origin=loader.path)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _call(name: str, *arguments: Any) -> None:
    """A call of the C library. Raises OSError."""
    if getattr(_libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def _system_call(number: int, *arguments: Any) -> None:
    if _libc.syscall(ctypes.c_long(number), *arguments) < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}: {os.strerror(ctypes.get_errno())}")


def _new_namespaces() -> None:
    """As root the user namespace is not needed, and without it the jail can take a user id of its own."""
    flags = _CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _call("unshare", flags)
        return
    _call("unshare", flags | _CLONE_NEWUSER)
    for path, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{path}", "w") as file:
            file.write(text)


def _go_on_as_first_process() -> None:
    """Return in a child, which is the first process of the new process namespace; its end ends all others there."""
    child = os.fork()
    if child == 0:
        _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        return
    os.closerange(0, 256)  # or the other ends of the pipes would not see the child's end
    _, status = os.waitpid(child, 0)
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def _own_file_system(scratch_bytes: int) -> None:
    """A root folder in memory with the libraries, read-only, and /work to write in, which becomes the current one.

    The old root goes out of reach, and with it /proc, /sys, sockets and everybody's files.
    """
    root = os.getcwd()
    stdlib = sysconfig.get_path("stdlib")  # after the folders that it may lie in
    visible = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", stdlib, "/etc/ld.so.cache", *_DEVICES]
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for path in visible:
        if not os.path.exists(path) or os.path.exists(root + path):  # the second: within one of the others
            continue
        if os.path.isdir(path):
            os.makedirs(root + path)
        else:
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.close(os.open(root + path, os.O_CREAT | os.O_WRONLY, 0o644))
        _mount(path, root + path, None, _MS_BIND | _MS_REC)
        _make_read_only(root + path, _AT_RECURSIVE)
    os.mkdir(root + "/work")
    options = f"size={scratch_bytes},nr_inodes=4096,mode=777"
    _mount("tmpfs", root + "/work", "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    _make_read_only(root, 0)
    os.chdir(root)
    _system_call(_PIVOT_ROOT[os.uname().machine], b".", b".")
    _call("umount2", b".", _MNT_DETACH)
    os.chdir("/work")


def _make_read_only(path: str, flags: int) -> None:
    attributes = struct.pack("<QQQQ", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    _system_call(_MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, attributes, ctypes.c_size_t(len(attributes)))


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _call("mount", texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])


def _limit(settings: dict[str, Any]) -> None:
    """Limits that can only be lowered further."""
    seconds = settings["cpu_seconds"]
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: settings["memory_bytes"],
        # Without a file system of its own it may write no file at all.
        resource.RLIMIT_FSIZE: settings["scratch_bytes"] if settings["namespaces"] else 0,
        resource.RLIMIT_NPROC: settings["threads"],
        resource.RLIMIT_NOFILE: settings["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def _drop_privileges() -> None:
    """Another user when this one is root, no privileges, none to come, and no other process may look into this one."""
    if os.geteuid() == 0:
        os.setgroups([])
        own = _FIRST_USER + int.from_bytes(os.urandom(3), "little")
        try:
            os.setresgid(own, own, own)
            os.setresuid(own, own, own)
        except OSError:  # a container may know fewer ids
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        if not os.access(os.__file__, os.R_OK):
            raise PermissionError(f"{os.path.dirname(os.__file__)} can be read by root alone")
    header, none = struct.pack("<II", _CAPABILITIES_VERSION, 0), struct.pack("<6I", *[0] * 6)
    _system_call(_CAPSET[os.uname().machine], header, none)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a change of user clears it


if __name__ == "__main__":
    sys.exit(main())
