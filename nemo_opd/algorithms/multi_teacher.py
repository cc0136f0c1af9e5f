"""Several teachers, each of whom scores the prompts of its own field.

Every record names its teacher i(x) in the field that `data.teacher_key` says; teachers stand under `teachers.NAME`,
each with its own model, layout and engine:

    L = (1/N) sum_t KL(p(. | x, y_<t) || q_i(x)(. | x, y_<t))

Without a key all teachers score everything and are mixed by their weights (divided by their sum):

    L = (1/N) sum_t sum_i w_i KL(p || q_i)  =  (1/N) sum_t KL(p || q*) + const,    q* ~ prod_i q_i^w_i

The constant (how far the teachers disagree among themselves) does not depend on p and is not in the reported loss. The
mixture is for losses that are linear in log q: reverse_kl, policy_gradient, k2.

Source: specialised teachers distilled into one student, as MiMo and DeepSeek-V4 are said to do. Which divergence they
use, and the weighted form, are reconstructions.
"""

from nemo_opd.algorithms.record import Algorithm
from nemo_opd.config import ReverseKLLoss

MULTI_TEACHER = Algorithm(
    name="multi_teacher",
    source="multi-teacher on-policy distillation, routed by a field of the record",
    slots={"loss": ReverseKLLoss()},
    settings={"data.teacher_key": "teacher"},
)
