"""The sequence-level reverse KL as MiniLLM takes it apart (Gu et al., arXiv 2306.08543)."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_opd.errors import ConfigError
from nemo_opd.losses.base import DistributionLoss
from nemo_opd.losses.ratio import importance_ratio
from nemo_opd.losses.registry import register_loss
from nemo_opd.types import Need, TeacherNeeds, TokenBatch
from nemo_opd.vocab.objective import Evaluation, SampledScores
from nemo_opd.vocab.row import discounted_return
from nemo_opd.vocab.view import VocabView


@register_loss("minillm")
class MiniLLM(DistributionLoss):
    """sg[w_t] KL(p_t || q_t) - w_t sg[R_t], with w_t = p(y_t) / sg[mu(y_t)] and the return of what comes later,
    R_t = sum over s > t of g^(s-t) (log q(y_s) - log p(y_s)).

    The first component, `single_step`, is the exact gradient of what the token at t costs by itself; the second,
    `long_term`, a policy gradient on what came later of the response, detached. With w = 1, g = 1 and no length
    normalisation their sum is the gradient of the sequence-level KL. mu may be a mixture with the teacher
    (`prefix: teacher_mixed`), with which 0 < w <= 1 / (1 - alpha); as in the paper w is that of the token alone, not
    the product over the prefix, and so is biased where mu is not p.

    Runs through autograd inside the chunk, with a pass without gradients before it (a return needs the whole row).

    Args:
        discount: g.
        length_normalised: R divided by the sum of its g^(s-t): long responses are not punished for their length.
        clip_ratio: c of PPO's clipping of w in the second component; None does not clip.
    """

    needs = TeacherNeeds(Need.FULL)
    whole_row = True

    def __init__(self, discount: float = 1.0, length_normalised: bool = True, clip_ratio: float | None = 0.2) -> None:
        super().__init__()
        if not 0.0 < discount <= 1.0:
            raise ConfigError("loss.discount", discount, "a number above 0, up to 1", "reverse_kl has no return at all")
        if clip_ratio is not None and not 0.0 < clip_ratio < 1.0:
            raise ConfigError("loss.clip_ratio", clip_ratio, "a number between 0 and 1, or null", "0.2 is PPO's")
        self.discount, self.length_normalised, self.clip_ratio = discount, length_normalised, clip_ratio

    @property
    def components(self) -> tuple[str, ...]:
        return ("single_step", "long_term")

    def counted(self, tokens: TokenBatch) -> Tensor:
        return super().counted(tokens) & tokens.sampler_logprobs.isfinite()

    def prepare(self, scores: SampledScores, tokens: TokenBatch) -> Tensor:
        """R [tokens], nats; 0 at the last token of a response."""
        assert scores.teacher is not None
        counted = self.counted(tokens)
        own = torch.where(counted, scores.teacher - scores.student, 0.0)
        later = discounted_return(own, counted, tokens, self.discount) - own
        if not self.length_normalised:
            return later
        ones = counted.to(own.dtype)
        terms = discounted_return(ones, counted, tokens, self.discount) - ones
        return torch.where(terms > 0.0, later / terms.clamp(min=torch.finfo(own.dtype).tiny), 0.0)

    def evaluate(
        self, student: VocabView, teacher: VocabView | None, tokens: TokenBatch, prepared: Tensor | None
    ) -> Evaluation:
        assert teacher is not None and prepared is not None
        ratio = importance_ratio(student.logprob(tokens.ids), tokens, "sampler")
        gain = ratio * prepared
        if self.clip_ratio is not None:
            clipped = ratio.clamp(1.0 - self.clip_ratio, 1.0 + self.clip_ratio) * prepared
            gain = torch.minimum(gain, clipped)
        return Evaluation({"single_step": ratio.detach() * student.expectation(torch.sub, teacher), "long_term": -gain})
