"""On-policy distillation that covers the teacher's choices where it has several (Jin et al., arXiv 2603.07079)."""

from __future__ import annotations

from torch import Tensor

from nemo_opd.errors import ConfigError
from nemo_opd.losses.few import FewNumbersLoss, forward_kl_on
from nemo_opd.losses.ratio import check_importance_ratio, importance_ratio
from nemo_opd.losses.registry import register_loss
from nemo_opd.types import Need, TeacherNeeds, TokenBatch
from nemo_opd.vocab.objective import Evaluation, SampledScores
from nemo_opd.vocab.support import FewLogProbs, FewNumbers, Support

OUTSIDE = ("tail", "renormalised")


@register_loss("entropy_aware")
class EntropyAware(FewNumbersLoss):
    """-w sg[log q(y) - log p(y)] + 1[H(q) > h] F,  w = p(y) / sg[mu(y)], F the forward KL on the teacher's top-k.

    Reverse KL, of which the first component is one sample, settles on one of several good tokens; where the teacher's
    entropy H is above h, forward KL keeps the others. Both components are divided by the number of all counted tokens.

    Args:
        entropy_threshold: h, nats.
        k: ids of F.
        outside: what F makes of the other ids (a reconstruction; a bare sum over k ids would not vanish at match):
            `tail`, one more bucket, or `renormalised`, both models within the k ids.
        importance_ratio: `sampler` as above; `none`: w = 1, for a correction in the weight slot. F has no ratio: it
            does not depend on the token that was drawn at its position.
    """

    needs = TeacherNeeds(Need.FULL)

    def __init__(
        self, entropy_threshold: float = 0.8, k: int = 16, outside: str = "tail", importance_ratio: str = "sampler"
    ) -> None:
        super().__init__()
        check_importance_ratio(importance_ratio)
        if outside not in OUTSIDE:
            raise ConfigError("loss.outside", outside, f"one of {', '.join(OUTSIDE)}", "tail is a lower bound of KL")
        if k < 1:
            raise ConfigError("loss.k", k, "at least 1", "16 is the paper's")
        if entropy_threshold < 0.0:
            raise ConfigError("loss.entropy_threshold", entropy_threshold, "at least 0 nats", "0.8 is the paper's")
        self.entropy_threshold, self.outside, self.importance_ratio = entropy_threshold, outside, importance_ratio
        self.few = FewNumbers("teacher", k, outside == "tail")

    @property
    def components(self) -> tuple[str, ...]:
        return ("policy_gradient", "forward_kl")

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*super().metric_names, "teacher_hesitates", "teacher_mass")

    def counted(self, tokens: TokenBatch) -> Tensor:
        return super().counted(tokens) & tokens.sampler_logprobs.isfinite()

    def prepare(self, scores: SampledScores, tokens: TokenBatch) -> Tensor:
        """1 where the teacher's entropy is above the threshold."""
        assert scores.teacher_entropy is not None
        return (scores.teacher_entropy > self.entropy_threshold).to(scores.student.dtype)

    def evaluate_few(
        self,
        student: FewLogProbs,
        teacher: FewLogProbs | None,
        support: Support | None,
        tokens: TokenBatch,
        prepared: Tensor | None,
    ) -> Evaluation:
        assert teacher is not None and prepared is not None
        assert student.written is not None and teacher.written is not None and teacher.at_ids is not None
        log_r = teacher.written - student.written.detach()
        losses = {
            "policy_gradient": -importance_ratio(student.written, tokens, self.importance_ratio) * log_r,
            "forward_kl": prepared * self._forward_kl(student, teacher),
        }
        known = self.counted(tokens)
        return Evaluation(
            losses, {"teacher_hesitates": (prepared, known), "teacher_mass": (teacher.at_ids.exp().sum(1), known)}
        )

    def _forward_kl(self, student: FewLogProbs, teacher: FewLogProbs) -> Tensor:
        if self.outside == "tail":
            return forward_kl_on(student, teacher)
        assert student.at_ids is not None and teacher.at_ids is not None
        within = [FewLogProbs(few.log_softmax(1), None, None) for few in (student.at_ids, teacher.at_ids)]
        return forward_kl_on(*within)
