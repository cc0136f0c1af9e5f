"""The stand-ins of docs/first-cluster-run.md, one after the other, as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "first-cluster-run.md").read_text()
COMMANDS = [line.strip() for line in PAGE.splitlines() if line.startswith("    nemo-opd ") and " work" in line]

ONE_PROCESS = """
import sys
from nemo_opd.cli import main
for line in sys.argv[1:]:
    code = main(line.split()[1:])
    assert code == 0, (line, code)
"""
"""Each command is a process of its own for a user; here they share one, which imports everything once."""


def test_the_page_has_a_stand_in_for_each_part() -> None:
    assert [line.split()[1] for line in COMMANDS] == [
        *("data", "data", "data", "train", "doctor", "train", "report", "eval", "export")
    ]


@pytest.mark.slow
def test_the_stand_ins_of_the_first_run(tmp_path: Path) -> None:
    (recipe,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "first.yaml").write_text(recipe)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ONE_PROCESS, *COMMANDS],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    run_dir = tmp_path / "work" / "run"
    assert json.loads((run_dir / "outcome.json").read_text())["status"] == "done"
    assert len(list((run_dir / "checkpoints").glob("step-*"))) == 2
    assert (run_dir / "report.html").stat().st_size > 10_000
    exported, end = (path / "model.safetensors" for path in (tmp_path / "work" / "exported", run_dir / "model"))
    assert exported.read_bytes() == end.read_bytes()
