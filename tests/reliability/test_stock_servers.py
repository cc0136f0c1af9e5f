"""A real stock vLLM server, on a CPU: what it writes and scores is what the model says, and it can be lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nemo_opd.engines.hf.scorer import HFScorer
from nemo_opd.engines.vllm.calls import Servers
from nemo_opd.engines.vllm.client import ServerGone, ServerRefused
from nemo_opd.engines.vllm.generator import VLLMGenerator
from nemo_opd.engines.vllm.scorer import VLLMScorer
from nemo_opd.engines.vllm.settings import TEACHER, WRITER
from nemo_opd.engines.vllm.stock import Stock
from nemo_opd.types import Finish, GenerateRequest, Need, Prompt, Rollout, Sampling, ScoreRequest, TeacherNeeds
from nemo_opd.vocab.sampling import process_logits
from tests.helpers.servers import KEY
from tests.helpers.stock import StockServer
from tests.helpers.tiny import tiny_checkpoint

pytestmark = pytest.mark.slow

EOS = (1, 7)
BOUND = 2e-5
"""In float32, of log-probabilities against a float64 forward."""
IDS = 40


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockServer]:
    folder = tmp_path_factory.mktemp("stock")
    model = tiny_checkpoint(folder / "model", vocab_size=IDS, head_dim=32)
    # what a model's folder says of sampling must not count
    (model / "generation_config.json").write_text('{"temperature": 0.1, "top_k": 2, "repetition_penalty": 3.0}')
    with StockServer(model, folder / "log.txt", ["--logprobs-mode", "processed_logprobs"]) as server:
        yield server


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("other"), vocab_size=IDS, head_dim=32, seed=1)


def servers_of(server: StockServer, weights: Path, role: str = WRITER, session: str = "session") -> Servers:
    return Servers([server.url], session, weights, KEY, slots=8, stock=Stock(server.model, role))


def generator_of(server: StockServer, weights: Path, read: bool = True, session: str = "session") -> VLLMGenerator:
    return VLLMGenerator(servers_of(server, weights, session=session), server.model, eos_ids=EOS, read_weights=read)


def requests(count: int, prefix: tuple[int, ...] = ()) -> list[GenerateRequest]:
    prompts = [Prompt(index, 0, (), (2 + index % 30, 5, 39)) for index in range(count)]
    return [GenerateRequest(prompt, 0, 2**64 - 1 - prompt.index, prefix) for prompt in prompts]


def never() -> bool:
    return False


def logprobs(folder: Path, rollout: Rollout, sampling: Sampling) -> Tensor:
    """[response] of the distribution that is drawn from, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.cat([torch.tensor(rollout.prompt.token_ids), rollout.response_ids])
    with torch.no_grad():
        logits = model(ids[None]).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
    return process_logits(logits, sampling).log_softmax(-1).gather(1, rollout.response_ids[:, None]).squeeze(1)


def score_requests(count: int) -> list[ScoreRequest]:
    draw = torch.Generator().manual_seed(3)
    made = []
    for key in range(count):
        context = torch.randint(0, IDS, (5 + key,), generator=draw)
        made.append(ScoreRequest(key, tuple(context.tolist()), torch.randint(0, IDS, (9,), generator=draw)))
    return made


@pytest.mark.parametrize("needs", [TeacherNeeds(Need.SAMPLED), TeacherNeeds(Need.TOP_K, k=6)], ids=str)
def test_scores_are_those_of_a_dense_forward(server: StockServer, needs: TeacherNeeds, tmp_path: Path) -> None:
    scorer = VLLMScorer(servers_of(server, tmp_path, TEACHER), IDS, model=server.model, rank=0)
    found = {answer.key: answer for answer in scorer.score(score_requests(12), needs)}
    scorer.close()
    reference = HFScorer(server.model, vocab_size=IDS, rank=0)
    expected = {answer.key: answer for answer in reference.score(score_requests(12), needs)}
    assert set(found) == set(expected) == set(range(12))
    for key, answer in found.items():
        assert bool(answer.valid.all())
        if needs.need is Need.SAMPLED:
            pair = answer.sampled_logprobs, expected[key].sampled_logprobs
        else:
            assert torch.equal(answer.ids, expected[key].ids)  # type: ignore[arg-type]
            pair = answer.id_logprobs, expected[key].id_logprobs
        assert float((pair[0] - pair[1]).abs().max()) < BOUND  # type: ignore[operator]


SAMPLINGS = [Sampling(24), Sampling(24, temperature=0.7), Sampling(24, temperature=1.3, top_p=0.8, top_k=9)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_what_is_written_has_the_logprobs_it_was_drawn_with(
    server: StockServer, sampling: Sampling, tmp_path: Path
) -> None:
    generator = generator_of(server, tmp_path)
    rollouts = list(generator.generate(requests(24), sampling, never))
    generator.close()
    assert len(rollouts) == 24
    for rollout in rollouts:
        expected = logprobs(server.model, rollout, sampling)
        assert float((rollout.sampler_logprobs - expected).abs().max()) < BOUND
        ends = torch.isin(rollout.response_ids, torch.tensor(EOS))
        assert not bool(ends[:-1].any()), "a response ends with its first EOS, which is part of it"
        assert (rollout.finish is Finish.EOS) == bool(ends[-1])
    assert {rollout.finish for rollout in rollouts} == {Finish.EOS, Finish.LENGTH}
    assert len({tuple(rollout.response_ids.tolist()) for rollout in rollouts}) > 12


def test_a_prefix_is_continued_and_a_seed_writes_the_same_again(server: StockServer, tmp_path: Path) -> None:
    generator = generator_of(server, tmp_path)
    asked = requests(6, prefix=(9, 11))
    first, again = ([*generator.generate(asked, Sampling(12), never)] for _ in range(2))
    generator.close()
    by_prompt = {rollout.prompt.index: rollout for rollout in again}
    for rollout in first:
        assert rollout.response_ids[:2].tolist() == [9, 11] and len(rollout.response_ids) <= 12
        expected = logprobs(server.model, rollout, Sampling(12))[2:]
        assert float((rollout.sampler_logprobs[2:] - expected).abs().max()) < BOUND
        assert torch.equal(by_prompt[rollout.prompt.index].response_ids, rollout.response_ids)


def test_new_weights_write_what_comes_next(server: StockServer, other: Path, tmp_path: Path) -> None:
    weights = load_file(other / "model.safetensors")
    generator = generator_of(server, tmp_path, read=False, session="trains")
    before = generator_of(server, tmp_path, session="evaluates")
    assert len(list(before.generate(requests(2), Sampling(4), never))) == 2
    with pytest.raises(ServerRefused, match="another session has this server"):
        generator.load_weights(iter(weights.items()), version=0)
    generator.close()
    generator = generator_of(server, tmp_path, read=False, session="trains again")
    for version in (0, 1):
        generator.load_weights(iter(weights.items()), version=version)
        for rollout in generator.generate(requests(8), Sampling(12), never):
            assert bool((rollout.policy_version == version).all())
            expected = logprobs(other, rollout, Sampling(12))
            assert float((rollout.sampler_logprobs - expected).abs().max()) < BOUND
    with pytest.raises(ServerRefused, match="another session has this server"):
        list(before.generate(requests(2), Sampling(4), never))
    before.close()
    generator.close()
    with pytest.raises(ServerRefused, match="other weights than those it was started with"):
        VLLMScorer(servers_of(server, tmp_path, TEACHER), IDS, rank=0)
    generator = generator_of(server, tmp_path, session="evaluates again")  # with the weights of the server's own folder
    for rollout in generator.generate(requests(4), Sampling(8), never):
        assert float((rollout.sampler_logprobs - logprobs(server.model, rollout, Sampling(8))).abs().max()) < BOUND
    generator.close()


def test_a_server_killed_while_it_writes(server: StockServer, tmp_path: Path) -> None:
    generator = generator_of(server, tmp_path)
    rollouts = generator.generate(requests(24), Sampling(200), never)
    next(rollouts)
    server.kill()
    with pytest.raises(ServerGone, match="no server is left"):
        list(rollouts)
    generator.close()
