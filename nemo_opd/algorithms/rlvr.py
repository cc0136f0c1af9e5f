"""Reinforcement learning from verifiable rewards (RLVR): no teacher, the verifier says what was right.

G responses per prompt, r_i their rewards, mu what a token was really drawn from:

    A_i = (r_i - mean(r)) / (std(r) + eps)        ratio_it = p(y_it | x, y_i,<t) / mu(y_it)
    L = -(1/N) sum_i sum_t min(ratio_it A_i, clip(ratio_it, 1 - low, 1 + high) A_i)

N counts the tokens of groups whose rewards differ. It is stage (i) of arXiv 2605.11182, which adapts the teacher before
distilling. A KL to the starting model: ``loss=k2 teacher.engine=megatron teacher.source=frozen reward.loss_weight=B``
(sampled) or the same with ``loss=reverse_kl`` (exact), B the coefficient.

Source: GRPO, arXiv 2402.03300 (G = 64, KL coefficient 0.04, learning rate 1e-6, outcome rewards); averaged over all
tokens of the step as in DAPO, arXiv 2503.14476. What arXiv 2605.11182 itself used is a reconstruction.
"""

from nemo_opd.algorithms.record import Algorithm
from nemo_opd.config import GroupRelativeReward, VerifierPolicyGradientLoss

RLVR = Algorithm(
    name="rlvr",
    source="arXiv 2402.03300, group-relative policy gradient on the verifier's reward",
    slots={
        "loss": VerifierPolicyGradientLoss(),
        "reward": GroupRelativeReward(divide_by_std=True, clip_low=0.2, clip_high=0.2),
    },
    settings={"teacher.engine": "none", "rollout.samples_per_prompt": 8, "optimizer.lr": 1e-6},
)
