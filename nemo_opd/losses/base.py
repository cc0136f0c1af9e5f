"""What every loss is: a NeMo module with typed ports that says what it needs and what it counts.

There are two kinds, and the difference is a type. A `DistributionLoss` is a sum over the vocabulary or a support and
must be *differentiated*; a `SampledTokenLoss` makes one number of the token that was written, which may be a
policy-gradient advantage. A distribution-level value used as an advantage at its own position has zero expected
gradient (sum over v of grad p_v times a constant), silently: advantages are therefore made by
`SampledTokenLoss.prepare`, which is handed sampled-token scores and nothing else.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from nemo.core.classes import Loss, typecheck
from nemo.core.neural_types import (
    FloatType,
    LabelsType,
    LogitsType,
    LogprobsType,
    LossType,
    MaskType,
    NeuralType,
)
from torch import Tensor

from nemo_opd.types import Author, Need, TeacherNeeds, TokenBatch
from nemo_opd.vocab.logits import LogitsView
from nemo_opd.vocab.objective import Evaluation, FullDivergence, Part, SampledScores
from nemo_opd.vocab.partial import PartialView
from nemo_opd.vocab.shard import VocabShard
from nemo_opd.vocab.support import FewLogProbs, FewNumbers, Support
from nemo_opd.vocab.view import VocabView


class DistillationLoss(Loss):
    """A loss of the student's distribution at each trained token.

    A loss author writes `token_losses` against views; values, gradients, tensor parallelism, chunks and normalisers are
    the business of `nemo_opd.vocab.fused.fused_loss`. Called as a module, it returns the mean over the tokens of logits
    that are at hand (dense, or this rank's columns after `on_shard`).
    """

    name: ClassVar[str]
    """The registered name."""
    zero_at_match: bool = True
    """Are loss *and gradient* 0 where student and teacher agree?"""
    whole_row: bool = False
    """Must `prepare` see a row at once? Costs one more forward pass through the output layers."""
    divergence: FullDivergence | None = None
    """The hand-written backward that computes this loss, if it is a divergence over the whole vocabulary."""
    few: FewNumbers | None = None
    """What it looks at, if it is a loss of a few log-probabilities per token."""
    parts: tuple[Part, ...] = ()
    """See `nemo_opd.losses.by_author`."""
    coefficients: Mapping[str, float] = {}
    """Factor on a component, 1 where none is named. Not on its token count."""
    unweighted: frozenset[str] = frozenset()
    """Components to which the weight slot does not apply."""

    def __init__(self) -> None:
        super().__init__()
        self._shard: VocabShard | None = None
        self.beside: DistillationLoss | None = None
        """A loss of the written token that is part of this one, on the same logits; see `losses.with_reward`."""

    @property
    @abstractmethod
    def needs(self) -> TeacherNeeds:
        """What the teacher must report."""

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the terms, each of which is divided by its own global token count."""
        return (self.name,)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of all that `token_metrics` and `metrics` report."""
        return () if self.needs.need == Need.NOTHING else ("teacher_missing", "teacher_zero")

    def component_masks(self, tokens: TokenBatch) -> dict[str, Tensor]:
        """bool [tokens] per component: which tokens it counts, known before the forward pass. Never a token whose
        teacher score is missing or is an exact zero (log q = -inf), which would make it infinite."""
        return {name: self.counted(tokens) for name in self.components}

    def counted(self, tokens: TokenBatch) -> Tensor:
        """bool [tokens]: the tokens on which this loss is defined."""
        if self.needs.need == Need.NOTHING:
            return torch.ones_like(tokens.teacher_valid)
        return tokens.teacher_valid & finite_scores(tokens)

    def token_metrics(self, tokens: TokenBatch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Shares of trained tokens that were dropped, by cause: no score arrived, or it was an exact zero."""
        if self.needs.need == Need.NOTHING:
            return {}
        everywhere = torch.ones_like(tokens.teacher_valid)
        zero = tokens.teacher_valid & ~finite_scores(tokens)
        return {
            "teacher_missing": ((~tokens.teacher_valid).double(), everywhere),
            "teacher_zero": (zero.double(), everywhere),
        }

    def prepare(self, scores: SampledScores, tokens: TokenBatch) -> Tensor | None:
        """A constant per token from sampled-token scores; None when the loss has no use for one."""
        return None

    @abstractmethod
    def evaluate(
        self, student: VocabView, teacher: VocabView | None, tokens: TokenBatch, prepared: Tensor | None
    ) -> Evaluation:
        """The loss of a chunk: what the fused path calls."""

    def evaluate_few(
        self,
        student: FewLogProbs,
        teacher: FewLogProbs | None,
        support: Support | None,
        tokens: TokenBatch,
        prepared: Tensor | None,
    ) -> Evaluation:
        """The loss of a chunk from a few numbers per token; for losses that set `few`."""
        raise NotImplementedError(f"{type(self).__name__} is not a loss of a few log-probabilities")

    def on_shard(self, shard: VocabShard | None) -> DistillationLoss:
        """Say which columns of the vocabulary the ports' logits are (for calls as a module); returns itself."""
        self._shard = shard
        return self

    @property
    def input_types(self) -> dict[str, NeuralType]:
        per_token = ("T",)
        return {
            "student_logits": NeuralType(("T", "D"), LogitsType()),
            "token_ids": NeuralType(per_token, LabelsType()),
            "teacher_logits": NeuralType(("T", "D"), LogitsType(), optional=True),
            "teacher_logprobs": NeuralType(per_token, LogprobsType(), optional=True),
            "teacher_ids": NeuralType(("T", "D"), LabelsType(), optional=True),
            "teacher_id_logprobs": NeuralType(("T", "D"), LogprobsType(), optional=True),
            "teacher_base_logprobs": NeuralType(per_token, LogprobsType(), optional=True),
            "sampler_logprobs": NeuralType(per_token, LogprobsType(), optional=True),
            "advantage": NeuralType(per_token, FloatType(), optional=True),
            "mask": NeuralType(per_token, MaskType(), optional=True),
        }

    @property
    def output_types(self) -> dict[str, NeuralType]:
        return {"loss": NeuralType(elements_type=LossType())}

    @typecheck()
    def forward(
        self,
        student_logits: Tensor,
        token_ids: Tensor,
        teacher_logits: Tensor | None = None,
        teacher_logprobs: Tensor | None = None,
        teacher_ids: Tensor | None = None,
        teacher_id_logprobs: Tensor | None = None,
        teacher_base_logprobs: Tensor | None = None,
        sampler_logprobs: Tensor | None = None,
        advantage: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Sum over components of the mean over the tokens that each counts; 0 where none is counted.

        Shapes: logits [tokens, columns], ids and log-probs [tokens] or [tokens, k]. `sampler_logprobs` defaults to the
        student's own (sampled on-policy at temperature 1). Every token belongs to one sequence, in the order given.
        """
        student = LogitsView(student_logits, self._shard)
        if sampler_logprobs is None:
            sampler_logprobs = student.detach().logprob(token_ids)
        count = torch.arange(len(token_ids), device=token_ids.device)
        valid = torch.ones_like(token_ids, dtype=torch.bool)
        tokens = TokenBatch(
            position=count,
            ids=token_ids,
            sequence=torch.zeros_like(count),
            offset=count,
            author=torch.full_like(count, Author.STUDENT, dtype=torch.int8),
            policy_version=torch.zeros_like(count),
            sampler_logprobs=sampler_logprobs,
            advantage=torch.zeros_like(sampler_logprobs) if advantage is None else advantage,
            teacher_valid=valid if mask is None else mask.bool(),
            response_key=torch.zeros_like(count),
            teacher_sampled_logprobs=teacher_logprobs,
            teacher_ids=teacher_ids,
            teacher_id_logprobs=teacher_id_logprobs,
            teacher_base_logprobs=teacher_base_logprobs,
        )
        teacher = self._teacher(student, tokens, teacher_logits)
        known = None
        if isinstance(teacher, LogitsView) or (teacher is not None and teacher_logprobs is not None):
            known = teacher.logprob(token_ids).detach()
        whole = isinstance(teacher, LogitsView)
        scores = SampledScores(
            student.detach().logprob(token_ids),
            known,
            student.detach().entropy(),
            teacher.entropy() if teacher is not None and whole else None,
        )
        prepared = self.prepare(scores, tokens)
        losses = self.evaluate(student, teacher, tokens, prepared).losses
        masks = self.component_masks(tokens)
        total = student.logits.sum() * 0
        for name, loss in losses.items():
            counts = masks[name] & (valid if mask is None else mask.bool())
            total = total + self.coefficients.get(name, 1.0) * _mean(loss, counts)
        # Whoever differentiates on several ranks counts the loss once per rank: see nemo_opd.vocab.collectives.
        size = student.shard.size
        return total / size + (total * (1 - 1 / size)).detach()

    def _teacher(self, student: LogitsView, tokens: TokenBatch, teacher_logits: Tensor | None) -> VocabView | None:
        if self.needs.need == Need.NOTHING:
            return None
        if teacher_logits is not None:
            return LogitsView(teacher_logits.detach(), student.shard)
        return PartialView(
            student.vocab_size,
            tokens.ids,
            tokens.teacher_sampled_logprobs,
            tokens.teacher_ids,
            tokens.teacher_id_logprobs,
            ranked=self.needs.need == Need.TOP_K,
        )


class DistributionLoss(DistillationLoss):
    """A sum over the vocabulary or a support, which is differentiated. It can never be an advantage.

    Its author writes `token_losses`, or `evaluate` where the loss needs more than the two views.
    """

    def token_losses(self, student: VocabView, teacher: VocabView, tokens: TokenBatch) -> dict[str, Tensor]:
        """By component, the loss [tokens] in nats, differentiable with respect to the student's view."""
        raise NotImplementedError(f"{type(self).__name__} writes neither token_losses nor evaluate")

    def metrics(
        self, student: VocabView, teacher: VocabView, tokens: TokenBatch
    ) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Optional: values [tokens] and the tokens on which they count, by a name listed in `metric_names`."""
        return {}

    def evaluate(
        self, student: VocabView, teacher: VocabView | None, tokens: TokenBatch, prepared: Tensor | None
    ) -> Evaluation:
        assert teacher is not None
        losses = self.token_losses(student, teacher, tokens)
        with torch.no_grad():
            return Evaluation(losses, self.metrics(student.detach(), teacher, tokens))


class SampledTokenLoss(DistillationLoss):
    """A loss of the log-probability of the written token alone."""

    few = FewNumbers()

    @abstractmethod
    def sampled_losses(self, logprobs: Tensor, tokens: TokenBatch, prepared: Tensor | None) -> dict[str, Tensor]:
        """By component, the loss [tokens] of the student's log p(y) [tokens] (differentiable) and of what `prepare`
        made of the scores."""

    def evaluate(
        self, student: VocabView, teacher: VocabView | None, tokens: TokenBatch, prepared: Tensor | None
    ) -> Evaluation:
        return Evaluation(self.sampled_losses(student.logprob(tokens.ids), tokens, prepared))

    def evaluate_few(
        self,
        student: FewLogProbs,
        teacher: FewLogProbs | None,
        support: Support | None,
        tokens: TokenBatch,
        prepared: Tensor | None,
    ) -> Evaluation:
        assert student.written is not None
        return Evaluation(self.sampled_losses(student.written, tokens, prepared))


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts, values, 0.0).sum() / counts.sum().clamp(min=1)


def finite_scores(tokens: TokenBatch) -> Tensor:
    """bool [tokens]: every served log-probability is a number. -inf (an exact zero) and NaN are not."""
    finite = torch.ones_like(tokens.teacher_valid)
    for one in (tokens.teacher_sampled_logprobs, tokens.teacher_base_logprobs):
        if one is not None:
            finite = finite & one.isfinite()
    if tokens.teacher_id_logprobs is not None:
        finite = finite & tokens.teacher_id_logprobs.isfinite().all(1)
    return finite
