"""Trust region on-policy distillation (TrOPD, Xing et al., arXiv 2606.01249)."""

from __future__ import annotations

from torch import Tensor

from nemo_opd.errors import ConfigError
from nemo_opd.losses.few import FewNumbersLoss, forward_kl_on
from nemo_opd.losses.ratio import check_importance_ratio, importance_ratio
from nemo_opd.losses.registry import register_loss
from nemo_opd.types import Need, TeacherNeeds, TokenBatch
from nemo_opd.vocab.noise import uniform
from nemo_opd.vocab.objective import Evaluation
from nemo_opd.vocab.support import FewLogProbs, FewNumbers, Support

TRUST = ("sampled", "expected")
OUTLIERS = ("forward_kl", "mask", "clip")


@register_loss("trust_region")
class TrustRegion(FewNumbersLoss):
    """The teacher accepts a written token as in speculative decoding, with r = q(y) / p(y) detached:

        M ~ Bernoulli(min(r, 1)),   L = -M w sg[log r]  +  (1 - M) sg[w] F,   w = p(y) / sg[mu(y)]

    The first component, `trust`, is a policy gradient on sg[log q - log p] (a reconstruction: differentiating the
    masked log-ratio itself would have the expected gradient -sum_v min(p_v, q_v) grad log p_v, which is that of
    nothing in the paper). Over M its coefficient is min(r, 1) log r, at least -1/e: an outlier cannot make a spike.
    The second, `outlier`, is a loss of the rejected tokens. Both are divided by the number of *all* counted tokens,
    as the sum of the two is one objective per token; which tokens are rejected is known only when they are scored.

    Zero at match: there r = 1 and no token is rejected, so that nothing of the outlier term is left, whose
    gradient by itself would not vanish.

    Args:
        trust: `sampled` draws M, by the token's address (`TokenBatch.response_key`, offset): the same whatever the
            layout, up to tokens whose r is within rounding of the number drawn. `expected` puts min(r, 1) in M's
            place: the same mean, less variance.
        outlier: F of a rejected token. `forward_kl`: sum over the teacher's top-k of q log(q / p), as printed in the
            paper, where it is not normalised (a reconstruction: k ids do not sum to 1); `clip`: the policy gradient
            with the advantage held above -`outlier_clip` (a reconstruction: the paper's bound could not be read);
            `mask`: nothing.
        k, tail: of `forward_kl`; `tail` adds the bucket of all other ids, which makes F a divergence.
        importance_ratio: `sampler` as above; `none`: w = 1 with gradient grad log p(y), for a correction in the
            weight slot.
    """

    def __init__(
        self,
        trust: str = "sampled",
        outlier: str = "forward_kl",
        k: int = 64,
        tail: bool = False,
        outlier_clip: float = 1.0,
        importance_ratio: str = "sampler",
    ) -> None:
        super().__init__()
        _check(trust, outlier, k, outlier_clip)
        check_importance_ratio(importance_ratio)
        self.trust, self.outlier, self.outlier_clip = trust, outlier, outlier_clip
        self.importance_ratio = importance_ratio
        self.few = FewNumbers("teacher", k, tail) if outlier == "forward_kl" else FewNumbers()

    @property
    def needs(self) -> TeacherNeeds:
        return TeacherNeeds(Need.FULL if self.outlier == "forward_kl" else Need.SAMPLED)

    @property
    def components(self) -> tuple[str, ...]:
        return ("trust",) if self.outlier == "mask" else ("trust", "outlier")

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*super().metric_names, "rejected", *(("teacher_mass",) if self.outlier == "forward_kl" else ()))

    def counted(self, tokens: TokenBatch) -> Tensor:
        return super().counted(tokens) & tokens.sampler_logprobs.isfinite()

    def evaluate_few(
        self,
        student: FewLogProbs,
        teacher: FewLogProbs | None,
        support: Support | None,
        tokens: TokenBatch,
        prepared: Tensor | None,
    ) -> Evaluation:
        assert student.written is not None and teacher is not None and teacher.written is not None
        log_r = teacher.written - student.written.detach()
        trusted = self.trusted(log_r, tokens)
        ratio = importance_ratio(student.written, tokens, self.importance_ratio)
        losses = {"trust": -trusted * ratio * log_r}
        known = self.counted(tokens)
        metrics = {"rejected": (1.0 - trusted, known)}
        if self.outlier == "clip":
            losses["outlier"] = -(1.0 - trusted) * ratio * log_r.clamp(min=-self.outlier_clip)
        elif self.outlier == "forward_kl":
            assert teacher.at_ids is not None
            losses["outlier"] = (1.0 - trusted) * ratio.detach() * forward_kl_on(student, teacher)
            metrics["teacher_mass"] = (teacher.at_ids.exp().sum(1), known)
        return Evaluation(losses, metrics)

    def trusted(self, log_r: Tensor, tokens: TokenBatch) -> Tensor:
        """M, or its mean, in [0, 1] for log q - log p of the written tokens [tokens]."""
        acceptance = log_r.clamp(max=0.0).exp()
        if self.trust == "expected":
            return acceptance
        if tokens.response_key is None:
            raise ValueError("trust=sampled draws by TokenBatch.response_key, which is None; use trust=expected")
        return (uniform(tokens.response_key, tokens.offset) < acceptance).to(log_r.dtype)


def _check(trust: str, outlier: str, k: int, outlier_clip: float) -> None:
    if trust not in TRUST:
        raise ConfigError("loss.trust", trust, f"one of {', '.join(TRUST)}", "sampled is the paper's")
    if outlier not in OUTLIERS:
        raise ConfigError("loss.outlier", outlier, f"one of {', '.join(OUTLIERS)}", "forward_kl is the paper's choice")
    if k < 1:
        raise ConfigError("loss.k", k, "at least 1", "64 is the paper's")
    if outlier_clip <= 0.0:
        raise ConfigError("loss.outlier_clip", outlier_clip, "a positive number of nats", "1 is the default")
