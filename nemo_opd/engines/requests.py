"""What every scorer refuses at the call, on all ranks alike, before anything is computed."""

from __future__ import annotations

import torch

from nemo_opd.types import Need, ScoreRequest, TeacherNeeds


def check_needs(needs: TeacherNeeds, vocab_size: int) -> None:
    """Raises ValueError for a `k` beyond the `vocab_size` ids that scores are about, and for an entropy that goes
    beyond what is asked for."""
    if needs.entropy and needs.need is not Need.FULL:
        raise ValueError("the teacher's entropy is served with its whole distribution only (Need.FULL)")
    if needs.need in (Need.AT_IDS, Need.TOP_K) and not 1 <= needs.k <= vocab_size:
        raise ValueError(f"needs.k: got {needs.k}; expected 1 to the student's {vocab_size} ids")


def check_request(request: ScoreRequest, needs: TeacherNeeds, vocab_size: int, known_ids: int) -> None:
    """Scored ids lie below `vocab_size`, the student's; the context may use all `known_ids` of the teacher.

    Raises ValueError otherwise, for an empty context, and for `at_ids` that are missing or do not fit the response.
    """
    where = f"score request {request.key}"
    if not request.context_ids:
        raise ValueError(f"{where}: got an empty context; expected at least one token before the response")
    scored = request.response_ids.cpu()
    if needs.need is Need.AT_IDS:
        expected = (len(request.response_ids), needs.k)
        got = None if request.at_ids is None else tuple(request.at_ids.shape)
        if request.at_ids is None or got != expected:
            raise ValueError(f"{where}: got at_ids of shape {got}; expected {expected}")
        scored = torch.cat([scored, request.at_ids.cpu().flatten()])
    for what, whose, ids, limit in (
        ("context ids", "teacher", torch.tensor(request.context_ids), known_ids),
        ("response ids or at_ids", "student", scored, vocab_size),
    ):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
            found = f"{what} from {int(ids.min())} to {int(ids.max())}"
            raise ValueError(
                f"{where}: got {found}; expected ids below the {whose}'s {limit}; both must share their token ids"
            )
