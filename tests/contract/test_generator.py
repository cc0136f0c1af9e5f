"""The contract of `Generator`, run on every engine that can be had here.

An engine joins by adding a maker to `ENGINES`: a function from a checkpoint folder and the batch size to a generator
that already generates with the folder's weights. Tolerances are for float32; nothing here looks inside an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemo_opd.engines.hf.generator import HFGenerator
from nemo_opd.engines.protocols import Generator
from nemo_opd.engines.vllm.calls import Servers
from nemo_opd.engines.vllm.client import ServerRefused
from nemo_opd.engines.vllm.generator import VLLMGenerator
from nemo_opd.rollout.seeds import derive_seed
from nemo_opd.types import Author, Finish, GenerateRequest, Prompt, Rollout, Sampling
from tests.helpers.servers import serving
from tests.helpers.tiny import tiny_checkpoint

EOS = 1
GeneratorMaker = Callable[[Path, int], Generator]


def _hf(folder: Path, batch_size: int) -> Generator:
    return HFGenerator(folder, batch_size=batch_size, eos_ids=(EOS,))


ENGINES: dict[str, GeneratorMaker] = {"hf": _hf}
SIZES: dict[str, Any] = {"vocab_size": 40, "head_dim": 32}
"""vLLM's attention on CPU knows no narrower heads."""


@pytest.fixture(params=["hf", "vllm"])
def make(request: pytest.FixtureRequest) -> GeneratorMaker:
    if request.param == "vllm":
        return cast(GeneratorMaker, request.getfixturevalue("vllm_maker"))
    return ENGINES[request.param]


@pytest.fixture(scope="module")
def vllm_maker(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GeneratorMaker]:
    """One server for all tests: who attaches gets it back with the weights of its own folder."""
    scratch = tmp_path_factory.mktemp("vllm")
    with serving(folder, scratch, 1) as (url,):
        made: list[VLLMGenerator] = []

        def make(other: Path, batch_size: int) -> Generator:
            servers = Servers([url], f"session {len(made)}", scratch, slots=batch_size)
            made.append(VLLMGenerator(servers, folder, eos_ids=(EOS,)))
            if other != folder:
                made[-1].load_weights(load_file(other / "model.safetensors").items(), version=0)
            return made[-1]

        yield make
        for generator in made:
            generator.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("student"), **SIZES)


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    other = tiny_checkpoint(tmp_path_factory.mktemp("other"), seed=1, **SIZES)
    return load_file(other / "model.safetensors")


def prompts(count: int) -> list[Prompt]:
    """Prompts of different lengths."""
    draws = torch.Generator().manual_seed(5)
    lengths = [3 + index % 6 for index in range(count)]
    rows = [torch.randint(2, 40, (length,), generator=draws).tolist() for length in lengths]
    return [Prompt(index, 0, (), tuple(row)) for index, row in enumerate(rows)]


def requests_for(some: Sequence[Prompt], samples: int, **more: object) -> list[GenerateRequest]:
    return [
        GenerateRequest(prompt, sample, derive_seed(7, prompt.epoch, prompt.index, sample), **more)  # type: ignore[arg-type]
        for prompt in some
        for sample in range(samples)
    ]


def never() -> bool:
    return False


def by_key(rollouts: Iterator[Rollout] | list[Rollout]) -> dict[tuple[int, int], Rollout]:
    found = {(rollout.prompt.index, rollout.sample): rollout for rollout in rollouts}
    return found


def test_is_a_generator(make: GeneratorMaker, folder: Path) -> None:
    generator = make(folder, 4)
    assert isinstance(generator, Generator)
    assert generator.version == -1


def test_every_request_is_answered_once_with_well_formed_rollouts(make: GeneratorMaker, folder: Path) -> None:
    requests = requests_for(prompts(7), samples=3)
    rollouts = list(make(folder, 8).generate(requests, Sampling(12), never))
    assert len(rollouts) == len(requests) == len(by_key(rollouts))
    finishes = set()
    for rollout in rollouts:
        length = rollout.response_ids.shape[0]
        assert 1 <= length <= 12
        shapes = {"response_ids": torch.int64, "sampler_logprobs": torch.float32, "author": torch.int8}
        shapes |= {"policy_version": torch.int64, "loss_mask": torch.bool}
        for name, dtype in shapes.items():
            tensor = getattr(rollout, name)
            assert (tensor.shape, tensor.dtype, tensor.device.type) == ((length,), dtype, "cpu"), name
            assert not tensor.is_inference(), "an inference tensor cannot take part in a loss"
        assert bool(rollout.loss_mask.all())
        assert bool((rollout.author == Author.STUDENT).all())
        assert bool((rollout.sampler_logprobs <= 0).all())
        finishes.add(rollout.finish)
    assert finishes == {Finish.EOS, Finish.LENGTH}, "the test is blind unless both ends occur"


def test_eos_ends_a_response_and_belongs_to_it(make: GeneratorMaker, folder: Path) -> None:
    """In the checkpoint's configuration pad is another id; that EOS is kept must not depend on it."""
    ended = 0
    for rollout in make(folder, 16).generate(requests_for(prompts(16), 2), Sampling(16), never):
        ids = rollout.response_ids.tolist()
        assert EOS not in ids[:-1]
        if rollout.finish is Finish.EOS:
            assert ids[-1] == EOS
            assert bool(rollout.loss_mask[-1])
            ended += 1
        else:
            assert rollout.finish is Finish.LENGTH
            assert len(ids) == 16
            assert ids[-1] != EOS
    assert ended > 0


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(12),
        Sampling(12, temperature=0.7),
        Sampling(12, top_k=5),
        Sampling(12, 1.3, 0.8),
        Sampling(12, greedy=True),
    ],
    ids=["plain", "temperature", "top_k", "temperature_top_p", "greedy"],
)
def test_tokens_do_not_depend_on_batch_or_order(make: GeneratorMaker, folder: Path, sampling: Sampling) -> None:
    requests = requests_for(prompts(8), samples=2)
    together = by_key(make(folder, 16).generate(requests, sampling, never))
    few_slots = by_key(make(folder, 3).generate(list(reversed(requests)), sampling, never))
    one = make(folder, 1)
    alone = by_key([rollout for request in requests[::5] for rollout in one.generate([request], sampling, never)])
    assert len(few_slots) == len(together)
    for other in (few_slots, alone):
        for key, rollout in other.items():
            assert rollout.response_ids.tolist() == together[key].response_ids.tolist()
            torch.testing.assert_close(rollout.sampler_logprobs, together[key].sampler_logprobs, rtol=0, atol=2e-5)


def test_samples_differ_and_seeds_repeat(make: GeneratorMaker, folder: Path) -> None:
    requests = requests_for(prompts(2), samples=8)
    generator = make(folder, 16)
    first, second = (by_key(generator.generate(requests, Sampling(12), never)) for _ in range(2))
    assert len({tuple(first[0, sample].response_ids.tolist()) for sample in range(8)}) >= 7
    assert all(first[key].response_ids.tolist() == second[key].response_ids.tolist() for key in first)


def processed_reference(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities [vocab] after temperature, top-k, top-p, by plain Python over sorted ids."""
    scaled = (logits / sampling.temperature).double()
    order = sorted(range(len(scaled)), key=lambda v: -float(scaled[v]))
    kept = order[: sampling.top_k] if sampling.top_k else order
    probability = torch.softmax(scaled[kept], dim=0).tolist()
    total, count = 0.0, 0
    while count < len(kept) and total < sampling.top_p:
        total += probability[count]
        count += 1
    out = torch.full_like(scaled, float("-inf"))
    out[kept[:count]] = torch.log_softmax(scaled[kept[:count]], dim=0)
    return out


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(10),
        Sampling(10, temperature=0.6),
        Sampling(10, top_k=4),
        Sampling(10, top_p=0.7),
        Sampling(10, 1.4, 0.9, 12),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "all"],
)
def test_sampler_logprobs_are_those_of_a_full_forward(make: GeneratorMaker, folder: Path, sampling: Sampling) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for rollout in make(folder, 8).generate(requests_for(prompts(8), 1), sampling, never):
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids.tolist()]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
        for offset, token in enumerate(rollout.response_ids.tolist()):
            expected = float(processed_reference(logits[offset], sampling)[token])
            assert float(rollout.sampler_logprobs[offset]) == pytest.approx(expected, abs=2e-5)


def test_greedy_takes_the_most_probable_token_and_reports_the_plain_distribution(
    make: GeneratorMaker, folder: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    sampling = Sampling(10, temperature=0.1, top_p=0.1, greedy=True)  # the filters do not matter to greedy
    for rollout in make(folder, 8).generate(requests_for(prompts(8), 1), sampling, never):
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids.tolist()]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1].log_softmax(-1)
        assert rollout.response_ids.tolist() == logprobs.argmax(-1).tolist()
        torch.testing.assert_close(rollout.sampler_logprobs, logprobs.max(-1).values, rtol=0, atol=2e-5)


def test_first_tokens_follow_the_models_distribution(make: GeneratorMaker, folder: Path) -> None:
    """Chi-square of 4,000 first tokens; the seeds are fixed, so the outcome is too. 99.9 % point by Wilson-Hilferty."""
    prompt = prompts(1)[0]
    rollouts = list(make(folder, 500).generate(requests_for([prompt], 4000), Sampling(1, temperature=1.5), never))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        expected = (model(torch.tensor([prompt.token_ids])).logits[0, -1] / 1.5).softmax(-1) * len(rollouts)
    counts = torch.bincount(torch.tensor([int(r.response_ids[0]) for r in rollouts]), minlength=40).double()
    rare = expected < 5
    observed, wanted = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    statistic, freedom = float(((observed - wanted) ** 2 / wanted.clamp_min(1e-9)).sum()), len(wanted) - 1
    assert freedom >= 5
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_a_prefix_is_continued_with_the_tokens_of_one_call(make: GeneratorMaker, folder: Path) -> None:
    generator = make(folder, 8)
    requests = requests_for(prompts(6), 1)
    whole = by_key(generator.generate(requests, Sampling(12), never))
    cut = {key: min(4, len(r.response_ids) - 1) for key, r in whole.items()}
    continued = [
        GenerateRequest(r.prompt, r.sample, r.seed, tuple(whole[key].response_ids[: cut[key]].tolist()), Author.TEACHER)
        for r in requests
        for key in [(r.prompt.index, r.sample)]
    ]
    for key, rollout in by_key(generator.generate(continued, Sampling(12), never)).items():
        n = cut[key]
        assert rollout.response_ids.tolist() == whole[key].response_ids.tolist()
        assert rollout.finish is whole[key].finish
        assert bool((rollout.author[:n] == Author.TEACHER).all())
        assert bool((rollout.author[n:] == Author.STUDENT).all())
        assert bool(rollout.sampler_logprobs[:n].isnan().all())
        assert bool((rollout.policy_version[:n] == -1).all())
        assert bool(rollout.loss_mask.all())
        torch.testing.assert_close(rollout.sampler_logprobs[n:], whole[key].sampler_logprobs[n:], rtol=0, atol=2e-5)


def test_a_finished_prefix_comes_back_as_it_is(make: GeneratorMaker, folder: Path) -> None:
    prompt = prompts(1)[0]
    full = GenerateRequest(prompt, 0, 1, tuple(range(2, 14)))
    ended = GenerateRequest(prompt, 1, 2, (5, EOS))
    answers = by_key(make(folder, 4).generate([full, ended], Sampling(12), never))
    assert answers[0, 0].response_ids.tolist() == list(range(2, 14))
    assert answers[0, 0].finish is Finish.LENGTH
    assert answers[0, 1].response_ids.tolist() == [5, EOS]
    assert answers[0, 1].finish is Finish.EOS
    assert all(bool(answer.sampler_logprobs.isnan().all()) for answer in answers.values())


def test_a_request_may_end_before_the_others(make: GeneratorMaker, folder: Path) -> None:
    generator, sampling = make(folder, 3), Sampling(12)
    free = by_key(generator.generate(requests_for(prompts(6), 1), sampling, never))
    limits = {(index, 0): limit for index, limit in enumerate((1, 5, 12, 99, 3, 7))}
    asked = [replace(r, max_new_tokens=limits[r.prompt.index, r.sample]) for r in requests_for(prompts(6), 1)]
    for key, rollout in by_key(generator.generate(asked, sampling, never)).items():
        assert rollout.response_ids.tolist() == free[key].response_ids[: limits[key]].tolist()
        assert (rollout.finish is Finish.EOS) == (int(rollout.response_ids[-1]) == EOS)


def test_no_requests_no_rollouts(make: GeneratorMaker, folder: Path) -> None:
    assert list(make(folder, 4).generate([], Sampling(4), never)) == []


def test_a_stop_request_interrupts(make: GeneratorMaker, folder: Path) -> None:
    """Stopping after the first rollout leaves the longer ones unfinished, and the generator usable."""
    generator = make(folder, 32)
    requests = requests_for(prompts(16), 2)
    seen: list[Rollout] = []
    for rollout in generator.generate(requests, Sampling(64), lambda: bool(seen)):
        seen.append(rollout)
    assert 0 < len(seen) < len(requests)
    assert list(generator.generate(requests, Sampling(4), lambda: True)) == []
    assert len(list(generator.generate(requests, Sampling(4), never))) == len(requests)


def test_rollouts_are_handed_on_before_the_last_one_ends(make: GeneratorMaker, folder: Path) -> None:
    generator = make(folder, 16)
    lengths = [len(r.response_ids) for r in generator.generate(requests_for(prompts(16), 1), Sampling(32), never)]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_load_weights_changes_answers_and_labels(
    make: GeneratorMaker, folder: Path, other_weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    requests = requests_for(prompts(4), 2)
    generator = make(folder, 8)
    before = by_key(generator.generate(requests, Sampling(12), never))
    generator.load_weights(iter(other_weights.items()), version=3)
    assert generator.version == 3
    after = by_key(generator.generate(requests, Sampling(12), never))
    fresh = by_key(make(tiny_checkpoint(tmp_path, seed=1, **SIZES), 8).generate(requests, Sampling(12), never))
    assert all(bool((r.policy_version == 3).all()) for r in after.values())
    assert all(bool((r.policy_version == -1).all()) for r in before.values())
    assert all(torch.equal(after[key].response_ids, fresh[key].response_ids) for key in after)
    assert any(not torch.equal(after[key].response_ids, before[key].response_ids) for key in after)


def test_the_best_ids_are_those_of_the_weights_that_drew(
    vllm_maker: GeneratorMaker, folder: Path, other_weights: dict[str, torch.Tensor]
) -> None:
    """New weights come while responses are being written; then their beginnings are continued."""
    generator = vllm_maker(folder, 16)
    assert isinstance(generator, VLLMGenerator)
    generator.load_weights(load_file(folder / "model.safetensors").items(), version=0)
    requests, rollouts = requests_for(prompts(8), 2), []
    for rollout in generator.telling(6).generate(requests, Sampling(120), never):
        if not rollouts:
            generator.load_weights(iter(other_weights.items()), version=1)
        rollouts.append(rollout)
    assert {1} < {len(rollout.policy_version.unique()) for rollout in rollouts}, "blind unless versions meet"
    longest = max((rollout.response_ids for rollout in rollouts), key=len)
    begun = [replace(request, prefix_ids=tuple(longest[:9].tolist())) for request in requests_for(prompts(1), 4)]
    rollouts += generator.telling(6).generate(begun, Sampling(20), never)
    reference = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for _ in range(2)]
    reference[1].load_state_dict(other_weights)
    for rollout in rollouts:
        assert rollout.best is not None
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids.tolist()]])
        first = len(rollout.prompt.token_ids) - 1
        with torch.no_grad():
            both = torch.stack([model(ids).logits[0, first:-1].log_softmax(-1) for model in reference])
        drawn = rollout.policy_version >= 0
        rows = both[rollout.policy_version.clamp(min=0), torch.arange(len(drawn))][drawn]
        assert (rollout.best.ids.dtype, rollout.best.ids.shape) == (torch.int32, (int(drawn.sum()), 6))
        torch.testing.assert_close(rollout.best.logprobs.double(), rows.topk(6).values, rtol=0, atol=2e-5)
        named = rows.gather(1, rollout.best.ids.long())
        torch.testing.assert_close(rollout.best.logprobs.double(), named, rtol=0, atol=2e-5)
        assert not rollout.best.logprobs.is_inference()


def test_the_best_ids_want_the_models_own_distribution(vllm_maker: GeneratorMaker, folder: Path) -> None:
    generator = vllm_maker(folder, 4)
    assert isinstance(generator, VLLMGenerator)
    with pytest.raises(ValueError, match="temperature 1"):
        generator.telling(6).generate(requests_for(prompts(1), 1), Sampling(4, temperature=0.9), never)
    with pytest.raises(ServerRefused, match="expected 0 to 40"):
        list(generator.telling(41).generate(requests_for(prompts(1), 1), Sampling(4), never))
    assert all(r.best is None for r in generator.generate(requests_for(prompts(1), 1), Sampling(4), never))


def _broken_off(weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for count, item in enumerate(weights.items()):
        if count == len(weights) // 2:
            raise ConnectionError("the sender died")
        yield item


def _damaged(weights: dict[str, torch.Tensor], damage: str) -> Iterator[tuple[str, torch.Tensor]]:
    name = "model.layers.2.mlp.up_proj.weight"
    items = list(weights.items())
    if damage == "missing":
        items = [item for item in items if item[0] != name]
    elif damage == "unknown":
        items.append(("model.layers.9.mlp.up_proj.weight", weights[name]))
    elif damage == "shape":
        items = [(n, t[1:] if n == name else t) for n, t in items]
    elif damage == "double":
        items.append((name, weights[name]))
    elif damage == "broken off":
        return _broken_off(weights)
    return iter(items)


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "double", "broken off"])
def test_a_failed_load_refuses_until_a_complete_one(
    make: GeneratorMaker, folder: Path, other_weights: dict[str, torch.Tensor], damage: str
) -> None:
    generator = make(folder, 8)
    requests = requests_for(prompts(2), 1)
    generator.load_weights(iter(other_weights.items()), version=0)
    expected = by_key(generator.generate(requests, Sampling(6), never))
    with pytest.raises(ConnectionError if damage == "broken off" else ValueError):
        generator.load_weights(_damaged(other_weights, damage), version=1)
    assert generator.version == 0
    with pytest.raises(RuntimeError, match="refuse"):
        list(generator.generate(requests, Sampling(6), never))
    generator.load_weights(iter(other_weights.items()), version=1)
    again = by_key(generator.generate(requests, Sampling(6), never))
    assert all(torch.equal(again[key].response_ids, expected[key].response_ids) for key in expected)


@pytest.mark.parametrize("version", [4, 5])
def test_versions_only_grow(
    make: GeneratorMaker, folder: Path, other_weights: dict[str, torch.Tensor], version: int
) -> None:
    """A refused version is refused before anything is touched: the generator keeps answering."""
    generator = make(folder, 8)
    generator.load_weights(iter(other_weights.items()), version=5)
    with pytest.raises(ValueError, match="version"):
        generator.load_weights(iter(other_weights.items()), version=version)
    rollouts = list(generator.generate(requests_for(prompts(2), 1), Sampling(4), never))
    assert all(bool((r.policy_version == 5).all()) for r in rollouts)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0), Sampling(4, temperature=0.0), Sampling(4, top_p=0.0), Sampling(4, top_p=1.1), Sampling(4, top_k=-1)],
    ids=["max_new_tokens", "temperature", "top_p_low", "top_p_high", "top_k"],
)
def test_bad_sampling_is_refused(make: GeneratorMaker, folder: Path, sampling: Sampling) -> None:
    with pytest.raises(ValueError, match=r"sampling\."):
        list(make(folder, 4).generate(requests_for(prompts(1), 1), sampling, never))


@pytest.mark.parametrize("ids", [(), (40,), (-1, 3), tuple([2] * 300)], ids=["empty", "beyond", "negative", "too long"])
def test_bad_prompts_are_refused_by_name(make: GeneratorMaker, folder: Path, ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="prompt 31"):
        list(make(folder, 4).generate([GenerateRequest(Prompt(31, 0, (), ids), 0, 1)], Sampling(4), never))


def test_close_is_idempotent_and_final(make: GeneratorMaker, folder: Path) -> None:
    generator = make(folder, 4)
    generator.close()
    generator.close()
    with pytest.raises(RuntimeError):
        list(generator.generate(requests_for(prompts(1), 1), Sampling(4), never))
