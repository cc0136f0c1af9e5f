"""A folder named step-* is a whole checkpoint; retention and left-overs never change which one is the newest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from nemo_opd.checkpoint.store import CheckpointStore, RunState, newest_checkpoint, read_state, restore
from nemo_opd.errors import ConfigError
from nemo_opd.processes import Processes


class FileTrainer:
    """Saves one number; stands where an engine would, since the store only calls `save` and `load`."""

    def __init__(self, value: str = "") -> None:
        self.value = value

    def save(self, folder: Path) -> None:
        (folder / "weights").write_text(self.value)

    def load(self, folder: Path) -> None:
        self.value = (folder / "weights").read_text()


class FailingTrainer(FileTrainer):
    def save(self, folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError("disk full")


def _store(tmp_path: Path, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(tmp_path, Processes(), keep)


def test_what_was_saved_comes_back(tmp_path):
    store = _store(tmp_path)
    assert store.newest() is None
    state = RunState(
        step=3,
        prompts={"epoch": 1, "index": 2},
        counters={"written": 12.0},
        algorithm={"stop kat": {"lowest": [0.1 + 0.2, 1e-300]}},
    )
    store.save(FileTrainer("weights of step 3"), state, "config: 1\n")
    trainer = FileTrainer()
    assert store.load(store.newest(), trainer) == state
    assert trainer.value == "weights of step 3"


class Part:
    """Remembers a number."""

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def state(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state(self, state: Mapping[str, int]) -> None:
        self.number = state["number"]


def test_parts_of_the_algorithm_go_on_where_they_were(caplog: pytest.LogCaptureFixture) -> None:
    known, new = Part(), Part(7)
    restore({"known": known, "new": new}, RunState(step=4, algorithm={"known": {"number": 5}, "gone": {}}))
    assert (known.number, new.number) == (5, 7)
    assert [record.getMessage() for record in caplog.records] == [
        "new was not part of the run until step 4: it begins without a history"
    ]
    caplog.clear()
    restore({"new": new}, RunState())
    assert not caplog.records, "nothing is missing at the start of a run"


def test_retention_keeps_the_newest(tmp_path):
    store = _store(tmp_path, keep=2)
    for step in (1, 2, 3, 10):
        store.save(FileTrainer(str(step)), RunState(step=step), "")
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000003", "step-00000010"]
    assert read_state(store.newest()).step == 10


def test_an_interrupted_save_is_never_the_newest(tmp_path):
    store = _store(tmp_path)
    store.save(FileTrainer("good"), RunState(step=1), "")
    with pytest.raises(OSError, match="disk full"):
        store.save(FailingTrainer(), RunState(step=2), "")
    assert [path.name[:4] for path in sorted(store.folder.iterdir())] == ["step", "tmp-"]
    again = _store(tmp_path)
    assert [path.name for path in again.folder.iterdir()] == ["step-00000001"]
    assert again.newest().name == "step-00000001"


def test_a_damaged_state_is_passed_over(tmp_path):
    store = _store(tmp_path)
    for step in (1, 2):
        store.save(FileTrainer(str(step)), RunState(step=step), "")
    (store.folder / "step-00000002" / "state.json").write_text('{"step": 2, "pro')
    assert newest_checkpoint(store.folder).name == "step-00000001"


def test_the_same_step_can_be_saved_again(tmp_path):
    store = _store(tmp_path)
    for value in ("first", "second"):
        store.save(FileTrainer(value), RunState(step=5), "")
    trainer = FileTrainer()
    store.load(store.newest(), trainer)
    assert trainer.value == "second"
    assert len(list(store.folder.iterdir())) == 1


def test_a_run_is_not_started_anew_over_checkpoints_that_cannot_be_read(tmp_path):
    store = _store(tmp_path)
    store.save(FileTrainer("good"), RunState(step=1), "")
    (store.folder / "step-00000001" / "state.json").write_text("{")
    with pytest.raises(ConfigError, match="none of which can be read"):
        _store(tmp_path).newest()
