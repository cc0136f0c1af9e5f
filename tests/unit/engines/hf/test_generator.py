"""What the contract suite cannot see: cache growth, compaction, prefill groups, tied weights, refusals, no leaks."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, Qwen2Config

from nemo_opd.engines.hf import decode as decode_module
from nemo_opd.engines.hf.generator import HFGenerator
from nemo_opd.rollout.seeds import derive_seed
from nemo_opd.types import Finish, GenerateRequest, Prompt, Rollout, Sampling
from tests.helpers.tiny import FAMILIES, tiny_checkpoint, tiny_model

VOCAB_SIZE = 48


def never() -> bool:
    return False


def requests(count: int, samples: int = 1, longest: int = 9) -> list[GenerateRequest]:
    draws = torch.Generator().manual_seed(3)
    prompts = [
        Prompt(index, 0, (), tuple(torch.randint(2, VOCAB_SIZE, (1 + index % longest,), generator=draws).tolist()))
        for index in range(count)
    ]
    return [GenerateRequest(p, s, derive_seed(0, 0, p.index, s)) for p in prompts for s in range(samples)]


def generator(
    family: str = "qwen3", eos_ids: tuple[int, ...] = (), batch_size: int = 8, **overrides: Any
) -> HFGenerator:
    model = tiny_model(family, vocab_size=VOCAB_SIZE, **overrides)
    return HFGenerator(model, batch_size=batch_size, eos_ids=eos_ids)


def tokens(rollouts: Iterator[Rollout]) -> dict[tuple[int, int], list[int]]:
    return {(r.prompt.index, r.sample): r.response_ids.tolist() for r in rollouts}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_of_every_family_equal_a_full_forward(family: str, tied: bool) -> None:
    """200 tokens, so that the cache grows from 64 columns to 128 and 256, with prompts of different lengths."""
    overrides = {"num_hidden_layers": 2, "tie_word_embeddings": tied}
    reference = tiny_model(family, vocab_size=VOCAB_SIZE, **overrides).double()
    rollouts = generator(family, **overrides).generate(requests(5), Sampling(200), never)
    for rollout in rollouts:
        start = len(rollout.prompt.token_ids)
        with torch.no_grad():
            logits = reference(torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids.tolist()]])).logits[0]
        expected = logits[start - 1 : -1].log_softmax(-1).gather(-1, rollout.response_ids[:, None])[:, 0]
        assert len(expected) == 200
        torch.testing.assert_close(rollout.sampler_logprobs.double(), expected, rtol=0, atol=5e-5)


def test_greedy_equals_transformers_generate() -> None:
    ours = tokens(generator().generate(requests(6), Sampling(40, greedy=True), never))
    reference = tiny_model(vocab_size=VOCAB_SIZE)
    reference.generation_config.eos_token_id = None
    for request in requests(6):
        ids = torch.tensor([request.prompt.token_ids])
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        assert ours[request.prompt.index, 0] == out[0, ids.shape[1] :].tolist()


def test_slots_are_refilled_and_closed_up_without_mixing_sequences() -> None:
    """Many EOS ids make lengths vary, 5 slots for 60 requests make every slot change hands; compared with 60 slots."""
    few = tokens(generator(eos_ids=(1, 2, 3, 4), batch_size=5).generate(requests(20, 3), Sampling(30), never))
    all_at_once = tokens(generator(eos_ids=(1, 2, 3, 4), batch_size=60).generate(requests(20, 3), Sampling(30), never))
    assert few == all_at_once
    assert len({len(ids) for ids in few.values()}) > 5


def test_prefill_groups_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokens(generator(batch_size=32).generate(requests(10, 3), Sampling(6), never))
    monkeypatch.setattr(decode_module, "_PREFILL_POSITIONS", 12)
    assert tokens(generator(batch_size=32).generate(requests(10, 3), Sampling(6), never)) == whole


def test_a_prompt_is_prefilled_once_for_all_its_samples() -> None:
    engine = generator(batch_size=32)
    rows: list[int] = []
    assert engine._model is not None
    engine._model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    list(engine.generate(requests(3, samples=8), Sampling(2), never))
    assert rows == [3, 24]  # the second draw ends every response, so nothing runs after it


def test_responses_shrink_the_batch() -> None:
    """Finished sequences leave the forward, they are not decoded until the longest ends."""
    engine = generator(eos_ids=(1, 2, 3, 4), batch_size=32)
    rows: list[int] = []
    assert engine._model is not None
    engine._model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    rollouts = list(engine.generate(requests(32), Sampling(30), never))
    assert sum(rows) == sum(len(r.response_ids) for r in rollouts)  # 32 prefill rows stand for the 32 last tokens
    assert rows == sorted(rows, reverse=True)


def test_seeds_decide_and_the_whole_64_bits_count() -> None:
    prompt = requests(1)[0].prompt
    seeds = (0, 1, 1 << 32, 1 << 63, (1 << 64) - 1)
    rollouts = generator().generate([GenerateRequest(prompt, i, s) for i, s in enumerate(seeds)], Sampling(12), never)
    assert len({tuple(r.response_ids.tolist()) for r in rollouts}) == len(seeds)


def test_consumers_of_rollouts_are_not_put_into_inference_mode() -> None:
    for _ in generator().generate(requests(2), Sampling(3), never):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    weight = torch.ones(3, requires_grad=True)
    rollout = next(generator().generate(requests(1), Sampling(3), never))
    (rollout.sampler_logprobs * weight).sum().backward()
    assert weight.grad is not None


def test_text_comes_from_the_decoder_given() -> None:
    engine = HFGenerator(tiny_model(vocab_size=VOCAB_SIZE), decode=lambda ids: "-".join(map(str, ids.tolist())))
    rollout = next(engine.generate(requests(1), Sampling(3), never))
    assert rollout.text == "-".join(map(str, rollout.response_ids.tolist()))


def test_eos_ids_default_to_those_of_the_folder(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, vocab_size=VOCAB_SIZE, eos_token_id=[5, 9])
    rollouts = list(HFGenerator(folder).generate(requests(60), Sampling(100), never))
    ended = [r.response_ids.tolist() for r in rollouts if r.finish is Finish.EOS]
    assert {ids[-1] for ids in ended} == {5, 9}
    assert all({5, 9}.isdisjoint(ids[:-1]) for ids in ended)


def test_configuration_alone_waits_for_weights(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, vocab_size=VOCAB_SIZE)
    weights = tiny_model(vocab_size=VOCAB_SIZE).state_dict()
    engine = HFGenerator(folder, read_weights=False, eos_ids=())
    with pytest.raises(RuntimeError, match="no weights yet"):
        engine.generate(requests(1), Sampling(3), never)
    engine.load_weights(iter(weights.items()), 0)
    expected = tokens(generator().generate(requests(4), Sampling(9), never))
    assert tokens(engine.generate(requests(4), Sampling(9), never)) == expected


def _tied_weights(with_head: bool, equal: bool = True) -> dict[str, Tensor]:
    model = tiny_model(vocab_size=VOCAB_SIZE, seed=1, tie_word_embeddings=True)
    weights = dict(model.named_parameters())
    head = {"lm_head.weight": weights["model.embed_tokens.weight"] + (0.0 if equal else 1.0)}
    return {**weights, **head} if with_head else weights


@pytest.mark.parametrize("with_head", [False, True])
def test_a_tied_output_layer_may_come_or_stay_away(with_head: bool) -> None:
    engine = generator(tie_word_embeddings=True)
    engine.load_weights(iter(_tied_weights(with_head).items()), 0)
    expected = tokens(generator(tie_word_embeddings=True, seed=1).generate(requests(4), Sampling(9), never))
    assert tokens(engine.generate(requests(4), Sampling(9), never)) == expected


def test_a_tied_output_layer_with_other_values_is_refused() -> None:
    engine = generator(tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight with other values"):
        engine.load_weights(iter(_tied_weights(True, equal=False).items()), 0)


def test_an_untied_output_layer_may_not_stay_away() -> None:
    weights = {n: t for n, t in tiny_model(vocab_size=VOCAB_SIZE).state_dict().items() if n != "lm_head.weight"}
    with pytest.raises(ValueError, match=r"expected 1 more: lm_head\.weight"):
        generator().load_weights(iter(weights.items()), 0)


def test_experts_come_one_by_one_under_the_names_of_a_folder(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path, "qwen3_moe", seed=1, vocab_size=VOCAB_SIZE)
    weights = load_file(source / "model.safetensors")
    engine = generator("qwen3_moe")
    engine.load_weights(iter(weights.items()), 0)
    expected = tokens(generator("qwen3_moe", seed=1).generate(requests(4), Sampling(9), never))
    assert tokens(engine.generate(requests(4), Sampling(9), never)) == expected
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    with pytest.raises(ValueError, match=f"expected 1 more: {name}"):
        engine.load_weights(((n, t) for n, t in weights.items() if n != name), 1)


def test_weights_are_cast_to_the_generators_dtype() -> None:
    engine = generator(dtype=torch.bfloat16)
    weights = tiny_model(vocab_size=VOCAB_SIZE, seed=1).state_dict()
    engine.load_weights(iter(weights.items()), 0)
    assert engine._model is not None
    for name, parameter in engine._model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, weights[name].bfloat16())
    rollout = next(engine.generate(requests(1), Sampling(5), never))
    assert rollout.sampler_logprobs.dtype == torch.float32


def test_a_load_keeps_no_second_copy() -> None:
    """Every tensor is dead by the time that the next but one is asked for."""
    references: list[weakref.ref[Tensor]] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tiny_model(vocab_size=VOCAB_SIZE).state_dict().items():
            assert all(reference() is None for reference in references[:-1])
            copy = tensor.clone()
            references.append(weakref.ref(copy))
            yield name, copy

    generator().load_weights(stream(), 0)
    assert len(references) > 10


def test_a_load_between_rollouts_labels_later_tokens() -> None:
    engine = generator(eos_ids=(1, 2, 3, 4), batch_size=32)
    engine.load_weights(iter(tiny_model(vocab_size=VOCAB_SIZE).state_dict().items()), 0)
    running = engine.generate(requests(32), Sampling(30), never)
    first = next(running)
    engine.load_weights(iter(tiny_model(vocab_size=VOCAB_SIZE, seed=1).state_dict().items()), 1)
    rest = list(running)
    assert set(first.policy_version.tolist()) == {0}
    longest = max(rest, key=lambda r: len(r.response_ids)).policy_version.tolist()
    assert longest == sorted(longest)
    assert set(longest) == {0, 1}


def test_a_failed_load_ends_a_running_generate_too() -> None:
    engine = generator(batch_size=2)
    running = engine.generate(requests(6), Sampling(5), never)
    next(running)
    with pytest.raises(ValueError, match="weights"):
        engine.load_weights(iter({"nonsense": torch.zeros(1)}.items()), 0)
    with pytest.raises(RuntimeError, match="refuses"):
        list(running)


def test_a_diverged_policy_is_refused_rather_than_sampled() -> None:
    """argmax over NaN would name a token; a number must not come out of a failure."""
    weights = tiny_model(vocab_size=VOCAB_SIZE).state_dict()
    weights["lm_head.weight"][7] = float("nan")
    engine = generator()
    engine.load_weights(iter(weights.items()), 3)
    with pytest.raises(RuntimeError, match="policy version 3"):
        list(engine.generate(requests(2), Sampling(4), never))


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16),
        Qwen2Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ],
    ids=["other family", "sliding window"],
)
def test_models_that_would_be_computed_wrongly_are_refused(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one of llama, mistral, qwen2, qwen3, qwen3_moe"):
        HFGenerator(tmp_path, read_weights=False)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    model = tiny_model(vocab_size=VOCAB_SIZE)
    with pytest.raises(ValueError, match=r"rollout\.batch_size: got 0"):
        HFGenerator(model, batch_size=0)
    with pytest.raises(ValueError, match=r"eos ids: got \[48\]"):
        HFGenerator(model, eos_ids=(1, VOCAB_SIZE))
    with pytest.raises(ValueError, match=r"no config\.json"):
        HFGenerator(tmp_path)
    with pytest.raises(ValueError, match="dtype: got int8"):
        HFGenerator(tiny_checkpoint(tmp_path, vocab_size=VOCAB_SIZE), dtype="int8")


def test_ids_that_only_the_model_knows_are_never_drawn() -> None:
    model = tiny_model(vocab_size=VOCAB_SIZE)
    writer = HFGenerator(model, eos_ids=(), vocab_size=40)
    rollouts = list(writer.generate(requests(8, samples=4), Sampling(20), never))
    assert max(int(r.response_ids.max()) for r in rollouts) < 40
    whole = HFGenerator(tiny_model(vocab_size=VOCAB_SIZE), eos_ids=())
    assert max(int(r.response_ids.max()) for r in whole.generate(requests(8, samples=4), Sampling(20), never)) >= 40
    with pytest.raises(ValueError, match="vocab_size"):
        HFGenerator(tiny_model(vocab_size=VOCAB_SIZE), eos_ids=(), vocab_size=49)
