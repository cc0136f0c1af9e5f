"""Files of a run that others on the machine may neither read nor lead astray.

Run folders lie on shared file systems. Whoever may write beside us can put a link where a log is about to be opened,
and have us overwrite a file of our own by it. So these files are opened without following links, are checked to be
ordinary files with one name before anything is written into them, and are readable by their owner alone.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path
from typing import IO

from nemo_opd.errors import ConfigError

_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # the last: opening a pipe must not wait for its other end


class Planted(ConfigError):
    """Something that a run did not put there stands where it would write."""

    def __init__(self, path: Path, what: str, expected: str) -> None:
        way_out = "find out who put it there, then remove it"
        super().__init__(str(path), what, expected, way_out)


def private_descriptor(path: Path, flags: int) -> int:
    """Open a file for writing, mode 0600 where it is made; `flags` beside those for safety, without O_TRUNC.

    Raises:
        Planted: a link, a pipe or another special file, or a file with a second name.
    """
    expected = "a file of this run's own, or none"
    try:
        descriptor = os.open(path, flags | os.O_CREAT | _SAFE, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise Planted(path, "a link" if path.is_symlink() else "no ordinary file", expected) from None
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        what = "a file with a second name" if stat.S_ISREG(found.st_mode) else "no ordinary file"
        raise Planted(path, what, expected)
    return descriptor


def open_private(path: Path, mode: str = "w") -> IO[str]:
    """Open a text file to write it anew (``w``) or to its end (``a``). Raises as `private_descriptor`."""
    descriptor = private_descriptor(path, os.O_WRONLY | (os.O_APPEND if mode == "a" else 0))
    if mode == "w":
        os.ftruncate(descriptor, 0)  # only now: by O_TRUNC the file would be lost before it was looked at
    return os.fdopen(descriptor, mode, encoding="utf-8")


def write_private(path: Path, text: str) -> None:
    """Write a text file anew. Raises as `private_descriptor`."""
    with open_private(path) as file:
        file.write(text)


def replace_private(path: Path, text: str) -> None:
    """Replace a file whole and durably: a reader sees the old text or the new one, a link in its place is replaced."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(private_descriptor(temporary, os.O_WRONLY | os.O_EXCL), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def private_folder(path: Path) -> Path:
    """Make a folder, mode 0700, with the folders above it; one that is there is taken as it is.

    Raises:
        Planted: a link, also one to a folder.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.is_symlink():
        raise Planted(path, "a link", "a folder of this run's own, or none")
    return path
