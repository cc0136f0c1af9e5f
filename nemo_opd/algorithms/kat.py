"""KAT: on-policy distillation that stops reading where the teacher agrees with degraded text.

The objective is that of plain on-policy distillation; only what it is a mean over changes. With d_t = KL(p_t || q_t) at
the t-th written token,

    z_t = mean of d over the last W tokens,    m = min over t >= W of z_t,    s = Quantile_{1-eta}(last 4096 m)
    C consecutive windows with z_t < s  ->  the rollout ends where the first of them starts

W = 64, C = 4, eta = 0.3; d over the vocabulary or the student's top 64 and a tail; active after 512 rollouts and 50
steps. **Reconstructed:** that s is the quantile 0.7 (so that about 70 % of rollouts hold a window below it, which fits
the reported shortening), that every whole window is tested (grace W, stride 1), and that m is the minimum over exactly
the tested windows. `nemo_opd/stop/rule.py` has the rule, `docs/algorithms.md` the controls without which a gain of
KAT says little: `stop=fixed` and `stop=length_matched`.

Source: Escaping the KL Agreement Trap in On-Policy Distillation, arXiv 2606.09471.
"""

from nemo_opd.algorithms.record import Algorithm
from nemo_opd.config import KatStop

KAT = Algorithm(name="kat", source="arXiv 2606.09471", slots={"stop": KatStop()})
