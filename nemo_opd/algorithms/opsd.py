"""On-policy self-distillation (OPSD): the teacher is the student itself, with privileged information I in its prompt.

    y ~ p(. | x)        L = (1/N) sum_t D(p(. | x, y_<t), sg[p_T(. | x + I, y_<t)])        D generalised JSD, beta 1/2

p_T has the student's weights as they were at the start (`teacher.source=frozen`; `current` and `ema` are the others).
The recipe says what I is: `context.field` (of the record) or `context.text` (a rule for all).

What can be learnt: over the I that the student cannot tell apart the best student is the normalised geometric mean
p* ~ exp(E_I log p_T(. | x, I)) for reverse KL, the arithmetic mean for forward KL. A rule that all prompts share is
learnt; this record's answer is not, and the loss stops at a plateau above 0. The loss itself is that diagnostic:
`train/kl` (reverse) and `loss/jsd` that no longer fall are the plateau, while `teacher_entropy` says how sure p_T is.

Source: arXiv 2605.11182. Its settings: sampling at temperature 1, top-p 0.95, Adam betas (0.9, 0.98), learning rate
2e-6 with cosine decay, 4096 tokens.
"""

from nemo_opd.algorithms.record import Algorithm
from nemo_opd.config import JSDLoss, PrivilegedContext

OPSD = Algorithm(
    name="opsd",
    source="arXiv 2605.11182, self-distillation from privileged information",
    slots={"context": PrivilegedContext(), "loss": JSDLoss(beta=0.5)},
    settings={
        "teacher.source": "frozen",
        "rollout.temperature": 1.0,
        "rollout.top_p": 0.95,
        "rollout.max_new_tokens": 4096,
        "optimizer.lr": 2e-6,
        "optimizer.decay": "cosine",
        "optimizer.adam_beta1": 0.9,
        "optimizer.adam_beta2": 0.98,
    },
)
