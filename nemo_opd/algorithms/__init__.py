"""Named algorithms: each a small file with its formula, its source and a record that fills the slots."""

from nemo_opd.algorithms.kat import KAT
from nemo_opd.algorithms.opd import OPD
from nemo_opd.algorithms.policy_gradient_opd import POLICY_GRADIENT_OPD
from nemo_opd.algorithms.record import Algorithm
from nemo_opd.algorithms.sft import SFT

ALGORITHMS: dict[str, Algorithm] = {record.name: record for record in (KAT, OPD, POLICY_GRADIENT_OPD, SFT)}
"""What `algorithm: NAME` may say."""
