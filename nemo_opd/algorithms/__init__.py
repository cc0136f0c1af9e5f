"""Named algorithms: each a small file with its formula, its source and a record that fills the slots."""

from nemo_opd.algorithms.entropy_aware_opd import ENTROPY_AWARE_OPD
from nemo_opd.algorithms.extrapolated_opd import EXTRAPOLATED_OPD
from nemo_opd.algorithms.gkd import GKD
from nemo_opd.algorithms.importance_weighted_opd import IMPORTANCE_WEIGHTED_OPD
from nemo_opd.algorithms.kat import KAT
from nemo_opd.algorithms.minillm import MINILLM
from nemo_opd.algorithms.multi_teacher import MULTI_TEACHER
from nemo_opd.algorithms.opd import OPD
from nemo_opd.algorithms.opsd import OPSD
from nemo_opd.algorithms.peer_conditioned import PEER_CONDITIONED
from nemo_opd.algorithms.policy_gradient_opd import POLICY_GRADIENT_OPD
from nemo_opd.algorithms.record import Algorithm
from nemo_opd.algorithms.reopold import REOPOLD
from nemo_opd.algorithms.rlvr import RLVR
from nemo_opd.algorithms.sft import SFT
from nemo_opd.algorithms.trust_region import TRUST_REGION

ALGORITHMS: dict[str, Algorithm] = {
    record.name: record
    for record in (
        ENTROPY_AWARE_OPD,
        EXTRAPOLATED_OPD,
        GKD,
        IMPORTANCE_WEIGHTED_OPD,
        KAT,
        MINILLM,
        MULTI_TEACHER,
        OPD,
        OPSD,
        PEER_CONDITIONED,
        POLICY_GRADIENT_OPD,
        REOPOLD,
        RLVR,
        SFT,
        TRUST_REGION,
    )
}
"""What `algorithm: NAME` may say."""
