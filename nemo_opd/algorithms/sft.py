"""Supervised fine-tuning: the data set writes the whole response y, and no teacher scores it.

    L = -(1/N) sum_t log p(y_t | x, y_<t)

The usual warm-up before going on-policy (Agarwal et al., arXiv 2306.13649, section 3; also stage (ii) of
arXiv 2605.11182, the student stabilised on teacher trajectories or a data set).
"""

from nemo_opd.algorithms.record import Algorithm
from nemo_opd.config import CrossEntropyLoss, DatasetPrefix

SFT = Algorithm(
    name="sft",
    source="maximum likelihood on written responses",
    slots={"prefix": DatasetPrefix(), "loss": CrossEntropyLoss()},
    settings={"teacher.engine": "none"},
)
