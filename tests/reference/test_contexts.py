"""Teacher contexts in the whole pipeline: what is scored, what is masked and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.ranks import RankPool
from tests.helpers.workspace import make_workspace, workspace_config


def _one_step(rank: int, folder: str, overrides: tuple[str, ...]) -> dict[str, float]:
    import tempfile

    from nemo_opd.assemble import assemble
    from nemo_opd.engines.megatron.parallel import destroy_student_groups
    from nemo_opd.loop import one_step, refit_generator
    from nemo_opd.processes import Processes
    from nemo_opd.reliability.stop import StopRequest

    destroy_student_groups()  # of an earlier step in this process
    with tempfile.TemporaryDirectory() as run_dir:
        config = workspace_config(Path(folder), *overrides, run_dir=Path(run_dir))
        processes = Processes.current()
        run = assemble(config, processes, StopRequest(Path(run_dir), "test", processes))
        refit_generator(run)
        report = one_step(run)
        assert report is not None
        return dict(report.metrics)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace; every second problem has a hint. Its untrained student answers everything wrong."""
    folder = make_workspace(tmp_path_factory.mktemp("contexts"), problems=8)
    path = folder / "train.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records[::2]:
        record["hint"] = f"it is {record['answer']}"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def step(ranks1: RankPool, folder: Path, *overrides: str) -> dict[str, float]:
    """One step in float64 in which the teacher has the student's weights: its context alone makes a difference."""
    settings = ("train.prompts_per_step=8", "student.dtype=float64", "teacher.dtype=float64", "verify.name=integer")
    [metrics] = ranks1.run(_one_step, str(folder), (*settings, f"teacher.model={folder / 'student'}", *overrides))
    assert metrics["tokens/dropped"] == 0
    return metrics


PEERS = ("context=peers", "context.max_tokens=128")
HINT = ("context=privileged", "context.field=hint", "context.max_tokens=64")


@pytest.mark.parametrize("loss", [(), ("loss=k2",), ("loss=tail", "loss.teacher=scores", "loss.support=teacher")])
def test_without_any_usable_peer_nothing_is_learnt_and_all_is_counted(
    ranks1: RankPool, folder: Path, loss: tuple[str, ...]
) -> None:
    metrics = step(ranks1, folder, *PEERS, "context.variant=successes", *loss)
    assert metrics["tokens/trained"] == 0
    assert metrics["tokens/without_context"] == metrics["tokens/written"] > 16
    assert metrics["loss/total"] == 0
    assert metrics["optimizer/grad_norm"] == 0


def test_the_fallback_is_the_students_own_prompt(ranks1: RankPool, folder: Path) -> None:
    """Aligned by response offset: the same model on the same prompt agrees with itself at every token."""
    metrics = step(ranks1, folder, *PEERS, "context.variant=successes", "context.fallback=plain_prompt")
    assert metrics["tokens/without_context"] == 0
    assert metrics["tokens/trained"] == metrics["tokens/written"]
    assert abs(metrics["loss/total"]) < 1e-13
    assert metrics["optimizer/grad_norm"] < 1e-12


def test_a_failed_peer_changes_what_the_teacher_says(ranks1: RankPool, folder: Path) -> None:
    metrics = step(ranks1, folder, *PEERS)
    assert metrics["tokens/without_context"] == 0
    assert metrics["loss/total"] > 1e-4


def test_half_of_the_records_privileged(ranks1: RankPool, folder: Path) -> None:
    """The loss is the mean over tokens with a signal, and does not depend on how rows mix them with the others."""
    metrics = step(ranks1, folder, *HINT)
    assert metrics["tokens/trained"] + metrics["tokens/without_context"] == metrics["tokens/written"]
    assert min(metrics["tokens/trained"], metrics["tokens/without_context"]) > 16
    apart = step(ranks1, folder, *HINT, "train.packing=false")
    both = step(ranks1, folder, *HINT, "context.fallback=plain_prompt")
    share = metrics["tokens/trained"] / metrics["tokens/written"]
    assert metrics["loss/total"] > 1e-4
    assert apart["loss/total"] == pytest.approx(metrics["loss/total"], rel=1e-12)
    assert apart["optimizer/grad_norm"] == pytest.approx(metrics["optimizer/grad_norm"], rel=1e-9)
    assert both["loss/total"] == pytest.approx(share * metrics["loss/total"], rel=1e-9)
    assert both["optimizer/grad_norm"] == pytest.approx(
        share * metrics["optimizer/grad_norm"], rel=1e-6
    )  # fp32 buffers
