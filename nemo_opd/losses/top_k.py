"""What all losses on a support of k ids per token have in common.

Notation of the files that use it: S the support, P = sum_S p, Q = sum_S q, A_v = log p_v - log q_v. Over the whole
vocabulary ``grad sum_v p_v A_v = sum_v grad p_v A_v``, since the probabilities sum to 1. Cut down to S they do not:
``grad sum_S p_v A_v = sum_S grad p_v (A_v + 1)``, whose +1 pushes probability out of S ("naive" top-k). The
losses here mend that in different ways (arXiv 2605.11182). Their logit gradients are all

    dL/dz_u = p_u (B_u - sum_v p_v B_v),   B = A on S and, off S: stop_gradient 0, tail log(p_tail / q_tail),
                                           head_plus_sample A_y / mu_y at the sampled y and 0 elsewhere
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_opd.errors import ConfigError
from nemo_opd.losses.few import FewNumbersLoss
from nemo_opd.types import Need, TeacherNeeds, TokenBatch
from nemo_opd.vocab.objective import Evaluation
from nemo_opd.vocab.support import FewLogProbs, FewNumbers, Support

SUPPORTS = ("student", "teacher", "union", "intersection")


class OnSupport(NamedTuple):
    """Both models on a support: log-probabilities [tokens, k] (0 where `inside` is False), of the mass outside, and of
    the written token."""

    inside: Tensor
    log_p: Tensor
    log_q: Tensor
    p_tail: Tensor | None
    q_tail: Tensor | None
    p_written: Tensor | None
    q_written: Tensor | None
    support: Support


class TopKLoss(FewNumbersLoss):
    """A loss on a support.

    Args:
        k: ids per token and ranking.
        support: student, teacher, union or intersection of their k most probable ids.
        teacher: `full` reads both models' logits; `scores` works on what a served teacher reported: the student's top-k
            as it was when the request was made (support student), or the teacher's own top-k (support teacher, or its
            intersection with the student's). A union needs log q at ids of both, which no single request serves.

    A support is chosen by the current weights and is a constant for the gradient.
    """

    tail = False

    def __init__(self, k: int = 20, support: str = "student", teacher: str = "full") -> None:
        super().__init__()
        if k < 1:
            raise ConfigError("loss.k", k, "at least 1", "20 is what arXiv 2605.11182 uses")
        if support not in SUPPORTS:
            raise ConfigError("loss.support", support, f"one of {', '.join(SUPPORTS)}", "student is the usual choice")
        if teacher not in ("full", "scores"):
            raise ConfigError("loss.teacher", teacher, "full or scores", "full is exact, scores suits a served teacher")
        if teacher == "scores" and support == "union":
            raise ConfigError(
                "loss.support", "union", "student, teacher or intersection with loss.teacher=scores",
                "a served teacher scores one set of ids per request; use loss.teacher=full for the union",
            )  # fmt: skip
        self.k = k
        served = {"student": "served", "teacher": "served", "intersection": "student_in_served"}
        self.few = FewNumbers(served[support] if teacher == "scores" else support, k, self.tail)
        need = Need.FULL if teacher == "full" else Need.AT_IDS if support == "student" else Need.TOP_K
        self._needs = TeacherNeeds(need, 0 if teacher == "full" else k)

    @property
    def needs(self) -> TeacherNeeds:
        return self._needs

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*super().metric_names, "student_mass", "teacher_mass", "support_size")

    @abstractmethod
    def on_support(self, both: OnSupport, tokens: TokenBatch) -> Tensor:
        """The loss [tokens] on a support."""

    def evaluate_few(
        self,
        student: FewLogProbs,
        teacher: FewLogProbs | None,
        support: Support | None,
        tokens: TokenBatch,
        prepared: Tensor | None,
    ) -> Evaluation:
        assert teacher is not None and support is not None
        assert student.at_ids is not None and teacher.at_ids is not None
        inside = support.mask
        both = OnSupport(
            inside,
            torch.where(inside, student.at_ids, 0.0),
            torch.where(inside, teacher.at_ids, 0.0),
            student.tail,
            teacher.tail,
            student.written,
            teacher.written,
            support,
        )
        losses = {self.name: self.on_support(both, tokens)}
        known = tokens.teacher_valid
        return Evaluation(
            losses,
            {
                "student_mass": (masked_sum(both.log_p.detach().exp(), inside), known),
                "teacher_mass": (masked_sum(both.log_q.exp(), inside), known),
                "support_size": (inside.sum(1).to(both.log_p.dtype), known),
            },
        )


class NormalisedTopKLoss(TopKLoss):
    """A divergence of two distributions that are made whole in some way: reverse, forward or jsd.

    Args:
        divergence, beta: see `divergence_of`.
    """

    def __init__(
        self,
        k: int = 20,
        support: str = "student",
        teacher: str = "full",
        divergence: str = "reverse",
        beta: float = 0.5,
    ) -> None:
        super().__init__(k, support, teacher)
        check_divergence(divergence, beta)
        self.kind, self.beta = divergence, beta

    def divergence_between(self, log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
        return divergence_of(log_p, log_q, mask, self.kind, self.beta)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the last axis of the entries where `mask` is True; the others may hold anything finite."""
    return torch.where(mask, values, 0.0).sum(-1)


DIVERGENCES = ("reverse", "forward", "jsd")


def check_divergence(divergence: str, beta: float) -> None:
    """Refuse a divergence that the normalised losses do not have.

    Raises:
        ConfigError: unknown divergence, or a beta outside [0, 1].
    """
    if divergence not in DIVERGENCES:
        raise ConfigError("loss.divergence", divergence, f"one of {', '.join(DIVERGENCES)}", "reverse is the default")
    if not 0.0 <= beta <= 1.0:
        raise ConfigError("loss.beta", beta, "a number from 0 (forward KL) to 1 (reverse KL)", "0.5 is symmetric")


def divergence_of(log_p: Tensor, log_q: Tensor, mask: Tensor, divergence: str, beta: float) -> Tensor:
    """Divergence of two normalised distributions over the last axis, [tokens]; entries off `mask` have probability 0.

    reverse KL(p || q), forward KL(q || p), or jsd: b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p, whose
    endpoints are forward (b = 0) and reverse (b = 1) KL, its limits divided by b and 1 - b.
    """
    if divergence == "forward" or (divergence == "jsd" and beta == 0.0):
        return masked_sum(log_q.exp() * (log_q - log_p), mask)
    if divergence == "reverse" or beta == 1.0:
        return masked_sum(log_p.exp() * (log_p - log_q), mask)
    share = torch.tensor(beta, dtype=log_p.dtype, device=log_p.device)
    log_m = torch.logaddexp(log_q + share.log(), log_p + torch.log1p(-share))
    to_teacher = masked_sum(log_q.exp() * (log_q - log_m), mask)
    return beta * to_teacher + (1.0 - beta) * masked_sum(log_p.exp() * (log_p - log_m), mask)
