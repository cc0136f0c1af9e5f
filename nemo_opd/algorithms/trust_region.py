"""Trust region on-policy distillation, TrOPD.

The teacher accepts a token of the student's as in speculative decoding, with probability min(r, 1), r = q(y)/p(y).
With M ~ Bernoulli(min(r, 1)) and V_k the teacher's k most probable ids, to be maximised at a token:

    J = -M log(p(y)/q(y)) - (1 - M) sum over v in V_k of q_v log(q_v / p_v)

The first term is a policy gradient on sg[log q - log p]: its coefficient is min(r, 1) log r in the mean, at least
-1/e, so that a token which the teacher finds absurd makes no spike. For such tokens the second term says what to do
instead. The teacher moreover writes a prefix of each response, up to a largest length that falls to 0 over the run;
its tokens get 0.001 times a cross-entropy and never a policy gradient.

Reconstructed: the policy-gradient form of the first term, the unnormalised sum of the second, the bound of
`outlier=clip`, lengths drawn uniformly, and one token count per component.

Source: Xing et al., arXiv 2606.01249 (k 64, beta 0.001, 200 steps, lr 5e-6, 128 prompts x 4 rollouts of up to 8,096
tokens, which is a setting of the recipe).
"""

from nemo_opd.algorithms.record import Algorithm
from nemo_opd.config import TeacherPrefix, TrustRegionLoss

TRUST_REGION = Algorithm(
    name="trust_region",
    source="arXiv 2606.01249, forward KL on rejected tokens and off-policy guidance",
    slots={"prefix": TeacherPrefix(), "loss": TrustRegionLoss()},
    settings={
        "train.steps": 200,
        "train.prompts_per_step": 128,
        "rollout.samples_per_prompt": 4,
        "optimizer.lr": 5e-6,
    },
)
