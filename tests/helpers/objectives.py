"""Losses that are there to test what is around a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_opd.losses import DistributionLoss, SampledTokenLoss
from nemo_opd.types import Need, TeacherNeeds, TokenBatch
from nemo_opd.vocab.view import VocabView


class AdvantageCrossEntropy(SampledTokenLoss):
    """-A log p(y), for the A that stands in the batch, NaN included."""

    name = "cross_entropy"
    needs = TeacherNeeds(Need.NOTHING)

    def sampled_losses(self, logprobs: Tensor, tokens: TokenBatch, prepared: Tensor | None) -> dict[str, Tensor]:
        return {self.name: -tokens.advantage * logprobs}


class ReverseKLAndEvenCrossEntropy(DistributionLoss):
    """KL(p || q) on every token, and -log p on the tokens with an even id: two components with counts of their own."""

    name = "two_components"
    needs = TeacherNeeds(Need.FULL)
    components = ("kl", "even")

    def component_masks(self, tokens: TokenBatch) -> dict[str, Tensor]:
        counted = self.counted(tokens)
        return {"kl": counted, "even": counted & (tokens.ids % 2 == 0)}

    def token_losses(self, student: VocabView, teacher: VocabView, tokens: TokenBatch) -> dict[str, Tensor]:
        return {"kl": student.expectation(torch.sub, teacher), "even": -student.logprob(tokens.ids)}
