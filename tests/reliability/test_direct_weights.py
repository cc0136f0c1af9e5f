"""Weights that go straight from the trainer to a real vLLM server, over gloo: what nccl and ipc do, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from nemo_opd.engines.hf.generator import HFGenerator
from nemo_opd.engines.vllm.calls import Servers
from nemo_opd.engines.vllm.generator import VLLMGenerator
from nemo_opd.rollout.seeds import derive_seed
from nemo_opd.types import GenerateRequest, Prompt, Rollout, Sampling
from tests.helpers.figures import record
from tests.helpers.servers import KEY, Fleet
from tests.helpers.tiny import tiny_checkpoint

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 40, "head_dim": 32}
SAMPLING = Sampling(40)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    model = tiny_checkpoint(tmp_path_factory.mktemp("student"), **SIZES)
    with Fleet(model, tmp_path_factory.mktemp("fleet"), transport="gloo", sleeps=True) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    folders = [tiny_checkpoint(tmp_path_factory.mktemp("other"), **SIZES, seed=seed) for seed in (1, 2, 3)]
    return [load_file(folder / "model.safetensors") for folder in folders]


def servers(fleet: Fleet, session: str, *numbers: int) -> Servers:
    urls = [fleet.url(number) for number in numbers]
    return Servers(urls, session, fleet.scratch, KEY, transport="gloo", sleep=True, load_seconds=60.0)


def requests() -> list[GenerateRequest]:
    prompts = [Prompt(index, 0, (), (2 + index, 5, 7)) for index in range(8)]
    return [GenerateRequest(prompt, 0, derive_seed(3, 0, prompt.index, 0)) for prompt in prompts]


def never() -> bool:
    return False


def written(generator: VLLMGenerator | HFGenerator) -> dict[int, Rollout]:
    return {rollout.prompt.index: rollout for rollout in generator.generate(requests(), SAMPLING, never)}


def expected(model: Path, weights: dict[str, torch.Tensor] | None) -> dict[int, Rollout]:
    generator = HFGenerator(model, eos_ids=())
    if weights is not None:
        generator.load_weights(weights.items(), 0)
    return written(generator)


def assert_same(got: dict[int, Rollout], wanted: dict[int, Rollout], version: int) -> None:
    for index, rollout in wanted.items():
        assert got[index].response_ids.tolist() == rollout.response_ids.tolist()
        torch.testing.assert_close(got[index].sampler_logprobs, rollout.sampler_logprobs, rtol=0, atol=2e-5)
        assert set(got[index].policy_version.tolist()) == {version}


def test_every_set_is_what_is_written_with(fleet: Fleet, others: list[dict[str, torch.Tensor]]) -> None:
    """Also after the server slept (on a CPU vLLM does nothing then; the calls are real)."""
    generator = VLLMGenerator(servers(fleet, "sets", 0, 1), fleet.model, rank=0)
    assert_same(written(generator), expected(fleet.model, None), -1)
    for version, weights in enumerate(others):
        generator.rest()
        generator.load_weights(iter(weights.items()), version)
        assert generator.refit_bytes == sum(tensor.nbytes for tensor in weights.values())
        assert_same(written(generator), expected(fleet.model, weights), version)
    generator.close()


def test_half_a_set_is_never_written_with(fleet: Fleet, others: list[dict[str, torch.Tensor]]) -> None:
    """The trainer ends between start and finish: its servers refuse, to it and to others, until whole weights come."""
    generator = VLLMGenerator(servers(fleet, "half", 0, 1), fleet.model, rank=0)
    generator.load_weights(iter(others[0].items()), 0)

    def breaks_off() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(others[1].items())[:3]
        raise OSError("the trainer's own failure")

    with pytest.raises(OSError, match="own failure"):
        generator.load_weights(breaks_off(), 1)
    with pytest.raises(RuntimeError, match="refuses to generate: the load of policy version 1 did not complete"):
        generator.generate(requests(), SAMPLING, never)
    generator.close()
    successor = VLLMGenerator(servers(fleet, "successor", 0, 1), fleet.model, rank=0, read_weights=False)
    with pytest.raises(RuntimeError, match="no weights yet"):
        successor.generate(requests(), SAMPLING, never)
    successor.load_weights(iter(others[2].items()), 0)
    assert_same(written(successor), expected(fleet.model, others[2]), 0)
    record("R12", "answers with half a set of weights, the trainer gone between start and finish", "0")
    successor.close()
    reader = VLLMGenerator(servers(fleet, "reader", 0, 1), fleet.model, rank=0)
    assert_same(written(reader), expected(fleet.model, None), -1)
    reader.close()


def test_what_a_server_answers_to_wrong_steps(fleet: Fleet) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    generator = VLLMGenerator(servers(fleet, "steps", 0), fleet.model, rank=0)

    def post(path: str, **values: object) -> tuple[int, str]:
        answer = httpx.post(fleet.url(0) + path, json=values, headers=headers, timeout=30.0)
        return answer.status_code, answer.json().get("error", "")

    step = {"session": "steps", "version": 0, "info": {}}
    assert post("/transfer", **step, action="update") == (400, "action: got update; expected connect")
    assert post("/transfer", **step, action="reset")[0] == 400
    assert post("/transfer", **{**step, "session": "other"}, action="start")[0] == 409
    assert post("/refit", session="steps", version=0, name="folder")[0] == 409
    assert post("/sleep", session="other")[0] == 409
    assert_same(written(generator), expected(fleet.model, None), -1)
    generator.close()


def test_a_server_that_died_is_left_out_and_joins_again(fleet: Fleet, others: list[dict[str, torch.Tensor]]) -> None:
    generator = VLLMGenerator(servers(fleet, "death", 0, 1), fleet.model, rank=0)
    generator.load_weights(iter(others[0].items()), 0)
    fleet.kill(1)
    generator.load_weights(iter(others[1].items()), 1)
    assert_same(written(generator), expected(fleet.model, others[1]), 1)
    fleet.start(1)
    generator.load_weights(iter(others[2].items()), 2)
    generator.close()
    alone = VLLMGenerator(servers(fleet, "alone", 1), fleet.model, rank=0, read_weights=False)
    alone.load_weights(iter(others[2].items()), 0)
    assert_same(written(alone), expected(fleet.model, others[2]), 0)
    alone.close()
