"""IW-OPD: early disagreement counts more.

The policy-gradient form with a weight on each token that falls along the response as the disagreement
|A_i| = |log q(y_i) - log p(y_i)| is used up:

    w_t = 1 + gamma (1 - sum_{i < t} |A_i| / sum_i |A_i|),   gamma = 0.5

Source: arXiv 2606.22600.
"""

from nemo_opd.algorithms.record import Algorithm
from nemo_opd.config import PolicyGradientLoss, PrefixWeight

IMPORTANCE_WEIGHTED_OPD = Algorithm(
    name="importance_weighted_opd",
    source="arXiv 2606.22600, weights by the disagreement before a token",
    slots={"loss": PolicyGradientLoss(), "weight": PrefixWeight(gamma=0.5)},
)
