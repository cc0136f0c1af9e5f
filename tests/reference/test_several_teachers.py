"""Whole steps under several teachers of different sizes and layouts, against steps under each of them alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_opd.tasks.models import ModelShape, write_random_model
from tests.helpers.ranks import RankPool
from tests.helpers.workspace import make_workspace, workspace_config

STUDENT = ("student.tensor_model_parallel_size=2", "student.dtype=float64")
NO_OTHER = ("teacher.model=null", "teacher.dtype=bfloat16")
"""What the workspace says of `teacher`, taken back."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records say who teaches them: math, code or nobody in turn. A second teacher is narrower than the first."""
    folder = make_workspace(tmp_path_factory.mktemp("several"))
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line["task"] = ("math", "code", "unknown")[number % 3]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shape = ModelShape(hidden_size=24, layers=2, heads=4, kv_heads=2, ffn=32)
    write_random_model(folder / "narrow", folder / "tokenizer", shape=shape, seed=9)
    return folder


def _teacher(folder: Path, name: str, model: str, *settings: str) -> tuple[str, ...]:
    fixed = (f"model={folder / model}", "dtype=float64", *settings)
    return tuple(f"teachers.{name}.{setting}" for setting in fixed)


def _steps(rank: int, folder: str, runs: list[tuple[str, tuple[str, ...]]]) -> list[tuple[float, float, float, float]]:
    """(loss, trained tokens, tokens without a teacher, gradient norm) of the first step of each run."""
    from nemo_opd.assemble import assemble
    from nemo_opd.engines.megatron.parallel import destroy_student_groups
    from nemo_opd.loop import one_step, refit_generator
    from nemo_opd.processes import Processes
    from nemo_opd.reliability.stop import StopRequest

    found = []
    for run_dir, overrides in runs:
        destroy_student_groups()
        config = workspace_config(Path(folder), *STUDENT, *NO_OTHER, *overrides, run_dir=Path(run_dir))
        processes = Processes.current()
        run = assemble(config, processes, StopRequest(Path(run_dir), "test", processes))
        refit_generator(run)
        report = one_step(run)
        assert report is not None
        names = ("loss/total", "tokens/trained", "tokens/without_context", "optimizer/grad_norm")
        found.append(tuple(report.metrics[name] for name in names))
    return found


def test_routed_each_rollout_meets_its_own_teacher(ranks2: RankPool, workspace: Path, tmp_path: Path) -> None:
    """Two teachers of different widths and layouts: the sum over tokens is that of each teacher's own share."""
    math = _teacher(workspace, "math", "teacher", "tensor_model_parallel_size=2")
    code = _teacher(workspace, "code", "narrow", "pipeline_model_parallel_size=2")
    key = ("data.teacher_key=task", "train.prompts_per_step=9")
    overrides = {"both": (*math, *code, *key), "math": (*math, *key), "code": (*code, *key)}
    runs = [(str(tmp_path / name), words) for name, words in overrides.items()]
    for both, alone_math, alone_code in ranks2.run(_steps, str(workspace), runs):
        assert both[1] == alone_math[1] + alone_code[1] and min(alone_math[1], alone_code[1]) > 5
        assert both[0] * both[1] == pytest.approx(alone_math[0] * alone_math[1] + alone_code[0] * alone_code[1])
        assert alone_math[0] != pytest.approx(alone_code[0], rel=0.05)
        assert both[2] > 0, "records of nobody are counted"
        assert alone_math[2] == both[2] + alone_code[1] and alone_code[2] == both[2] + alone_math[1]


@pytest.mark.parametrize("loss", ["reverse_kl", "policy_gradient"])
def test_a_mixture_of_one_teacher_is_that_teacher(ranks2: RankPool, workspace: Path, tmp_path: Path, loss: str) -> None:
    one = _teacher(workspace, "one", "teacher", "tensor_model_parallel_size=2")
    twice = (*one, *_teacher(workspace, "again", "teacher", "engine=hf"), "teachers.one.weight=3")
    other = (*one, *_teacher(workspace, "again", "narrow"), "teachers.one.weight=3")
    runs = [(str(tmp_path / str(n)), (*words, f"loss={loss}")) for n, words in enumerate((one, twice, other))]
    for alone, doubled, mixed in ranks2.run(_steps, str(workspace), runs):
        tolerance = 1e-6 if loss == "reverse_kl" else 1e-4  # transformers turns in fp32; served scores are fp32
        assert doubled == pytest.approx(alone, rel=tolerance)
        assert mixed[1] == alone[1] and mixed[3] != pytest.approx(alone[3], rel=1e-3)
