"""The whole pipeline at the fixed point: a student that is its own teacher has nothing to learn."""

from __future__ import annotations

import json
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
        (
            *("student.pipeline_model_parallel_size=2", "student.virtual_pipeline_model_parallel_size=2"),
            "teacher.tensor_model_parallel_size=2",
        ),
    ],
)
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(
    ranks2: RankPool, tmp_path: Path, layout: tuple[str, ...]
):
    folder = make_workspace(tmp_path)
    models = (f"{who}.model={folder / 'teacher'}" for who in ("student", "teacher"))
    overrides = (*layout, *models, "student.dtype=float64", "teacher.dtype=float64")
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


TIMES = ("time/", "speed/", "straggler/")
"""Beginnings of the names of what is not the same twice; a run of one rank has no stragglers."""
LAYOUTS = {
    "tp2": ("student.tensor_model_parallel_size=2", "teacher.pipeline_model_parallel_size=2"),
    "pp2": ("student.pipeline_model_parallel_size=2", "teacher.tensor_model_parallel_size=2"),
    "cp2": ("student.context_parallel_size=2", "teacher.context_parallel_size=2"),
    "dp2": (),
}


@pytest.mark.parametrize("loss", ["reverse_kl", "tail"])
def test_measurements_do_not_depend_on_the_layout(ranks1: RankPool, ranks2: RankPool, tmp_path: Path, loss: str):
    """Neither the metrics, nor what is written down of single tokens."""
    folder = make_workspace(tmp_path)
    overrides = (
        *("student.dtype=float64", "teacher.dtype=float64", f"loss={loss}", "rollout.max_new_tokens=24"),
        *("verify.name=integer", "observe.rollouts_per_step=8"),
    )
    (expected,) = ranks1.run(_one_step, str(folder), str(tmp_path / "one"), overrides)
    written = _rollouts(tmp_path / "one")
    for name in ("train/teacher_logprob_from_16", "train/importance_out_of_bounds", "response/repeated_3grams"):
        assert name in expected
    assert ("train/top_overlap" in expected) == (loss == "tail")
    for layout, settings in LAYOUTS.items():
        for metrics in ranks2.run(_one_step, str(folder), str(tmp_path / layout), (*overrides, *settings)):
            names = {name for name in metrics if not name.startswith(TIMES)}
            assert names == {name for name in expected if not name.startswith(TIMES)}
            for name in names:
                assert metrics[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-9), (layout, name)
        for ours, theirs in zip(_rollouts(tmp_path / layout), written, strict=True):
            assert ours["tokens"].keys() == theirs["tokens"].keys()
            for name, values in theirs["tokens"].items():
                expected_values = values if name in ("text", "author") else pytest.approx(values, rel=2e-3, abs=1e-9)
                assert ours["tokens"][name] == expected_values, (layout, name)
    trained = [kl for line in written for kl in line["tokens"]["kl"] if kl is not None]
    assert len(trained) == expected["tokens/trained"]
    assert sum(trained) / len(trained) == pytest.approx(expected["train/kl"], rel=1e-3)


def _rollouts(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "rollouts" / "step-00000001.jsonl").read_text().splitlines()]
