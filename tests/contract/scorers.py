"""The contract of `Scorer`, as a function that runs on every rank of a pool with any engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_opd.config import Config
from nemo_opd.engines.protocols import Scorer
from nemo_opd.types import Need, ScoreRequest, TeacherNeeds, TeacherScores

K = 5


def build(engine: str, config: Config) -> Scorer:
    """The engine's scorer for the recipe's teacher."""
    if engine == "megatron":
        from nemo_opd.engines.megatron.parallel import destroy_student_groups
        from nemo_opd.engines.megatron.scorer import MegatronScorer

        destroy_student_groups()  # of an earlier test in this process
        return MegatronScorer(config)
    if engine == "vllm":
        from nemo_opd.engines.hf.model import load_model
        from nemo_opd.engines.vllm.calls import Servers
        from nemo_opd.engines.vllm.scorer import VLLMScorer

        servers = Servers(str(config.teacher.servers.urls).split(","), "contract", Path(), slots=8)
        return VLLMScorer(servers, load_model(config.student.model).config.vocab_size)
    assert engine == "hf"
    from nemo_opd.engines.hf.scorer import HFScorer

    teacher = config.teacher
    return HFScorer(str(teacher.model), dtype=teacher.dtype, micro_batch_tokens=teacher.micro_batch_tokens)


def random_requests(count: int, vocab_size: int, consumers: list[tuple[int, ...]], seed: int = 0) -> list[ScoreRequest]:
    """Requests of many lengths, one with an empty response, their consumers taking turns."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(0, vocab_size, shape, generator=generator)

    requests = []
    for key, (before, after) in enumerate(torch.randint(1, 40, (count, 2), generator=generator).tolist()):
        length = 0 if key == 3 else after
        requests.append(
            ScoreRequest(
                key=100 + key,
                context_ids=tuple(draw(before).tolist()),
                response_ids=draw(length),
                consumers=consumers[key % len(consumers)],
                at_ids=draw(length, K),
            )
        )
    return requests


class Reference:
    """A dense transformers model, one request at a time: what every scorer must agree with."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.vocab_size = vocab_size

    @torch.no_grad()
    def log_probs(self, request: ScoreRequest) -> Tensor:
        """[response, vocab] over the student's ids."""
        ids = torch.cat([torch.tensor(request.context_ids), request.response_ids])
        rows = slice(len(request.context_ids) - 1, len(ids) - 1)
        return self.model(ids[None]).logits[0, rows, : self.vocab_size].log_softmax(-1)

    @torch.no_grad()
    def of_hidden(self, hidden: Tensor) -> Tensor:
        """The same from a scorer's hidden states."""
        return self.model.lm_head(hidden)[:, : self.vocab_size].log_softmax(-1)


def error(answer: TeacherScores, request: ScoreRequest, needs: TeacherNeeds, reference: Reference) -> float:
    """Largest deviation of an answer's log-probabilities from the reference; checks shapes and alignment."""
    expected = reference.log_probs(request)
    length = len(request.response_ids)
    assert answer.valid.dtype == torch.bool and answer.valid.shape == (length,) and bool(answer.valid.all())
    payloads = {name for name in ("hidden", "sampled_logprobs", "id_logprobs") if getattr(answer, name) is not None}
    if needs.need is Need.FULL:
        assert payloads == {"hidden"} and answer.hidden is not None and answer.hidden.shape[0] == length
        return _largest(reference.of_hidden(answer.hidden) - expected)
    if needs.need is Need.SAMPLED:
        assert payloads == {"sampled_logprobs"} and answer.sampled_logprobs is not None
        return _largest(answer.sampled_logprobs - expected.gather(1, request.response_ids[:, None]).squeeze(1))
    assert payloads == {"id_logprobs"} and answer.ids is not None and answer.id_logprobs is not None
    assert answer.id_logprobs.dtype == torch.float32
    if needs.need is Need.AT_IDS:
        assert torch.equal(answer.ids, request.at_ids)
    else:
        best = expected.topk(K).values
        assert _largest(answer.id_logprobs - best) < 1e-4, "top-k are the most probable ids, the best first"
    return _largest(answer.id_logprobs - expected.gather(1, answer.ids))


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0


def check_scorer(rank: int, engine: str, config: Config, requests: list[ScoreRequest]) -> dict[str, float]:
    """Score with every need that the engine serves; returns the largest error for each. Every rank gets exactly its own
    answers."""
    from nemo_opd.engines.hf.model import load_model

    scorer = build(engine, config)
    assert isinstance(scorer, Scorer)
    reference = Reference(Path(str(config.teacher.model)), load_model(config.student.model).config.vocab_size)
    mine = {request.key: request for request in requests if rank in request.consumers}
    errors = {}
    served = engine == "vllm"
    for need in ([] if served else [Need.FULL]) + [Need.SAMPLED, Need.AT_IDS, Need.TOP_K]:
        needs = TeacherNeeds(need, k=K)
        answers = list(scorer.score(requests, needs))
        assert sorted(a.key for a in answers) == sorted(mine), "each consumer gets each of its answers once"
        errors[need.name] = max((error(a, mine[a.key], needs, reference) for a in answers), default=0.0)
    assert list(scorer.score([], TeacherNeeds(Need.SAMPLED if served else Need.FULL))) == []
    assert not any(isinstance(x, Tensor) and x.requires_grad for a in answers for x in vars(a).values())
    scorer.close()
    scorer.close()
    return errors


def refusals(rank: int, engine: str, config: Config, requests: list[ScoreRequest]) -> list[str]:
    """Messages of what a scorer must refuse, at the call."""
    from dataclasses import replace

    scorer, messages = build(engine, config), []
    good = requests[0]
    bad: list[tuple[Any, TeacherNeeds]] = [
        (replace(good, context_ids=()), TeacherNeeds(Need.SAMPLED)),
        (replace(good, at_ids=None), TeacherNeeds(Need.AT_IDS, k=K)),
        (replace(good, response_ids=good.response_ids + 10_000), TeacherNeeds(Need.SAMPLED)),
        (good, TeacherNeeds(Need.TOP_K, k=0)),
    ]
    for request, needs in bad:
        try:
            scorer.score([request], needs)
        except ValueError as refused:
            messages.append(str(refused))
        else:
            messages.append("")
    scorer.close()
    if dist.is_initialized():
        dist.barrier()
    return messages
