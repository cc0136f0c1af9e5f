"""The `stop` slot's choice, built."""

from __future__ import annotations

from nemo_opd.config import DefaultStop, FixedStop, KatStop, LengthMatchedStop, SlotConfig
from nemo_opd.processes import Processes
from nemo_opd.stop.base import NoStop, StopRule
from nemo_opd.stop.divergence import Measure
from nemo_opd.stop.fixed import FixedLength
from nemo_opd.stop.kat import KatAfter, TrapWatch
from nemo_opd.stop.length_matched import LengthMatched
from nemo_opd.stop.segments import KatSegments
from nemo_opd.teacher.contexts import TeacherContext


def build_stop(
    slot: SlotConfig,
    context: TeacherContext,
    processes: Processes,
    seed: int,
    measure: Measure | None = None,
) -> StopRule:
    """The stop rule that a recipe names.

    Args:
        context: what the teacher sees.
        seed: of the run.
        measure: of the divergence between student and teacher, for the rules that look at it.
    """
    if isinstance(slot, FixedStop):
        return FixedLength(slot.length)
    if isinstance(slot, DefaultStop):
        return NoStop()
    assert isinstance(slot, KatStop | LengthMatchedStop) and measure is not None, slot
    watch = TrapWatch(slot, measure)
    if isinstance(slot, LengthMatchedStop):
        return LengthMatched(watch, slot.tolerance, seed)
    if slot.form == "after":
        return KatAfter(watch)
    return KatSegments(watch, context, slot.segment_tokens, processes)
