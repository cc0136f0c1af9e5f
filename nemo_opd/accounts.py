"""What a step's metrics say of rewards, tokens and rejected updates, with their totals since the start of the run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from nemo_opd.checkpoint.store import RunState
from nemo_opd.config import NoReward, SlotConfig
from nemo_opd.processes import Processes
from nemo_opd.reliability.guard import Guard
from nemo_opd.rollout.advantages import groups, says_nothing
from nemo_opd.types import Rollout, TrainStats

log = logging.getLogger(__name__)


def counted(state: RunState, step: Mapping[str, float]) -> dict[str, float]:
    """The same numbers, and as ``<name>_total`` their sums since the start of the run, kept in its state."""
    for name, value in step.items():
        state.counters[name] = state.counters.get(name, 0.0) + value
    return {**step, **{f"{name}_total": state.counters[name] for name in step}}


def rejection(processes: Processes, guard: Guard, state: RunState, stats: TrainStats) -> dict[str, float]:
    """Counts what the guard rejected; of an update that was not finite the log names the ranks where that began.

    Collective where the update was left out, which all ranks know.
    """
    if stats.skipped:
        broken = processes.gather_text(stats.broken)
        first = next((kind for kind in ("loss", "gradient") if kind in broken), "")
        ranks = ", ".join(str(rank) for rank, kind in enumerate(broken) if kind == first)
        where = f"; first not finite: the {first} of rank {ranks}" if first else ""
        limit = guard.max_in_a_row
        row = f"{guard.in_a_row} in a row" + (f" of at most {limit}" if limit else "")
        log.warning("step %d: update left out (%s): %s%s", state.step, row, guard.last.reason, where)
    found = {f"guard/{name}": value for name, value in counted(state, {"rejected": float(stats.skipped)}).items()}
    return {**found, "guard/in_a_row": float(guard.in_a_row)}


def applied(metrics: Mapping[str, float]) -> Mapping[str, float]:
    """What the diagnosis may remember: of an update that was left out, only what is known of its rollouts."""
    if not metrics.get("guard/rejected"):
        return metrics
    return {name: v for name, v in metrics.items() if not name.startswith(("loss/", "train/", "optimizer/"))}


def reward_metrics(
    reward: SlotConfig, state: RunState, rollouts: Sequence[Rollout], passed_over: Sequence[Rollout]
) -> dict[str, float]:
    """Prompts whose responses all got the same reward, of all that were written, and those that were passed over for
    it; with their totals since the start of the run."""
    if isinstance(reward, NoReward):
        return {}
    every = [[r[i] for i in members] for r in (rollouts, passed_over) for members in groups(r).values()]
    found = {"equal_groups": sum(map(says_nothing, every)), "passed_over_groups": len(groups(passed_over))}
    return {f"reward/{name}": value for name, value in counted(state, found).items()}


def token_metrics(
    state: RunState,
    rollouts: Sequence[Rollout],
    passed_over: Sequence[Rollout],
    contexts: Sequence[tuple[int, ...] | None],
    counts: Mapping[str, float],
    discarded: int,
) -> dict[str, float]:
    """Tokens of this step, and their totals since the start of the run.

    `written` counts rollouts that were passed over too. `without_context` are those that the teacher was not asked
    about, `dropped` those whose score did not arrive; `discarded` were written, but the stop rule cut them off.
    """
    pairs = zip(rollouts, contexts, strict=True)
    silent = float(sum(int(rollout.loss_mask.sum()) for rollout, context in pairs if context is None))
    step = {
        "written": float(sum(int((r.policy_version >= 0).sum()) for r in [*rollouts, *passed_over]) + discarded),
        "trained": counts["trained"],
        "dropped": counts["dropped"] - silent,
        "without_context": silent,
        "discarded": float(discarded),
    }
    share = step["dropped"] / max(1.0, step["trained"] + step["dropped"])
    return {**{f"tokens/{name}": value for name, value in counted(state, step).items()}, "tokens/dropped_share": share}
