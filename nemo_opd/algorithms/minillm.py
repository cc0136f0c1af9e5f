"""MiniLLM: the gradient of the sequence-level reverse KL, taken apart.

Tokens are drawn from a mixture, mu = alpha q + (1 - alpha) p with alpha = 0.2, so that a student that is far off still
sees what the teacher would write; w_t = p(y_t) / mu(y_t) corrects for it. At a token

    L_t = sg[w_t] KL(p_t || q_t) - w_t sg[R_t],    R_t = mean over s > t of (log q(y_s) - log p(y_s))

first what this token costs, exactly over the vocabulary, then a policy gradient on the mean of what follows (the mean
keeps long responses from being punished for their length), with PPO's clipping of w_t at 0.2. The paper's third term,
language modelling on the pre-training corpus, is `prefix=mixed` with `prefix.loss=cross_entropy`, which replaces the
mixture; both at once are not offered.

Source: Gu et al., arXiv 2306.08543, sections 2.2 and 2.3.
"""

from nemo_opd.algorithms.record import Algorithm
from nemo_opd.config import MiniLLMLoss, TeacherMixedPrefix

MINILLM = Algorithm(
    name="minillm",
    source="arXiv 2306.08543, teacher-mixed sampling, single-step term and length-normalised return",
    slots={"prefix": TeacherMixedPrefix(teacher_share=0.2), "loss": MiniLLMLoss()},
)
