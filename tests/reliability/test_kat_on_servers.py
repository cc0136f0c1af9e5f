"""Stop rules that read the student's distribution, with vLLM as the writer: the cuts are those of the `hf` generator,
what is cut is not written, and a segment's keys and values come from the server's cache. One real server for all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import torch

from nemo_opd.config import KatStop
from nemo_opd.engines.hf.generator import HFGenerator
from nemo_opd.engines.hf.scorer import HFScorer
from nemo_opd.engines.protocols import Generator
from nemo_opd.engines.vllm.calls import Servers
from nemo_opd.engines.vllm.generator import VLLMGenerator
from nemo_opd.processes import Processes
from nemo_opd.rollout.seeds import derive_seed
from nemo_opd.stop.build import build_stop
from nemo_opd.stop.divergence import Measure, TailDivergence
from nemo_opd.teacher.contexts import SamePrompt
from nemo_opd.types import Finish, GenerateRequest, Prompt, Rollout, Sampling
from tests.helpers.attempts import attempt
from tests.helpers.ranks import RankPool
from tests.helpers.servers import serving
from tests.helpers.workspace import make_workspace

pytestmark = pytest.mark.slow

ALONE = Processes()
SMALL = ("stop.window=2", "stop.consecutive=2", "stop.warmup_samples=8", "stop.warmup_steps=1", "stop.k=8",
         "rollout.max_new_tokens=14", "student.tensor_model_parallel_size=2",
         "teacher.pipeline_model_parallel_size=2")  # fmt: skip
KAT = ("algorithm=kat", "stop.segment_tokens=3", *SMALL)


@dataclass(frozen=True)
class Site:
    """A workspace, and a server of its student."""

    folder: Path
    url: str
    weights_dir: Path

    def tokens(self) -> dict[str, int]:
        """What the server wrote, read, and found in its cache so far."""
        return dict(httpx.get(f"{self.url}/health").json()["tokens"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = make_workspace(tmp_path_factory.mktemp("kat"), problems=40, head_dim=32)
    scratch = tmp_path_factory.mktemp("server")
    with serving(folder / "student", scratch, 1) as (url,):
        yield Site(folder, url, scratch)


@pytest.mark.parametrize(
    "overrides",
    [KAT, (*KAT, "stop.form=after"), ("stop=length_matched", *SMALL)],
    ids=["segments", "after", "length_matched"],
)
def test_the_engine_makes_no_difference(
    ranks2: RankPool, site: Site, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """With a divergence over the whole vocabulary the weights depend on the tokens alone, and so on the cuts."""
    servers = (f"rollout.servers.urls={site.url}", f"rollout.servers.weights_dir={site.weights_dir}")
    before = site.tokens()["written"]
    ours, same = ranks2.run(
        attempt, str(site.folder), str(tmp_path / "vllm"), (*overrides, "rollout.engine=vllm", *servers), 3
    )
    written = site.tokens()["written"] - before
    theirs, _ = ranks2.run(attempt, str(site.folder), str(tmp_path / "hf"), overrides, 3)
    assert all(torch.equal(ours.weights[name], tensor) for name, tensor in theirs.weights.items())
    assert ours.algorithm == same.algorithm
    [found], [expected] = ours.algorithm.values(), theirs.algorithm.values()
    assert found["lowest"] == pytest.approx(expected["lowest"], abs=1e-5)
    for step, other in zip(ours.metrics, theirs.metrics, strict=True):
        for name in ("tokens/written", "tokens/trained", "tokens/discarded", "kat/tokens_kept", "kat/trigger_rate"):
            assert step[name] == other[name], name
    assert written == ours.metrics[-1]["tokens/written_total"], "the server wrote what the run counts"
    assert ours.metrics[-1]["kat/trigger_rate"] > 0, "blind unless something is cut"


PROMPTS = [Prompt(i, 0, (), tuple(4 + (i * 5 + j * 3) % 30 for j in range(3 + i % 4))) for i in range(8)]
REQUESTS = [GenerateRequest(p, s, derive_seed(3, 0, p.index, s)) for p in PROMPTS for s in range(2)]
SLOT = KatStop(window=16, consecutive=2, warmup_samples=8, warmup_steps=1, segment_tokens=72, k=8)
LIMIT = 216


Step = tuple[list[Rollout], int, int]
"""Rollouts, tokens that the server wrote, tokens that it found in its cache."""


def two_steps(generator: Generator, measure: Measure, slot: KatStop, site: Site) -> list[Step]:
    """One without the rule and one with it, of the same requests."""
    rule, steps = build_stop(slot, SamePrompt(), ALONE, 0, measure), []
    for _ in range(2):
        before = site.tokens()
        rollouts = list(rule.writer(generator).generate(REQUESTS, Sampling(LIMIT), lambda: False))
        rollouts.sort(key=lambda rollout: (rollout.prompt.index, rollout.sample))
        cut = rule.cut(rollouts, SamePrompt().context_ids(rollouts))
        after = site.tokens()
        metrics = rule.end_step().metrics
        assert after["written"] - before["written"] in (0, metrics["kat/tokens_written"])
        steps.append((cut, after["written"] - before["written"], after["cached"] - before["cached"]))
    return steps


def test_what_is_cut_is_not_written_and_segments_continue_from_the_cache(site: Site) -> None:
    teacher = HFScorer(site.folder / "teacher")
    served = VLLMGenerator(Servers([site.url], "kat", site.weights_dir, slots=6), site.folder / "student")
    telling = Measure(TailDivergence(None, teacher, SLOT.k, ALONE), ALONE, of_writers=True)
    asked = HFGenerator(site.folder / "student", batch_size=16, eos_ids=())
    asking = Measure(TailDivergence(HFScorer(asked.model), teacher, SLOT.k, ALONE), ALONE)
    segments = two_steps(served.telling(SLOT.k), telling, SLOT, site)
    after = two_steps(served.telling(SLOT.k), telling, replace(SLOT, form="after"), site)
    expected = two_steps(asked, asking, SLOT, site)
    for ours, whole, theirs in zip(segments, after, expected, strict=True):
        for a, b, c in zip(ours[0], whole[0], theirs[0], strict=True):
            assert a.finish is b.finish is c.finish
            assert torch.equal(a.response_ids, b.response_ids) and torch.equal(a.response_ids, c.response_ids)
            assert a.best is None
    everything = len(REQUESTS) * LIMIT
    assert [step[1] for step in after] == [everything, everything]
    assert segments[0][1:] == (everything, 0), "not active yet: one round"
    rollouts, written, cached = segments[1]
    assert {rollout.finish for rollout in rollouts} == {Finish.LENGTH, Finish.STOPPED}, "blind unless both occur"
    assert written < 0.9 * everything
    third_rounds = sum(rollout.finish is Finish.LENGTH for rollout in rollouts)
    assert cached >= 128 * third_rounds, "a block of the CPU's cache has 128 positions; two segments fill one"
    served.close()
