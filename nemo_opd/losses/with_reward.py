"""A loss that learns from a teacher, and the verifier's policy gradient beside it (the `reward` slot)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nemo_opd.config import GroupRelativeReward, SlotConfig
from nemo_opd.losses.base import DistillationLoss
from nemo_opd.losses.verifier_policy_gradient import VerifierPolicyGradient
from nemo_opd.types import TeacherNeeds, TokenBatch
from nemo_opd.vocab.objective import Evaluation, SampledScores
from nemo_opd.vocab.support import FewLogProbs, Support
from nemo_opd.vocab.view import VocabView


class WithReward(DistillationLoss):
    """loss_weight L + weight L_reward, on the same tokens and logits, each component over its own token count.

    A token without a teacher score still learns from its reward, one without an advantage still from the teacher.
    Factors of the `weight` slot are not applied to L_reward, which has an importance ratio of its own.
    """

    name = "with_reward"
    zero_at_match = False

    def __init__(self, main: DistillationLoss, beside: DistillationLoss, loss_weight: float, weight: float) -> None:
        super().__init__()
        self.main, self.term = main, beside
        self.beside = beside
        self.divergence, self.few, self.whole_row = main.divergence, main.few, main.whole_row
        self.coefficients = {
            **dict.fromkeys(main.components, loss_weight),
            **dict.fromkeys(beside.components, weight),
        }
        self.unweighted = frozenset(beside.components)

    @property
    def needs(self) -> TeacherNeeds:
        return self.main.needs

    @property
    def components(self) -> tuple[str, ...]:
        return (*self.main.components, *self.term.components)

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*self.main.metric_names, *self.term.metric_names)

    def component_masks(self, tokens: TokenBatch) -> dict[str, Tensor]:
        return {**self.main.component_masks(tokens), **self.term.component_masks(tokens)}

    def token_metrics(self, tokens: TokenBatch) -> Mapping[str, tuple[Tensor, Tensor]]:
        return self.main.token_metrics(tokens)

    def prepare(self, scores: SampledScores, tokens: TokenBatch) -> Tensor | None:
        return self.main.prepare(scores, tokens)

    def evaluate(
        self, student: VocabView, teacher: VocabView | None, tokens: TokenBatch, prepared: Tensor | None
    ) -> Evaluation:
        main = self.main.evaluate(student, teacher, tokens, prepared)
        return _both(main, self.term.evaluate(student, None, tokens, None))

    def evaluate_few(
        self,
        student: FewLogProbs,
        teacher: FewLogProbs | None,
        support: Support | None,
        tokens: TokenBatch,
        prepared: Tensor | None,
    ) -> Evaluation:
        main = self.main.evaluate_few(student, teacher, support, tokens, prepared)
        return _both(main, self.term.evaluate_few(student, None, None, tokens, None))


def _both(one: Evaluation, other: Evaluation) -> Evaluation:
    return Evaluation({**one.losses, **other.losses}, {**one.metrics, **other.metrics})


def with_reward(loss: DistillationLoss, reward: SlotConfig) -> DistillationLoss:
    """What a run minimises, given its loss and its `reward` slot; the loss itself where nothing is learnt from rewards.

    For loss `verifier_policy_gradient` the slot has the parameters and there is nothing else to minimise.
    """
    if not isinstance(reward, GroupRelativeReward):
        return loss
    term = VerifierPolicyGradient(reward.clip_low, reward.clip_high)
    if isinstance(loss, VerifierPolicyGradient):
        term.coefficients = dict.fromkeys(term.components, reward.weight)
        return term
    return WithReward(loss, term, reward.loss_weight, reward.weight)
