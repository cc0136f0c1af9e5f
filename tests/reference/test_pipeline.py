"""The whole pipeline at the fixed point: a student that is its own teacher has nothing to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import RankPool
from tests.helpers.workspace import make_workspace, workspace_config


def _one_step(rank: int, folder: str, run_dir: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    from nemo_opd.assemble import assemble
    from nemo_opd.engines.megatron.parallel import destroy_student_groups
    from nemo_opd.loop import one_step, refit_generator
    from nemo_opd.processes import Processes
    from nemo_opd.reliability.stop import StopRequest

    destroy_student_groups()  # of an earlier test in this process
    config = workspace_config(Path(folder), *overrides, run_dir=Path(run_dir))
    processes = Processes.current()
    run = assemble(config, processes, StopRequest(Path(run_dir), "test", processes))
    refit_generator(run)
    report = one_step(run)
    assert report is not None
    return dict(report.metrics)


@pytest.mark.parametrize(
    "layout",
    [
        ("student.tensor_model_parallel_size=2", "teacher.pipeline_model_parallel_size=2"),
        ("student.pipeline_model_parallel_size=2", "teacher.tensor_model_parallel_size=2"),
    ],
)
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(
    ranks2: RankPool, tmp_path: Path, layout: tuple[str, ...]
):
    folder = make_workspace(tmp_path)
    overrides = (*layout, f"teacher.model={folder / 'student'}", "student.dtype=float64", "teacher.dtype=float64")
    for metrics in ranks2.run(_one_step, str(folder), str(tmp_path / "run"), overrides):
        assert metrics["tokens/trained"] > 8
        assert metrics["tokens/dropped"] == 0
        assert abs(metrics["loss/reverse_kl"]) < 1e-13
        assert metrics["optimizer/grad_norm"] < 1e-12


def test_another_teacher_gives_both(ranks2: RankPool, tmp_path: Path):
    folder = make_workspace(tmp_path)
    for metrics in ranks2.run(_one_step, str(folder), str(tmp_path / "run"), ("student.tensor_model_parallel_size=2",)):
        assert metrics["loss/reverse_kl"] > 1e-3
        assert metrics["optimizer/grad_norm"] > 1e-3
