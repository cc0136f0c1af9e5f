"""The commit protocol: how a folder of files becomes a checkpoint, and when it is believed to be one.

    checkpoints/tmp-00000100-1f3a/     being written: every file is hashed and synced by the process that wrote it
    checkpoints/tmp-.../manifest.json  written last: name, size and SHA-256 of every file, step, layout, recipe, code
    checkpoints/step-00000100/         the same folder, renamed: committed
    checkpoints/trash-.../             being deleted: renamed first, so that half a checkpoint never looks like one

There is no "latest" file: the newest checkpoint is the `step-*` folder with the greatest step whose manifest holds.
Nothing in a folder is parsed or loaded before its bytes are those of the manifest. That guards against accidents; with
a key in the environment (`KEY_VARIABLE`) the manifest is signed too, and holds against whoever can write into the
folder but does not know the key. Needs no torch.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import stat
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import nemo_opd
from nemo_opd.errors import ConfigError
from nemo_opd.foreign import without_doubles
from nemo_opd.reliability import faults

MANIFEST = "manifest.json"
KEY_VARIABLE = "NEMO_OPD_CHECKPOINT_KEY"
"""Environment variable with a secret of at least 16 characters, the same for whoever writes and reads."""
FORMAT = 1

_KEY_LENGTH = 16
_MANIFEST_BYTES = 64 << 20
"""A manifest of 200,000 files is smaller."""
_NAME_LENGTH = 1024
_PART_LENGTH = 255
_STEP = re.compile(r"step-(\d{1,18})(\.replaced-[0-9a-f]+)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BadCheckpoint(ValueError):
    """A checkpoint that is not what was committed; names the file and what is wrong with it."""

    def __init__(self, folder: Path, file: str, problem: str) -> None:
        self.file = file
        super().__init__(f"{folder.name}/{file}: {problem}" if file else f"{folder.name}: {problem}")


@dataclass(frozen=True)
class FileRecord:
    """What a file must be. Example: ``FileRecord(12, "0a3f...")``."""

    size: int
    """Bytes."""
    sha256: str
    """64 hexadecimal digits."""


@dataclass(frozen=True)
class Manifest:
    """All that is in a checkpoint, and where it comes from."""

    step: int
    files: Mapping[str, FileRecord]
    """By name below the checkpoint's folder, with ``/`` between its parts."""
    layout: Mapping[str, int] = field(default_factory=dict)
    """Processes that wrote it, and their parallel layout."""
    config_sha256: str = ""
    """Of the recipe in full, as `config.yaml` has it."""
    code: Mapping[str, str] = field(default_factory=dict)
    """`version` of the package, and `commit` where it is known."""

    def to_json(self, key: bytes) -> str:
        """With a checksum of its own, and a signature where there is a key: every single bit of the text matters."""
        body = {"format": FORMAT, **asdict(self)}
        text = _text(body)
        sealed = {"manifest": body, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        if key:
            sealed["hmac_sha256"] = hmac.digest(key, text.encode(), "sha256").hex()
        return _text(sealed)

    @classmethod
    def from_json(cls, text: str, key: bytes) -> Manifest:
        """Read back what `to_json` wrote; with a key only what was signed with it. Raises ValueError."""
        sealed = json.loads(text, object_pairs_hook=without_doubles)
        if not isinstance(sealed, dict) or not {"manifest", "sha256"} <= sealed.keys() <= _SEALED:
            raise ValueError("got no sealed manifest")
        body = sealed["manifest"]
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f"expected a manifest of format {FORMAT}")
        ours = _text(body).encode()
        if text != _text(sealed) or sealed["sha256"] != hashlib.sha256(ours).hexdigest():
            raise ValueError("it was changed after it was written")
        if key:
            _check_signature(sealed.get("hmac_sha256"), ours, key)
        return _manifest(body)


_SEALED = {"manifest", "sha256", "hmac_sha256"}


def _text(values: Any) -> str:
    return json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _check_signature(got: object, body: bytes, key: bytes) -> None:
    if not isinstance(got, str):
        raise ValueError(f"it is not signed, and {KEY_VARIABLE} is set")
    if not hmac.compare_digest(got.encode(), hmac.digest(key, body, "sha256").hex().encode()):
        raise ValueError(f"it was not signed with the key of {KEY_VARIABLE}")


def _manifest(body: Mapping[str, Any]) -> Manifest:
    try:
        files = {_safe(name): FileRecord(**record) for name, record in body["files"].items()}
        manifest = Manifest(**{**{k: v for k, v in body.items() if k != "format"}, "files": files})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"it has other fields than a manifest: {error}") from error
    for name, record in files.items():
        good = type(record.size) is int and record.size >= 0
        if not good or not isinstance(record.sha256, str) or not _SHA256.fullmatch(record.sha256):
            raise ValueError(f"{name!r} has no size and SHA-256")
    if type(manifest.step) is not int or not files:
        raise ValueError("it has no step, or no files")
    return manifest


def _safe(name: str) -> str:
    """The name, when it can only mean a file below the folder. Raises ValueError."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") and len(part.encode()) <= _PART_LENGTH for part in parts)
    if not plain or "\\" in name or not name.isprintable() or len(name) > _NAME_LENGTH or name == MANIFEST:
        raise ValueError(f"{name[:80]!r} is no name of a file below the checkpoint")
    return name


def key_from_environment() -> bytes:
    """The secret that manifests are signed with; empty where none is set. Raises ConfigError for a short one."""
    key = os.environ.get(KEY_VARIABLE, "").encode()
    if key and len(key) < _KEY_LENGTH:
        way_out = "generate one, for instance with `openssl rand -hex 32`"
        raise ConfigError(KEY_VARIABLE, f"{len(key)} characters", f"at least {_KEY_LENGTH}", way_out)
    return key


@cache
def code_version() -> dict[str, str]:
    """`version` of the package, and the `commit` of the git checkout that it runs from."""
    found = {"version": nemo_opd.__version__}
    root = Path(nemo_opd.__file__).parents[1]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return found
        found["commit"] = done.stdout.strip()
    return found


# -- writing


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file of its owner's alone; its bytes have reached the disk when this returns."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def record(folder: Path, name: str) -> FileRecord:
    """Hash a file that this process wrote, and have its bytes reach the disk."""
    descriptor = _open(folder, _safe(name))
    with os.fdopen(descriptor, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(descriptor)
        return FileRecord(os.fstat(descriptor).st_size, digest)


def sync_folders(folder: Path, names: Iterable[str]) -> None:
    """Have the entries of files reach the disk, innermost folders first, `folder` last."""
    inside = {parent for name in names for parent in Path(name).parents}
    for parent in sorted({Path(), *inside}, key=lambda path: -len(path.parts)):
        _sync_folder(folder / parent)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The last file of a checkpoint. Raises ConfigError for a key that is too short."""
    write_synced(folder / MANIFEST, manifest.to_json(key_from_environment()).encode())
    _sync_folder(folder)


def publish(temporary: Path, final: Path) -> None:
    """Commit: give a whole folder its name.

    What stands there (the run fell back to an older step, and has come to this one again) is first renamed to a name
    that still counts as a checkpoint of this step, and removed when the new one stands: whenever the process dies, what
    could be loaded before can be loaded after.
    """
    replaced: list[Path] = []
    if final.exists():
        final.rename(final.with_name(f"{final.name}.replaced-{secrets.token_hex(4)}"))
        replaced = list(final.parent.glob(f"{final.name}.replaced-*"))
        faults.hit("ckpt.replacing")
    temporary.rename(final)
    _sync_folder(final.parent)
    for path in replaced:
        discard(path)


def discard(path: Path) -> None:
    """Delete a folder. It is renamed first, so that what is left of it never looks like a checkpoint."""
    trash = path.with_name(f"trash-{path.name}-{secrets.token_hex(4)}")
    path.rename(trash)
    for entry in sorted(trash.iterdir()):
        faults.hit("ckpt.during_deletion")
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    trash.rmdir()


def leftovers(folder: Path) -> list[Path]:
    """What saves and deletions left that came to no end."""
    return sorted([*folder.glob("tmp-*"), *folder.glob("trash-*")])


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading


def step_of(path: Path) -> int | None:
    """The step that a folder's name says; None where it is no name of a checkpoint."""
    found = _STEP.fullmatch(path.name)
    return int(found[1]) if found else None


def committed(folder: Path) -> list[Path]:
    """Folders that are named as checkpoints, oldest first; of one step those that were to be replaced come first."""
    named = [path for path in folder.glob("step-*") if step_of(path) is not None]
    return sorted(named, key=lambda path: (step_of(path), ".replaced-" not in path.name, path.name))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there, of the sizes that it says; their bytes are not read.

    Raises:
        BadCheckpoint: no manifest, one that was changed, of another step or not signed with our key; a file that is
            missing, of another size, not listed, or no plain file.
    """
    try:
        descriptor = _open(folder, MANIFEST)
    except FileNotFoundError:
        raise BadCheckpoint(folder, MANIFEST, "missing, so nothing says what the other files must be") from None
    except OSError as error:
        raise BadCheckpoint(folder, MANIFEST, _plainly(error)) from error
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(_MANIFEST_BYTES + 1)
    try:
        if len(content) > _MANIFEST_BYTES:
            raise ValueError(f"more than {_MANIFEST_BYTES} bytes")
        manifest = Manifest.from_json(content.decode(), key_from_environment())
        if step_of(folder) not in (manifest.step, None):
            raise ValueError(f"it is of step {manifest.step}")
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(folder, MANIFEST, str(error)) from error
    _check_sizes(folder, manifest)
    return manifest


def check(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Read the files (some of them, or all) and compare them with the manifest. 1.5 GB/s on one core.

    Raises BadCheckpoint for the first that differs.
    """
    for name in sorted(manifest.files) if names is None else names:
        try:
            with os.fdopen(_open(folder, name), "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BadCheckpoint(folder, name, _plainly(error)) from error
        if digest != manifest.files[name].sha256:
            raise BadCheckpoint(folder, name, "its bytes are not those that were written (SHA-256)")


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    found = dict(_entries(folder, Path()))
    for name, record_ in sorted(manifest.files.items()):
        if name not in found:
            raise BadCheckpoint(folder, name, "missing")
        if found[name] != record_.size:
            raise BadCheckpoint(folder, name, f"got {found[name]} bytes; expected {record_.size}")
    for name in sorted(found.keys() - manifest.files.keys() - {MANIFEST}):
        raise BadCheckpoint(folder, name, "the manifest does not list it: move it elsewhere")


def _entries(folder: Path, inside: Path) -> Iterable[tuple[str, int]]:
    """Name and size of every file below `folder`. Raises BadCheckpoint for what is neither file nor folder."""
    with os.scandir(folder / inside) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            name = inside / entry.name
            if stat.S_ISDIR(status.st_mode):
                yield from _entries(folder, name)
            elif stat.S_ISREG(status.st_mode):
                yield name.as_posix(), status.st_size
            else:
                raise BadCheckpoint(folder, name.as_posix(), "no plain file (a link, a pipe or a device)")


def _open(folder: Path, name: str) -> int:
    """Open a plain file below `folder`; a symbolic link anywhere on the way is an error. Raises OSError."""
    *parents, last = name.split("/")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for parent in parents:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            above, descriptor = descriptor, os.open(parent, flags, dir_fd=descriptor)
            os.close(above)
        found = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise OSError("no plain file")
    return found


def _plainly(error: OSError) -> str:
    return error.strerror or str(error)
