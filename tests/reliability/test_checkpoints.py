"""R4, R6 and R14 of docs/recovery.md: damage is found and named, a save in the background is the save that was asked
for, and there is always something to go on from.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_opd.checkpoint import commit
from nemo_opd.checkpoint.store import CheckpointStore, RunState, SaveFailed
from nemo_opd.config import Config
from nemo_opd.processes import Processes
from nemo_opd.reliability import faults
from tests.helpers.checkpoints import FileTrainer
from tests.helpers.figures import record
from tests.helpers.megatron import recipe
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import tiny_checkpoint

# -- R4: each file of a checkpoint that two ranks wrote, damaged in each way


def _two_saves(rank: int, config: Config, run_dir: Path) -> None:
    from tests.contract.trainers import batch_for, build

    trainer = build(config)
    store = CheckpointStore(run_dir, Processes.current(), 2)
    for step in (1, 2):
        trainer.train_step(batch_for(trainer.place, step))
        store.save(trainer, RunState(step=step), "a: recipe\n")


def _flip(path: Path, other: Path) -> None:
    """One bit, somewhere."""
    content, draws = bytearray(path.read_bytes()), random.Random(path.name)
    content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    path.write_bytes(content)


def _truncate(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _delete(path: Path, other: Path) -> None:
    path.unlink()


def _swap(path: Path, other: Path) -> None:
    """The file of the same name of another step."""
    path.write_bytes(other.read_bytes())


DAMAGES: tuple[Callable[[Path, Path], None], ...] = (_flip, _truncate, _delete, _swap)


def _newest_of(rank: int, run_dirs: list[Path]) -> list[tuple[str, list[str]]]:
    """Of each run the checkpoint that is gone on from, and what was logged."""
    import logging

    class Lines(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            said.append(entry.getMessage())

    answers = []
    logger, handler = logging.getLogger("nemo_opd.checkpoint.store"), Lines()
    logger.addHandler(handler)
    for run_dir in run_dirs:
        said: list[str] = []
        newest = CheckpointStore(run_dir, Processes.current(), 2).newest()
        answers.append((newest.name if newest else "", said))
    logger.removeHandler(handler)
    return answers


def test_every_damage_is_found_and_named(ranks2: RankPool, tmp_path: Path) -> None:
    config = recipe(tiny_checkpoint(tmp_path / "model", vocab_size=91), student__tensor_model_parallel_size=2)
    good = tmp_path / "good"
    ranks2.run(_two_saves, config, good)
    older, newer = (Path("checkpoints") / f"step-0000000{step}" for step in (1, 2))
    files = sorted(path.relative_to(good / newer) for path in (good / newer).rglob("*") if path.is_file())
    assert {"manifest.json", "state.json", "model/.metadata", "model/__1_0.distcp"} <= {str(file) for file in files}
    cases = []
    for file in files:
        for damage in DAMAGES:
            if damage is _swap and (good / newer / file).read_bytes() == (good / older / file).read_bytes():
                continue  # the recipe, and the format's name: the same in both
            run_dir = tmp_path / f"{damage.__name__} {file}".replace("/", "-")
            shutil.copytree(good, run_dir)
            damage(run_dir / newer / file, run_dir / older / file)
            cases.append((run_dir, str(file)))
    [answers, others] = ranks2.run(_newest_of, [run_dir for run_dir, _ in cases])
    assert [name for name, _ in others] == [name for name, _ in answers]
    found = 0
    for (run_dir, file), (newest, said) in zip(cases, answers, strict=True):
        assert newest == "step-00000001", run_dir.name
        assert said[0].startswith("passing over a checkpoint that does not hold: step-00000002/"), run_dir.name
        found += f"step-00000002/{file}: " in said[0]
        assert said[1] == "going on from step-00000001 instead"
    assert found == len(cases) >= 30
    record("R4", "damaged files found, named, and the step before gone on from", f"{found} / {len(cases)}")


def test_any_bit_of_a_manifest_matters(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000007"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    manifest = commit.Manifest(7, {"state.json": commit.record(folder, "state.json")}, {"processes": 1}, "0" * 64)
    commit.write_manifest(folder, manifest)
    path = folder / commit.MANIFEST
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(commit.BadCheckpoint, match=r"step-00000007/manifest\.json: "):
            commit.read_manifest(folder)
    path.write_bytes(content)
    assert commit.read_manifest(folder) == manifest


# -- R6: in the background


def _saved_both_ways(rank: int, config: Config, folder: Path) -> int:
    """Save in the foreground, then in the background; the weights change before a byte of that is written."""
    from tests.contract.trainers import batch_for, build

    trainer = build(config)
    trainer.train_step(batch_for(trainer.place, 0))
    here, there = (CheckpointStore(folder / name, Processes.current(), 2) for name in ("sync", "async"))
    here.save(trainer, RunState(step=1), "a: recipe\n")
    faults.arm("ckpt.before_shard=sleep:0.5")
    try:
        there.save(trainer, RunState(step=1), "a: recipe\n", background=True)
        for step in range(1, 3):
            trainer.train_step(batch_for(trainer.place, step))
    finally:
        faults.arm("")
    assert not list(there.folder.glob("step-*")), "the steps came first"
    there.wait()
    files = [commit.read_manifest(store.folder / "step-00000001").files for store in (here, there)]
    differing = [name for name in files[0] if files[0][name] != files[1][name]]
    assert files[0].keys() == files[1].keys() and any(name.endswith("__1_1.distcp") for name in files[0])
    assert differing in ([], ["model/.metadata"]), "which has a name that is drawn for each save"
    return len(differing)


def _fails_in_the_background(rank: int, config: Config, run_dir: Path) -> tuple[int, str]:
    """One rank of two finds the disk full: steps until all hear of it, and what they hear."""
    from tests.contract.trainers import batch_for, build

    trainer = build(config)
    store = CheckpointStore(run_dir, Processes.current(), 2)
    store.save(trainer, RunState(step=1), "a: recipe\n")
    faults.arm("ckpt.between_shards=enospc rank=1")
    try:
        store.save(trainer, RunState(step=2), "a: recipe\n", background=True)
        assert store._thread is not None
        store._thread.join()
        for step in range(1, 5):
            trainer.train_step(batch_for(trainer.place, step))
            store.poll()
    except SaveFailed as error:
        return step, str(error)
    finally:
        faults.arm("")
    return 0, ""


def test_a_save_in_the_background_is_the_save_that_was_asked_for(ranks2: RankPool, tmp_path: Path) -> None:
    config = recipe(tiny_checkpoint(tmp_path / "model", vocab_size=91), student__tensor_model_parallel_size=2)
    ranks2.run(_saved_both_ways, config, tmp_path)
    record("R6", "files with tensors that differ between a save in the background and one in the foreground", "0")
    answers = ranks2.run(_fails_in_the_background, config, tmp_path / "full")
    for step, said in answers:
        assert step == 1
        assert "step 2 could not be saved: rank 1: OSError: [Errno 28] No space left on device" in said
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == ["step-00000001"]
    record("R6", "steps until a writer that fails in the background ends the run on all ranks", "1")


# -- R14: always something to go on from


def _attempt(run_dir: Path, step: int, fault: str, room: int) -> None:
    """A process that saves; with `room` no file of it can be larger."""
    store = CheckpointStore(run_dir, Processes(), 2)
    store.newest()
    if room:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    faults.arm(fault)
    store.save(FileTrainer(f"of step {step} " * 100), RunState(step=step), "")


def _run(function: Callable[..., None], *arguments: Any) -> int:
    process = mp.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode if process.exitcode is not None else -1


def test_there_is_always_something_to_go_on_from(tmp_path: Path) -> None:
    """keep=2, 50 saves of which every one is killed while it deletes, finds the disk full, or a file too large."""
    draws, loadable, ended = random.Random(0), 0, set()
    assert _run(_attempt, tmp_path, 1, "", 0) == 0
    assert _run(_attempt, tmp_path, 2, "", 0) == 0
    newest = 2
    for trial in range(50):
        fault, room = "", 0
        kind = trial % 3
        if kind == 0:
            fault = f"ckpt.during_deletion=kill@{draws.randint(1, 4)}"
        elif kind == 1:
            places = ("before_shard", "between_shards", "before_manifest", "before_rename")
            fault = f"ckpt.{draws.choice(places)}=enospc"
        else:
            room = draws.randrange(1, 1000)  # a shard has 1,002 bytes or more
        ended.add((kind, _run(_attempt, tmp_path, newest + 1, fault, room)))
        store, trainer = CheckpointStore(tmp_path, Processes(), 2), FileTrainer()
        path = store.newest()
        assert path is not None
        state = store.load(path, trainer)
        assert trainer.value == f"of step {state.step} " * 100
        assert state.step == newest + (kind == 0), "a save that is killed while it deletes is committed"
        newest = state.step
        loadable += 1
        assert 1 <= len(commit.committed(store.folder)) <= 3
    assert ended == {(0, -signal.SIGKILL), (1, 1), (2, 1)}
    record("R14", "loadable after a kill during deletion, a full disk, a file that is too large", f"{loadable} / 50")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A file system of 256 KB: what does not fit is found out by the kernel."""
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", mount], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    try:
        store = CheckpointStore(mount, Processes(), 2)
        store.save(FileTrainer("a" * 20_000), RunState(step=1), "")
        store.save(FileTrainer("b" * 20_000), RunState(step=2), "")
        with pytest.raises(SaveFailed, match="No space left on device"):
            store.save(FileTrainer("c" * 100_000), RunState(step=3), "")
        assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000001", "step-00000002"]
        store.save(FileTrainer("d" * 20_000), RunState(step=3), "")
        assert [path.name for path in commit.committed(store.folder)] == ["step-00000002", "step-00000003"]
    finally:
        subprocess.run(["umount", mount], check=True)
