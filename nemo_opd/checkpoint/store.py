"""Checkpoints of a run: what is in one, which is the newest that holds, how many are kept.

    run/checkpoints/step-00000100/       state.json, config.yaml, model/ (the trainer's files), manifest.json

How a folder becomes a checkpoint and when it is believed is `nemo_opd.checkpoint.commit`'s subject.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from nemo_opd.checkpoint import commit
from nemo_opd.checkpoint.commit import BadCheckpoint, FileRecord, Manifest
from nemo_opd.engines.protocols import Snapshot, Trainer
from nemo_opd.errors import ConfigError
from nemo_opd.processes import Processes, balanced
from nemo_opd.reliability import faults

log = logging.getLogger(__name__)

STATE_FILE = "state.json"
MODEL_FOLDER = "model"
CONFIG_FILE = "config.yaml"
_SHOWN = 3
"""Checkpoints whose faults an error message lists."""


class SaveFailed(RuntimeError):
    """A checkpoint could not be written. The earlier ones are as they were."""


@dataclass
class RunState:
    """All that decides how a run goes on, besides model, optimizer and schedule.

    Random numbers are derived from (seed, epoch, prompt, sample), so no generator state is kept.
    """

    step: int = 0
    """Optimizer steps done; also the version of the policy."""
    prompts: dict[str, Any] = field(default_factory=dict)
    """Position of the prompt stream."""
    counters: dict[str, float] = field(default_factory=dict)
    """Totals since the start of the run (tokens generated, tokens trained, scores dropped, ...)."""
    algorithm: dict[str, Any] = field(default_factory=dict)
    """By name, what the parts of the algorithm remember (`Stateful`): plain JSON data, the same on every rank."""
    diagnosis: dict[str, Any] = field(default_factory=dict)
    """Windows and counts of `nemo_opd.diagnosis`."""
    guard: dict[str, Any] = field(default_factory=dict)
    """Windows of `nemo_opd.reliability.guard`."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """Fingerprints of the models and the data that the run reads again at every start (`fingerprint.py`)."""


class Stateful(Protocol):
    """A part of the algorithm that remembers something from step to step."""

    def state(self) -> dict[str, Any]:
        """All that decides how it goes on, as plain JSON data (finite numbers: they survive JSON bit for bit)."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""


def restore(parts: Mapping[str, Stateful], state: RunState) -> None:
    """Give each part what it remembered; one that the checkpoint does not know starts afresh, and says so."""
    for name, part in parts.items():
        if name in state.algorithm:
            part.load_state(state.algorithm[name])
        elif state.step:
            log.warning("%s was not part of the run until step %d: it begins without a history", name, state.step)


@dataclass
class _Writing:
    """A save under way, as one process sees it."""

    step: int
    temporary: Path
    snapshot: Snapshot
    files: Mapping[str, bytes]
    """Small files beside the trainer's that this process writes, by name."""
    records: dict[str, FileRecord] = field(default_factory=dict)
    """Of what this process has written so far."""
    error: str = ""
    seconds: float = 0.0
    """Spent on it so far, without what it waited for in the background."""

    def write(self) -> None:
        """Write this process's files and hash each. Not collective, from any thread; what goes wrong is kept."""
        begin = time.perf_counter()
        try:
            faults.hit("ckpt.before_shard")
            for name in self.snapshot.write():
                self._record(f"{MODEL_FOLDER}/{name}")
                faults.hit("ckpt.between_shards")
            for name, content in self.files.items():
                commit.write_synced(self.temporary / name, content)
                self._record(name)
            commit.sync_folders(self.temporary, self.records)
        except Exception as error:  # noqa: BLE001 - told to every rank when they meet
            self.error = _said(error)
        self.seconds += time.perf_counter() - begin

    def finish(self) -> None:
        """Write what files of several processes have in common. Collective; what goes wrong is kept."""
        try:
            for name in self.snapshot.finish():
                self._record(f"{MODEL_FOLDER}/{name}")
            commit.sync_folders(self.temporary, self.records)
        except Exception as error:  # noqa: BLE001 - told to every rank when they meet
            self.error = _said(error)

    def _record(self, name: str) -> None:
        self.records[name] = commit.record(self.temporary, name)


class CheckpointStore:
    """The checkpoints below one run folder."""

    def __init__(
        self,
        run_dir: Path,
        processes: Processes,
        keep: int,
        layout: Mapping[str, int] | None = None,
        saved: Callable[[float], None] | None = None,
    ) -> None:
        """Collective: rank 0 clears away what an interrupted save or deletion left.

        Args:
            layout: said in manifests, besides the number of processes.
            saved: told, after each save, the seconds that it takes when it is waited for.
        """
        self.folder = run_dir / "checkpoints"
        self._processes = processes
        self._keep = keep
        self._saved = saved
        self._layout = {"processes": processes.size, **(layout or {})}
        self._under_way: _Writing | None = None
        self._thread: threading.Thread | None = None
        self._deleting: threading.Thread | None = None
        self._verified: set[Path] = set()
        self._bad: set[Path] = set()
        self._on_first(self._prepare)

    def _prepare(self) -> str:
        commit.key_from_environment()
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in commit.leftovers(self.folder):
            log.warning("removing %s, left by an interrupted save", leftover.name)
            commit.discard(leftover)
        return ""

    def newest(self) -> Path | None:
        """The newest checkpoint that holds, every byte of it, the same on every rank; None in a new run. Collective.

        One that does not is passed over, with an error that names the file at fault.

        Raises:
            ConfigError: there are checkpoints, and none holds: a run is never started anew over them.
        """
        names = json.loads(self._on_first(lambda: json.dumps([p.name for p in commit.committed(self.folder)])))
        problems: list[str] = []
        for path in [self.folder / name for name in reversed(names)]:
            problem = self._problem(path)
            if not problem:
                if problems:
                    self._log(logging.WARNING, "going on from %s instead", path.name)
                return path
            problems.append(problem)
            self._log(logging.ERROR, "passing over a checkpoint that does not hold: %s", problem)
        if problems:
            raise _none_holds(self.folder, problems)
        return None

    def save(
        self,
        trainer: Trainer,
        state: RunState,
        config_text: str,
        files: Mapping[str, bytes] = MappingProxyType({}),
        background: bool = False,
    ) -> Path:
        """Write a checkpoint of `state.step` and drop the oldest beyond `keep`. Collective.

        An earlier save that is under way is waited for: there is at most one.

        Args:
            files: of the run's own, by name; those of rank 0 are written.
            background: return as soon as everything is copied. It becomes a checkpoint in a later `poll` or `wait`.

        Returns:
            The checkpoint's folder; with `background` it is not there yet.

        Raises SaveFailed, on every rank, when one cannot write; earlier checkpoints are then as they were.
        """
        texts = {CONFIG_FILE: config_text.encode(), STATE_FILE: json.dumps(asdict(state), indent=1).encode()}
        self.wait()
        writing = self._begin(trainer, state.step, {**files, **texts}, background)
        if background:
            self._under_way = writing
            self._thread = threading.Thread(target=writing.write, name=f"save of step {state.step}", daemon=True)
            self._thread.start()
            return self._path(state.step)
        writing.write()
        return self._commit(writing)

    def poll(self) -> None:
        """Make the save in the background a checkpoint once every rank has written its part. Collective; between two
        steps, one all-reduce where there is such a save.

        Raises SaveFailed, on every rank, when one could not write.
        """
        if self._under_way is not None and self._thread is not None:
            failed = self._processes.any(bool(self._under_way.error))
            if failed or not self._processes.any(self._thread.is_alive()):
                self._settle(training=True)

    def wait(self) -> None:
        """The same, when it has been written; nothing without one. Collective."""
        self._settle(training=False)

    def _settle(self, training: bool) -> None:
        """`training`: what takes long and can wait is left to a thread."""
        if self._deleting is not None:
            self._deleting.join()
        if self._under_way is not None and self._thread is not None:
            writing, self._under_way = self._under_way, None
            self._thread.join()
            self._commit(writing, training)

    def load(self, path: Path, trainer: Trainer) -> RunState:
        """Bring the trainer to the checkpoint's state and return the rest of it. Collective.

        Raises BadCheckpoint, on every rank, before anything of it is parsed, unless `newest` has verified it.
        """
        if path not in self._verified and (problem := self._problem(path)):
            raise BadCheckpoint(path, "", problem)
        trainer.load(path / MODEL_FOLDER)
        return read_state(path)

    def _begin(self, trainer: Trainer, step: int, files: Mapping[str, bytes], background: bool) -> _Writing:
        begin = time.perf_counter()
        temporary = self.folder / self._on_first(lambda: self._make_temporary(step))
        snapshot = trainer.snapshot(temporary / MODEL_FOLDER, background)
        writing = _Writing(step, temporary, snapshot, files if self._processes.is_first else {})
        writing.seconds += time.perf_counter() - begin
        return writing

    def _make_temporary(self, step: int) -> str:
        name = f"tmp-{step:08d}-{secrets.token_hex(4)}"
        (self.folder / name).mkdir(mode=0o700)
        (self.folder / name / MODEL_FOLDER).mkdir()
        return name

    def _commit(self, writing: _Writing, training: bool = False) -> Path:
        """All processes have written: make it a checkpoint, or fail on all of them. Collective."""
        begin = time.perf_counter()
        self._fail_together(writing)
        writing.finish()
        self._fail_together(writing)
        mine = json.dumps({name: asdict(record) for name, record in writing.records.items()})
        parts = self._processes.gather_text(mine)
        final = self._path(writing.step)
        self._on_first(lambda: self._publish(writing, parts, final))
        self._verified.add(final)
        self._bad.discard(final)
        if self._processes.is_first:
            self._retain(training)
        self._processes.barrier()
        if self._saved is not None:
            self._saved(writing.seconds + time.perf_counter() - begin)
        log.info("saved %s", final)
        return final

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _fail_together(self, writing: _Writing) -> None:
        errors = self._processes.gather_text(writing.error)
        said = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error]
        if said:
            self._abandon(writing)
            raise SaveFailed(f"step {writing.step} could not be saved: {said[0]}; earlier checkpoints are untouched")

    def _abandon(self, writing: _Writing) -> None:
        """Give the room back that half a checkpoint takes, where that is possible."""
        if self._processes.is_first:
            try:
                commit.discard(writing.temporary)
            except OSError as error:
                log.warning("%s is left behind: %s", writing.temporary.name, error)

    def _publish(self, writing: _Writing, parts: list[str], final: Path) -> str:
        files = {name: FileRecord(**values) for part in parts for name, values in json.loads(part).items()}
        config_sha256 = hashlib.sha256(writing.files[CONFIG_FILE]).hexdigest()
        manifest = Manifest(writing.step, files, self._layout, config_sha256, commit.code_version())
        try:
            faults.hit("ckpt.before_manifest")
            commit.write_manifest(writing.temporary, manifest)
            faults.hit("ckpt.before_rename")
            commit.publish(writing.temporary, final)
        except OSError:
            self._abandon(writing)
            raise
        faults.hit("ckpt.after_rename")
        return ""

    def _retain(self, training: bool) -> None:
        """Drop the oldest beyond `keep`. Only those count that hold as far as sizes go and did not fail a closer look;
        the newest of them was written just now. What does not hold is left for a person to look at."""
        good = [path for path in commit.committed(self.folder) if path not in self._bad and _has_manifest(path)]
        old = good[: -self._keep]
        if not training:
            _discard(old)
        elif old:
            self._deleting = threading.Thread(target=_discard, args=(old,), name="old checkpoints", daemon=True)
            self._deleting.start()

    def _problem(self, path: Path) -> str:
        """What is wrong with a checkpoint, the same on every rank; empty when it holds. The ranks share the reading."""
        problem = ""
        try:
            manifest = commit.read_manifest(path)
            names = sorted(manifest.files)
            shares = balanced([manifest.files[name].size for name in names], self._processes.size)
            commit.check(path, manifest, [names[n] for n in shares[self._processes.rank]])
        except (BadCheckpoint, OSError) as error:
            problem = str(error)
        problem = next(filter(None, self._processes.gather_text(problem)), "")
        (self._bad if problem else self._verified).add(path)
        return problem

    def _on_first(self, action: Callable[[], str]) -> str:
        """Rank 0 acts; every rank gets what it returns, or its error. Collective."""
        answer: list[str] = []
        if self._processes.is_first:
            try:
                answer = ["done", action()]
            except ConfigError as error:
                answer = ["refused", error.key, str(error.got), error.expected, error.way_out]
            except Exception as error:  # noqa: BLE001 - told to every rank
                answer = ["failed", _said(error)]
        what, *values = json.loads(self._processes.broadcast_text(json.dumps(answer)))
        if what == "refused":
            raise ConfigError(*values)
        if what == "failed":
            raise SaveFailed(f"{values[0]}; earlier checkpoints are untouched")
        return str(values[0])

    def _log(self, level: int, message: str, *values: object) -> None:
        if self._processes.is_first:
            log.log(level, message, *values)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint below `folder` that holds, every byte of it; None without any. For one process.

    Raises ConfigError when there are some and none holds.
    """
    problems: list[str] = []
    for path in reversed(commit.committed(folder)):
        try:
            commit.check(path, commit.read_manifest(path))
        except BadCheckpoint as error:
            log.error("passing over a checkpoint that does not hold: %s", error)
            problems.append(str(error))
        else:
            return path
    if problems:
        raise _none_holds(folder, problems)
    return None


def require_whole(path: Path) -> None:
    """Raises ConfigError unless the checkpoint holds, every byte of it."""
    try:
        commit.check(path, commit.read_manifest(path))
    except BadCheckpoint as error:
        way_out = "take another step-* folder of the run, or restore this one from a copy"
        raise ConfigError(str(path), error, "a checkpoint that its manifest describes", way_out) from error


def read_state(path: Path) -> RunState:
    """The run state stored in a checkpoint that holds."""
    return RunState(**json.loads((path / STATE_FILE).read_text()))


def _none_holds(folder: Path, problems: list[str]) -> ConfigError:
    rest = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return ConfigError(
        str(folder),
        f"checkpoints, none of which can be read ({'; '.join(problems[:_SHOWN])}{rest})",
        "one whole step-* folder, or none",
        "put one back from a copy, or choose another run.dir to start anew; one without manifest.json was written by "
        "an earlier version: export it with that version and start from the export",
    )


def _discard(folders: Sequence[Path]) -> None:
    for folder in folders:
        try:
            commit.discard(folder)
        except OSError as error:  # the run does not depend on it
            log.warning("%s could not be removed: %s", folder.name, error)


def _has_manifest(path: Path) -> bool:
    try:
        commit.read_manifest(path)
    except BadCheckpoint:
        return False
    return True


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
