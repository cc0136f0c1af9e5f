"""Stop rules in whole runs: what they cut is not trained on, and a resumed run goes on as an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.attempts import attempt
from tests.helpers.ranks import RankPool
from tests.helpers.workspace import make_workspace

SMALL = ("stop.window=2", "stop.consecutive=2", "stop.warmup_samples=8", "stop.warmup_steps=1", "stop.k=8",
         "rollout.max_new_tokens=14")  # fmt: skip
KAT = ("algorithm=kat", "stop.segment_tokens=3", *SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("stop_rules"), problems=40)


@pytest.mark.parametrize(
    "overrides",
    [KAT, (*KAT, "stop.form=after", "stop.divergence=full", "loss=policy_gradient"), ("stop=length_matched", *SMALL)],
    ids=["segments", "after", "length_matched"],
)
def test_a_resumed_run_equals_an_undisturbed_one(
    ranks1: RankPool, folder: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    [whole] = ranks1.run(attempt, str(folder), str(tmp_path / "whole"), overrides, 4)
    [first] = ranks1.run(attempt, str(folder), str(tmp_path / "parts"), overrides, 2)
    [second] = ranks1.run(attempt, str(folder), str(tmp_path / "parts"), overrides, 2)
    assert all(torch.equal(second.weights[name], tensor) for name, tensor in whole.weights.items())
    assert second.algorithm == whole.algorithm
    [state] = whole.algorithm.values()
    assert state["steps"] == 4 and len(state["lowest"]) > 8
    for name in ("kat/threshold", "kat/trigger_rate", "tokens/trained_total", "tokens/discarded_total"):
        assert [m.get(name) for m in (*first.metrics, *second.metrics)] == [m.get(name) for m in whole.metrics]
    last = whole.metrics[-1]
    assert "kat/threshold" not in whole.metrics[0] and last["kat/trigger_rate"] > 0, "blind unless something is cut"
    assert last["tokens/written"] == last["tokens/trained"] + last["tokens/discarded"]
    assert last["tokens/discarded"] > 0
    if overrides[0] == "stop=length_matched":
        assert abs(last["kat/excess"]) <= 0.02
    else:
        assert last["tokens/trained"] == last["kat/tokens_kept"]


def test_both_forms_train_on_the_same_tokens(ranks1: RankPool, folder: Path, tmp_path: Path) -> None:
    [segments] = ranks1.run(attempt, str(folder), str(tmp_path / "segments"), KAT, 3)
    [after] = ranks1.run(attempt, str(folder), str(tmp_path / "after"), (*KAT, "stop.form=after"), 3)
    for ours, theirs in zip(segments.metrics, after.metrics, strict=True):
        for name in ("tokens/trained", "kat/tokens_kept", "kat/trigger_rate"):
            assert ours[name] == theirs[name]
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-4)
    assert segments.metrics[-1]["tokens/written"] < after.metrics[-1]["tokens/written"]


def test_any_layout_cuts_alike(ranks1: RankPool, ranks2: RankPool, folder: Path, tmp_path: Path) -> None:
    """Both ranks write, the teacher's stages lie on both, and each works out the divergence of some rollouts."""
    layout = ("student.tensor_model_parallel_size=2", "teacher.pipeline_model_parallel_size=2")
    [alone] = ranks1.run(attempt, str(folder), str(tmp_path / "alone"), KAT, 2)
    first, second = ranks2.run(attempt, str(folder), str(tmp_path / "two"), (*KAT, *layout), 2)
    assert first.algorithm == second.algorithm
    for ours, theirs, other in zip(alone.metrics, first.metrics, second.metrics, strict=True):
        kat = [name for name in ours if name.startswith("kat/")]
        assert [theirs[name] for name in kat] == [other[name] for name in kat]
        assert [theirs[name] for name in kat] == pytest.approx([ours[name] for name in kat], abs=1e-4)
        assert theirs["loss/total"] == pytest.approx(ours["loss/total"], rel=1e-4)
    assert first.metrics[-1]["kat/trigger_rate"] > 0


def test_a_fixed_length(ranks1: RankPool, folder: Path, tmp_path: Path) -> None:
    [run] = ranks1.run(attempt, str(folder), str(tmp_path / "fixed"), ("stop=fixed", "stop.length=5"), 1)
    [metrics] = run.metrics
    assert metrics["response/length_max"] == 5
    assert metrics["tokens/trained"] == metrics["tokens/written"] <= 8 * 5
    assert metrics["stop/cut_share"] > 0
    assert run.algorithm == {}
