"""Whatever dies while a checkpoint is written, replaced or deleted, the newest committed one loads.

The trainer writes four small files, so that a save takes a few milliseconds; each save runs in a process of its own,
which is killed at a named place.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
from pathlib import Path

import pytest

from nemo_opd.checkpoint import commit
from nemo_opd.checkpoint.store import CheckpointStore, RunState, SaveFailed
from nemo_opd.processes import Processes
from nemo_opd.reliability import faults
from tests.helpers.checkpoints import FileTrainer

KEEP = 2


def _save(run_dir: Path, step: int, value: str, fault: str = "") -> None:
    """One attempt of a run that only saves."""
    store = CheckpointStore(run_dir, Processes(), KEEP)
    store.newest()
    faults.arm(fault)
    store.save(FileTrainer(value), RunState(step=step), "a: recipe\n")


def _saved(run_dir: Path, step: int, value: str, fault: str = "") -> int:
    """The same in a process of its own; returns how that ended."""
    process = mp.get_context("fork").Process(target=_save, args=(run_dir, step, value, fault))
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def _loaded(run_dir: Path) -> tuple[int, str]:
    """What a new attempt goes on from: the step, and what the trainer holds. It leaves nothing temporary behind."""
    store, trainer = CheckpointStore(run_dir, Processes(), KEEP), FileTrainer()
    newest = store.newest()
    assert newest is not None
    state = store.load(newest, trainer)
    assert [path.name for path in store.folder.iterdir() if not path.name.startswith("step-")] == []
    return state.step, trainer.value


BEFORE = ("ckpt.before_shard", "ckpt.between_shards", "ckpt.before_manifest", "ckpt.before_rename")
AFTER = ("ckpt.after_rename", "ckpt.during_deletion", "ckpt.during_deletion=kill@3")
"""Steps 1 and 2 are there, and 1 is deleted when 3 stands."""


@pytest.mark.parametrize("point", BEFORE + AFTER)
def test_killed_while_it_saves(tmp_path: Path, point: str) -> None:
    for step in (1, 2):
        assert _saved(tmp_path, step, f"of step {step}") == 0
    rule = point if "=" in point else f"{point}=kill"
    assert _saved(tmp_path, 3, "of step 3", rule) == -signal.SIGKILL
    last = 2 if point in BEFORE else 3
    assert _loaded(tmp_path) == (last, f"of step {last}")
    assert _saved(tmp_path, 3 + last, "after the kill") == 0
    assert _loaded(tmp_path) == (3 + last, "after the kill")


@pytest.mark.parametrize("point", [*BEFORE, "ckpt.replacing", "ckpt.after_rename", "ckpt.during_deletion"])
@pytest.mark.parametrize("bad", [True, False])
def test_killed_while_it_saves_a_step_again(tmp_path: Path, point: str, bad: bool) -> None:
    """After falling back behind a checkpoint that does not hold; and over one that does, which a store may do too."""
    for step in (1, 2):
        assert _saved(tmp_path, step, f"of step {step}") == 0
    if bad:
        (tmp_path / "checkpoints" / "step-00000002" / "model" / "a-0").write_text("a or step 2")
    assert _saved(tmp_path, 2, "again", f"{point}=kill") == -signal.SIGKILL
    committed = point in ("ckpt.after_rename", "ckpt.during_deletion")
    before = (1, "of step 1") if bad else (2, "of step 2")
    assert _loaded(tmp_path) == ((2, "again") if committed else before)
    assert _saved(tmp_path, 3, "later") == 0
    assert _loaded(tmp_path) == (3, "later")


FULL = [*BEFORE, "ckpt.between_shards=enospc@2"]


@pytest.mark.parametrize("point", FULL)
def test_a_full_disk_costs_nothing_that_was_saved(tmp_path: Path, point: str) -> None:
    for step in (1, 2):
        _save(tmp_path, step, f"of step {step}")
    faults.arm(point if "=" in point else f"{point}=enospc")
    store = CheckpointStore(tmp_path, Processes(), KEEP)
    try:
        with pytest.raises(SaveFailed, match=r"No space left on device.*earlier checkpoints are untouched"):
            store.save(FileTrainer("of step 3"), RunState(step=3), "")
    finally:
        faults.arm("")
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000001", "step-00000002"], "room given back"
    assert _loaded(tmp_path) == (2, "of step 2")


def test_files_are_synced_before_their_folders_and_the_name_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed process wrote is there, after a power failure it may not be: so the order of calls is looked at."""
    calls: list[str] = []

    def path_of(descriptor: int) -> str:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path / "checkpoints").as_posix()
        return name.replace(name.partition("/")[0], "TMP", 1) if name.startswith("tmp-") else name

    monkeypatch.setattr(commit.os, "fsync", lambda descriptor: calls.append(path_of(descriptor)))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: (calls.append("rename"), rename(self, to))[1])
    _save(tmp_path, 1, "x")
    model = {"TMP/model/a-0", "TMP/model/b-0", "TMP/model/index"}
    texts = {"TMP/config.yaml", "TMP/state.json"}
    assert set(calls) == {*model, *texts, "TMP/model", "TMP", "TMP/manifest.json", "rename", "."}
    last = {name: max(n for n, call in enumerate(calls) if call == name) for name in set(calls)}
    assert max(last[name] for name in model) < last["TMP/model"] < last["TMP/manifest.json"]
    assert max(last[name] for name in texts) < last["TMP"]
    assert calls[-4:] == ["TMP/manifest.json", "TMP", "rename", "."]
