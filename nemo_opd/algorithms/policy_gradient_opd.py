"""On-policy distillation, policy-gradient form.

The teacher is asked only for the log-probability of the token that the student sampled. With mu the distribution that
the token was really drawn from,

    A_t = -sg[log p(y_t) - log q(y_t)]          L = -(1/N) sum_t ratio_t A_t,    ratio_t = p(y_t) / sg[mu(y_t)]

whose expectation has the gradient of reverse KL per position: same direction as the exact form, more variance, far
less to transfer from a served teacher. The reward uses the trainer's log p, not the sampler's.

Source: the single-token reward -log(p/q) of Gu et al., MiniLLM, arXiv 2306.08543, without its return-to-go.
"""

from nemo_opd.algorithms.record import Algorithm
from nemo_opd.config import PolicyGradientLoss

POLICY_GRADIENT_OPD = Algorithm(
    name="policy_gradient_opd",
    source="arXiv 2306.08543, per-token reward without return-to-go",
    slots={"loss": PolicyGradientLoss()},
)
