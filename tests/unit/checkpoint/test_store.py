"""A folder named step-* is a whole checkpoint; retention and left-overs never change which one is the newest."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from nemo_opd.checkpoint.commit import BadCheckpoint
from nemo_opd.checkpoint.store import CheckpointStore, RunState, SaveFailed, newest_checkpoint, read_state, restore
from nemo_opd.errors import ConfigError
from nemo_opd.processes import Processes
from tests.helpers.checkpoints import FileSnapshot, FileTrainer


class FailingSnapshot(FileSnapshot):
    def write(self) -> Iterator[str]:
        (self.folder / "a-0").write_text("half")
        raise OSError("disk full")
        yield


class FailingTrainer(FileTrainer):
    def snapshot(self, folder: Path, background: bool = False) -> FileSnapshot:
        return FailingSnapshot(folder, "", 0)


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


def test_a_save_that_fails_leaves_the_earlier_ones_and_nothing_else(tmp_path):
    store = _store(tmp_path)
    store.save(FileTrainer("good"), RunState(step=1), "")
    with pytest.raises(SaveFailed, match="step 2 could not be saved: rank 0: OSError: disk full; earlier"):
        store.save(FailingTrainer(), RunState(step=2), "")
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]
    assert _store(tmp_path).newest().name == "step-00000001"


def test_what_an_interrupted_save_left_is_removed_and_never_the_newest(tmp_path, caplog):
    store = _store(tmp_path)
    store.save(FileTrainer("good"), RunState(step=1), "")
    for name in ("tmp-00000002-1f3a", "trash-step-00000000-1f3a"):
        (store.folder / name / "model").mkdir(parents=True)
    assert store.newest().name == "step-00000001"
    assert [path.name for path in _store(tmp_path).folder.iterdir()] == ["step-00000001"]
    assert "removing tmp-00000002-1f3a, left by an interrupted save" in caplog.text


def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, caplog):
    store = _store(tmp_path)
    for step in (1, 2):
        store.save(FileTrainer(str(step)), RunState(step=step), "")
    (store.folder / "step-00000002" / "model" / "b-0").write_text("b 7")
    caplog.set_level(logging.WARNING)
    assert newest_checkpoint(store.folder).name == "step-00000001"
    assert _store(tmp_path).newest().name == "step-00000001"
    words = "step-00000002/model/b-0: its bytes are not those that were written (SHA-256)"
    assert caplog.text.count(words) == 2
    assert "going on from step-00000001 instead" in caplog.text


def test_retention_counts_only_what_holds(tmp_path):
    store = _store(tmp_path, keep=2)
    for step in (1, 2):
        store.save(FileTrainer(str(step)), RunState(step=step), "")
    (store.folder / "step-00000002" / "model" / "b-0").write_text("b 7")
    (store.folder / "step-00000000").mkdir()
    again = _store(tmp_path, keep=2)
    assert again.newest().name == "step-00000001"
    again.save(FileTrainer("3"), RunState(step=3), "")
    names = sorted(path.name for path in store.folder.iterdir())
    assert names == [f"step-{step:08d}" for step in (0, 1, 2, 3)], "two that hold, two for a person to look at"
    again.save(FileTrainer("2"), RunState(step=2), "")
    assert sorted(path.name for path in store.folder.iterdir()) == [f"step-{step:08d}" for step in (0, 2, 3)]


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
    with pytest.raises(ConfigError, match=r"none of which can be read \(step-00000001/state.json: got 1 b"):
        _store(tmp_path).newest()


def test_a_checkpoint_of_an_earlier_version_is_refused_with_a_way_out(tmp_path):
    folder = tmp_path / "checkpoints" / "step-00000004"
    (folder / "model").mkdir(parents=True)
    (folder / "state.json").write_text('{"step": 4}')
    with pytest.raises(ConfigError, match=r"manifest.json: missing.*an earlier version: export it with"):
        _store(tmp_path).newest()


def test_nothing_is_loaded_that_was_not_verified(tmp_path):
    store = _store(tmp_path)
    path = store.save(FileTrainer("good"), RunState(step=1), "")
    (path / "model" / "a-0").write_text("a evil")
    trainer = FileTrainer("untouched")
    with pytest.raises(BadCheckpoint, match="model/a-0"):
        _store(tmp_path).load(path, trainer)
    assert trainer.value == "untouched"


class SlowSnapshot(FileSnapshot):
    """Writes when it may."""

    def __init__(self, folder: Path, trainer: SlowTrainer) -> None:
        super().__init__(folder, trainer.value, 0)
        self.trainer = trainer

    def write(self) -> Iterator[str]:
        assert self.trainer.may_write.wait(60)
        if self.trainer.fails:
            raise OSError("disk full")
        yield from super().write()


class SlowTrainer(FileTrainer):
    def __init__(self, value: str = "", fails: bool = False) -> None:
        super().__init__(value)
        self.may_write = threading.Event()
        self.fails = fails

    def snapshot(self, folder: Path, background: bool = False) -> FileSnapshot:
        return SlowSnapshot(folder, self)


def _names(store: CheckpointStore) -> list[str]:
    return sorted(path.name[:13] for path in store.folder.iterdir())


def _polled(store: CheckpointStore, name: str) -> None:
    """Steps go by until the checkpoint stands."""
    deadline = time.monotonic() + 60
    while name not in _names(store) and time.monotonic() < deadline:
        store.poll()


def test_a_save_in_the_background_is_committed_between_two_later_steps(tmp_path):
    store, trainer, state = _store(tmp_path), SlowTrainer("early"), RunState(step=1, counters={"written": 1.0})
    store.save(trainer, state, "", background=True)
    trainer.value, state.counters["written"] = "late", 2.0
    state.step = 2
    store.poll()
    assert _names(store) == ["tmp-00000001-"]
    trainer.may_write.set()
    _polled(store, "step-00000001")
    assert _names(store) == ["step-00000001"]
    loaded = FileTrainer()
    assert store.load(store.newest(), loaded) == RunState(step=1, counters={"written": 1.0})
    assert loaded.value == "early"
    store.poll()
    store.wait()


def test_there_is_one_save_in_the_background_at_most(tmp_path):
    store, first, second = _store(tmp_path), SlowTrainer("first"), SlowTrainer("second")
    store.save(first, RunState(step=1), "", background=True)
    threading.Timer(0.2, first.may_write.set).start()
    store.save(second, RunState(step=2), "", background=True)
    assert _names(store) == ["step-00000001", "tmp-00000002-"]
    second.may_write.set()
    store.wait()
    assert _names(store) == ["step-00000001", "step-00000002"]


def test_a_writer_that_fails_in_the_background_is_heard_of_at_the_next_step(tmp_path):
    store, trainer = _store(tmp_path), SlowTrainer(fails=True)
    store.save(FileTrainer("good"), RunState(step=1), "")
    store.save(trainer, RunState(step=2), "", background=True)
    trainer.may_write.set()
    store._thread.join()
    with pytest.raises(SaveFailed, match="step 2 could not be saved: rank 0: OSError: disk full"):
        store.poll()
    assert _names(store) == ["step-00000001"]
    store.save(FileTrainer("later"), RunState(step=3), "")
    assert _names(store) == ["step-00000001", "step-00000003"]


def test_the_time_of_a_save_is_told_without_what_it_waited_for(tmp_path):
    told: list[float] = []
    store = CheckpointStore(tmp_path, Processes(), 2, saved=told.append)
    store.save(FileTrainer("x"), RunState(step=1), "")
    store.save(FileTrainer("y"), RunState(step=2), "", background=True)
    begin = time.perf_counter()
    time.sleep(2.0)
    store.wait()
    assert len(told) == 2
    assert told[0] > 0 and 0 < told[1] < time.perf_counter() - begin
