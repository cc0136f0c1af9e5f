"""The student as its own teacher: what the fixed point says, what an average remembers, what a resume restores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import RankPool
from tests.helpers.workspace import make_workspace, workspace_config

SELF = ("teacher.model=null", "train.steps=20", "student.tensor_model_parallel_size=2")
INTERLEAVED = (
    *("student.tensor_model_parallel_size=1", "student.pipeline_model_parallel_size=2"),
    *("student.virtual_pipeline_model_parallel_size=2", "student.model={folder}/teacher"),  # a model of four layers
)
RULE = ("context=privileged", "context.text=answer in base 4.", "context.max_tokens=32", "data.max_prompt_tokens=64")
"""A teacher that reads more than the student: otherwise a self teacher has nothing to say."""


def _assemble(folder: str, run_dir: str, overrides: tuple[str, ...]) -> Any:
    from nemo_opd.assemble import assemble
    from nemo_opd.engines.megatron.parallel import destroy_student_groups
    from nemo_opd.loop import refit_generator
    from nemo_opd.processes import Processes
    from nemo_opd.reliability.stop import StopRequest

    destroy_student_groups()  # of an earlier test in this process
    words = (word.format(folder=folder) for word in overrides)
    config = workspace_config(Path(folder), *SELF, *words, run_dir=Path(run_dir))
    processes = Processes.current()
    run = assemble(config, processes, StopRequest(Path(run_dir), "test", processes))
    refit_generator(run)
    return run


def _teacher(run: Any) -> dict[str, Tensor]:
    """The teacher's weights, whole."""
    from nemo_opd.engines.megatron.weights import export_hf_weights

    weights = export_hf_weights(run.scorer._model, run.trainer.architecture)
    return {name: tensor.detach().clone() for name, tensor in weights}


def _student(run: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in run.trainer.export_weights()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("self"))


def _fixed_point(rank: int, folder: str, run_dir: str, overrides: tuple[str, ...]) -> list[tuple[float, float]]:
    from nemo_opd.loop import one_step

    run, found = _assemble(folder, run_dir, overrides), []
    for _ in range(2):
        report = one_step(run)
        assert report is not None and report.metrics["tokens/trained"] > 8 and report.metrics["tokens/dropped"] == 0
        found.append((abs(report.metrics["loss/reverse_kl"]), report.metrics["optimizer/grad_norm"]))
    return found


@pytest.mark.parametrize(
    "layout",
    [
        (),
        ("student.tensor_model_parallel_size=1", "student.pipeline_model_parallel_size=2"),
        ("student.tensor_model_parallel_size=1", "student.context_parallel_size=2"),
        INTERLEAVED,
    ],
)
def test_the_current_student_agrees_with_itself(
    ranks2: RankPool, workspace: Path, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    overrides = ("teacher.source=current", "student.dtype=float64", "optimizer.weight_decay=0.1", *layout)
    for steps in ranks2.run(_fixed_point, str(workspace), str(tmp_path), overrides):
        for loss, gradient in steps:  # the second one after an update (weight decay): the teacher moved along
            assert loss < 1e-13 and gradient < 1e-12


def _average(rank: int, folder: str, run_dir: str, overrides: tuple[str, ...]) -> dict[str, bool | float]:
    """2 steps; and one, a checkpoint, a fresh start and one more. How far the teacher is from a loop by hand."""
    from nemo_opd.loop import one_step, save

    run = _assemble(folder, f"{run_dir}/whole", overrides)
    hand = {name: tensor.double() for name, tensor in _student(run).items()}
    start, error = dict(hand), 0.0
    for _ in range(2):
        assert one_step(run) is not None
        for name, theirs in _student(run).items():
            hand[name] = 0.8 * hand[name] + 0.2 * theirs.double()
        teacher = _teacher(run)
        error = max(error, *(float((teacher[name].double() - hand[name]).abs().max()) for name in hand))
    expected = _student(run), teacher
    for attempt in range(2):
        run = _assemble(folder, f"{run_dir}/halves", overrides)
        assert run.started_at == attempt
        assert one_step(run) is not None
        save(run)
    moved = max(float((hand[name] - start[name]).abs().max()) for name in hand)
    return {
        "student": _same(_student(run), expected[0]),
        "teacher": _same(_teacher(run), expected[1]),
        "error": error,
        "moved": moved,
    }


@pytest.mark.parametrize(
    ("dtype", "tolerance", "layout"), [("float64", 1e-14, ()), ("bfloat16", 5e-3, ()), ("float64", 1e-14, INTERLEAVED)]
)
def test_a_resumed_average_goes_on_bit_for_bit(
    ranks2: RankPool, workspace: Path, tmp_path: Path, dtype: str, tolerance: float, layout: tuple[str, ...]
) -> None:
    """In bfloat16 it is the fp32 average that must be restored: what is shown of it is rounded."""
    overrides = ("teacher.source=ema", "teacher.decay=0.8", f"student.dtype={dtype}", "optimizer.lr=1e-2", *RULE)
    overrides += layout
    for answer in ranks2.run(_average, str(workspace), str(tmp_path), overrides):
        assert answer["student"] and answer["teacher"]
        assert answer["error"] < tolerance < answer["moved"]


def _reshard(rank: int, folder: str, run_dir: str, overrides: tuple[str, ...], other: tuple[str, ...]) -> bool:
    from nemo_opd.loop import one_step, save

    run = _assemble(folder, run_dir, overrides)
    assert one_step(run) is not None
    save(run)
    expected = _teacher(run)
    assert not _same(expected, _student(run))
    return _same(_teacher(_assemble(folder, run_dir, (*overrides, *other))), expected)


@pytest.mark.parametrize(
    "other", [("student.tensor_model_parallel_size=1", "student.pipeline_model_parallel_size=2"), INTERLEAVED]
)
def test_an_average_is_read_back_under_another_layout(
    ranks2: RankPool, workspace: Path, tmp_path: Path, other: tuple[str, ...]
) -> None:
    overrides = ("teacher.source=ema", "student.dtype=float32", "student.model={folder}/teacher", *RULE)
    assert all(ranks2.run(_reshard, str(workspace), str(tmp_path), overrides, other))


def _frozen(rank: int, folder: str, run_dir: str) -> tuple[bool, str, str]:
    """Is the teacher of a resumed run the student as it was at the start? And what is said when that was changed, or
    when the run is to go on with an average that it does not have."""
    import torch.distributed as dist

    from nemo_opd.loop import one_step, save
    from nemo_opd.tasks.models import ModelShape, write_random_model

    overrides = ("teacher.source=frozen", *RULE)
    run = _assemble(folder, run_dir, overrides)
    start = _student(run)
    assert one_step(run) is not None
    save(run)
    run = _assemble(folder, run_dir, overrides)
    kept = _same(_teacher(run), start) and not _same(_student(run), start) and run.state.step == 1
    if rank == 0:
        shape = ModelShape(hidden_size=32, layers=2, heads=4, kv_heads=2, ffn=64)
        write_random_model(Path(folder) / "student", Path(folder) / "tokenizer", shape=shape, seed=5)
    dist.barrier()
    changed = _refusal(folder, run_dir, overrides)
    return kept, changed, _refusal(folder, run_dir, ("teacher.source=ema", "run.accept_changes=true", *RULE))


def _refusal(folder: str, run_dir: str, overrides: tuple[str, ...]) -> str:
    from nemo_opd.errors import ConfigError

    try:
        _assemble(folder, run_dir, overrides)
    except ConfigError as refused:
        return str(refused)
    return ""


def test_a_frozen_teacher_is_the_start_or_nothing(ranks2: RankPool, tmp_path: Path) -> None:
    folder = make_workspace(tmp_path / "own")
    for kept, changed, no_average in ranks2.run(_frozen, str(folder), str(tmp_path / "run")):
        assert kept
        assert "with other weights than at the start" in changed and "new run folder" in changed
        assert "teacher.source: got ema, and no average in" in no_average


def _scores(rank: int, folder: str, run_dir: str) -> float:
    """A step whose loss needs scores, not hidden states: with policy_gradient the advantage is 0 at the fixed point."""
    from nemo_opd.loop import one_step

    run = _assemble(folder, run_dir, ("teacher.source=current", "student.dtype=float64", "loss=policy_gradient"))
    report = one_step(run)
    assert report is not None and report.metrics["tokens/trained"] > 8
    return float(report.metrics["optimizer/grad_norm"])


def test_a_self_teacher_serves_scores_too(ranks2: RankPool, workspace: Path, tmp_path: Path) -> None:
    for gradient in ranks2.run(_scores, str(workspace), str(tmp_path)):
        assert gradient < 1e-3, "served scores are fp32"
