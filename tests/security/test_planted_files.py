"""S10: what somebody else put into the place of a file of ours is neither written to nor read by others."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_opd.config import Config
from nemo_opd.engines.vllm.local import LocalServers
from nemo_opd.engines.vllm.server import _announce
from nemo_opd.errors import ConfigError
from nemo_opd.launch import request_stop
from nemo_opd.observe.recorder import Recorder
from nemo_opd.reliability.files import Planted, open_private, private_folder, replace_private, write_private
from nemo_opd.reliability.lock import RunLock
from nemo_opd.reliability.outcome import Status, read_outcome, write_outcome
from nemo_opd.types import StepReport
from nemo_opd.worker import _guarded, log_to
from tests.helpers.rollouts import make_rollout
from tests.helpers.servers import server_settings

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Written:
    """A file or folder of a run, and what writes it. `refused`: a link stops it; otherwise the link is replaced."""

    path: str
    write: Callable[[Path], object]
    refused: bool = True


def log_a_line(folder: Path) -> None:
    log_to(folder / "log.txt")
    logging.getLogger("nemo_opd.planted").warning("a line")


def rank_log(folder: Path) -> None:
    code = "import sys\nfrom pathlib import Path\nfrom nemo_opd.worker import write_output_to\n"
    code += "write_output_to(Path(sys.argv[1]))\nprint('a line')"
    command = [sys.executable, "-c", code, str(folder / "logs" / "rank-1.txt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Planted(folder, done.stderr.splitlines()[-1], "")


def recorder(folder: Path) -> None:
    one = Recorder(folder, 0, rollouts_per_step=1, tensorboard=True)
    try:
        one.write(StepReport(1, 1, {"loss/total": 0.5}, 0.5))
        one.write_findings([{"step": 1, "sign": "repetition"}])
        one.write_rollouts(1, [make_rollout(0, 3)])
    finally:
        one.close()


def server_log(folder: Path) -> None:
    scratch = private_folder(folder / "scratch")
    servers = LocalServers(folder / "logs", scratch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/true")  # its log is opened for it
        try:
            servers.start("writer-0", server_settings(folder, scratch))
        finally:
            servers.close()


def lock(folder: Path) -> None:
    with RunLock(folder):
        pass


WRITTEN = [
    Written("log.txt", log_a_line),
    Written("logs/rank-1.txt", rank_log),
    Written("logs/vllm-writer-0.txt", server_log),
    Written("logs", server_log),
    Written("metrics.jsonl", recorder, refused=False),
    Written("diagnosis.jsonl", recorder, refused=False),
    Written("rollouts/step-00000001.jsonl", recorder),
    Written("rollouts", recorder),
    Written("tensorboard", recorder),
    Written("outcome.json", lambda folder: write_outcome(folder, Status.DONE, 1, "", "a"), refused=False),
    Written("control/stop", lambda folder: request_stop(folder, "a"), refused=False),
    Written("control", lambda folder: request_stop(folder, "a")),
    Written("control/recipe-a.yaml", lambda folder: write_private(folder / "control" / "recipe-a.yaml", "x")),
    Written("config.yaml", lambda folder: replace_private(folder / "config.yaml", "x"), refused=False),
    Written("writer.ready", lambda folder: _announce(folder / "writer.ready", "http://127.0.0.1:1"), refused=False),
    Written(".lock", lock),
]
"""Every file of a run that is not a checkpoint's (these are made in new folders with random names)."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    logger = logging.getLogger("nemo_opd")
    before = list(logger.handlers)
    yield tmp_path / "run"
    for handler in [one for one in logger.handlers if one not in before]:
        logger.removeHandler(handler)
        handler.close()


@pytest.mark.parametrize("written", WRITTEN, ids=lambda written: written.path)
def test_a_link_planted_beforehand_leads_nowhere(written: Written, folder: Path, tmp_path: Path) -> None:
    target, planted = tmp_path / "precious", folder / written.path
    if is_folder := "." not in written.path:
        target.mkdir()
    else:
        target.write_text("untouched")
    planted.parent.mkdir(parents=True)
    planted.symlink_to(target)
    if written.refused:
        with pytest.raises((ConfigError, OSError)) as refusal:
            written.write(folder)
        assert "link" in str(refusal.value)
    else:
        written.write(folder)
        assert not planted.is_symlink()
    assert list(target.iterdir()) == [] if is_folder else target.read_text() == "untouched"


@pytest.mark.parametrize("written", [one for one in WRITTEN if "." in one.path], ids=lambda written: written.path)
def test_what_is_written_is_its_owners_alone(written: Written, folder: Path) -> None:
    """Whatever the umask permits."""
    before = os.umask(0)
    try:
        folder.mkdir(mode=0o755)
        private_folder((folder / written.path).parent)
        written.write(folder)
    finally:
        os.umask(before)
    for path in folder.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.parent.name == "tensorboard":  # its writer makes the file, the folder guards it
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        else:
            assert mode == (0o700 if path.is_dir() else 0o600), path


def test_a_run_folder_that_is_made_is_its_owners_alone(tmp_path: Path) -> None:
    with RunLock(tmp_path / "new" / "run"):
        assert stat.S_IMODE((tmp_path / "new" / "run").stat().st_mode) == 0o700


def test_other_things_than_links_are_refused_too(tmp_path: Path) -> None:
    precious, second, pipe = tmp_path / "precious", tmp_path / "second", tmp_path / "pipe"
    precious.write_text("untouched")
    os.link(precious, second)
    os.mkfifo(pipe)
    for path, what in ((second, "second name"), (pipe, "no ordinary file"), (tmp_path, "no ordinary file")):
        for mode in ("w", "a"):
            with pytest.raises(Planted, match=f"{path}: got .*{what}.*; expected .*; find out who put it there"):
                open_private(path, mode)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # and one that somebody listens at
    with pytest.raises(Planted):
        open_private(pipe)
    os.close(reader)
    assert precious.read_text() == "untouched"


def test_a_file_of_ours_is_written_anew_or_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text, mode, expected in (("long text", "w", "long text"), ("new", "w", "new"), (" more", "a", "new more")):
        with open_private(path, mode) as file:
            file.write(text)
        assert path.read_text() == expected
    replace_private(path, "whole")
    assert path.read_text() == "whole" and [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_run_whose_log_is_a_link_says_so_in_its_outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.txt").symlink_to(tmp_path / "precious")
    config = object.__new__(Config)  # it is not looked at before the log is opened
    assert _guarded(config, tmp_path, "a", 0) == 2
    outcome = read_outcome(tmp_path)
    assert outcome is not None and outcome.status is Status.CONFIG_ERROR and "got a link" in outcome.reason
    assert "log.txt: got a link" in capsys.readouterr().err
    assert not (tmp_path / "precious").exists()
