"""A plan as a person reads it, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from nemo_opd.planning.alternatives import Alternative
from nemo_opd.planning.gpus import GIB
from nemo_opd.planning.memory import RankMemory, ServerMemory
from nemo_opd.planning.plan import Plan
from nemo_opd.planning.setting import Serving, Setting
from nemo_opd.planning.shapes import Spread

_WORDS = {
    "write": "writing rollouts",
    "exchange": "responses to every process",
    "score": "scoring",
    "train": "forward and backward",
    "loss": "  of which output layers and loss",
    "update": "reduction and optimizer",
    "refit": "refit",
    "rest": "everything else",
}


def text(plan: Plan, checked: str, suggested: Alternative | None, best: Sequence[Alternative]) -> str:
    """All sections. `checked` says what was built besides; `best` are the results of a sweep."""
    lines = [*_head(plan), "", *_memory(plan), "", *_traffic(plan), "", *_times(plan), ""]
    if checked:
        lines += [checked, ""]
    lines += [*_verdict(plan, suggested)]
    if best:
        lines += ["", *_best(best)]
    return "\n".join(lines)


def layout(setting: Setting) -> str:
    """In a few words: ``student TP 2 x DP 4; teacher TP 8; 4 writers of 1``."""
    words = [f"student {_spread(setting.student.spread)}"]
    for model, teacher in setting.teachers():
        own = f"{model.key} is the student ({teacher.source})"
        words.append(f"{model.key} {_spread(model.spread)}" if teacher.source == "external" else own)
    for one in setting.servings:
        what = "writers" if one.key == "rollout.servers" else one.key.removesuffix(".servers") + " on servers"
        counted = f"{one.servers} {what}" if what == "writers" else f"{what}: {one.servers}"
        words.append(f"{counted} of {one.tp}{_place(one)}")
    return "; ".join(words)


def _place(one: Serving) -> str:
    if one.nodes:
        return f" on {_count(one.nodes, 'node')}"
    return ", colocated" if one.colocated else ", standing" if one.standing else ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _spread(spread: Spread) -> str:
    sizes = {"TP": spread.tp, "CP": spread.cp, "PP": spread.pp, "EP": spread.ep, "DP": spread.dp}
    words = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "whole"
    return f"{words}, each stage in {spread.vp} chunks" if spread.vp > 1 else words


def _head(plan: Plan) -> Iterator[str]:
    setting, gpu = plan.setting, plan.setting.cluster.gpu
    machine = f"{setting.cluster.nodes} node(s) of {setting.cluster.gpus_per_node} {gpu.name}"
    yield f"{setting.processes} processes on {machine}; with servers {setting.gpus} GPUs, {setting.nodes} node(s)"
    yield _job(setting)
    yield layout(setting)
    yield (
        f"a step: {setting.responses} responses of up to {setting.response} tokens (mean {setting.written:.0f}) after "
        f"prompts of up to {setting.prompt}, {setting.rows} micro-batch(es) of {setting.row} positions a replica"
    )


def _job(setting: Setting) -> str:
    """What to ask SLURM for: servers that stand already are no part of it."""
    roles = setting.job_nodes
    dealt = ", ".join(f"{count} {role}" for role, count in roles.items())
    fewer = f"; processes_per_node={setting.processes} in slurm/env.sh" if setting.beside else ""
    return f"as a job: --nodes={sum(roles.values())} --gpus-per-node={setting.cluster.gpus_per_node} ({dealt}){fewer}"


def _memory(plan: Plan) -> Iterator[str]:
    gpu = plan.setting.cluster.gpu
    yield f"memory of a GPU, GiB of {gpu.memory / GIB:.1f}"
    for rank in plan.ranks:
        stages = ", ".join(f"stage {stage} of the {model}" for model, stage in rank.stages.items())
        phase, needed = rank.peak
        yield f"  ranks {rank.ranks} ({stages}): {needed / GIB:.1f} while {phase}"
        yield from _table([(name, f"{size / GIB:.2f}") for name, size in _rank_rows(rank)])
        yield (
            f"    activations with every layer computed again in backward: {rank.recomputed / GIB:.2f} instead of "
            f"{rank.activations / GIB:.2f}"
        )
    for server in plan.servers:
        yield from _server(server)
    if plan.host:
        yield f"  memory of a node itself for responses and teacher's answers: {plan.host / GIB:.1f}"


def _rank_rows(rank: RankMemory) -> Iterator[tuple[str, float]]:
    yield from ((name, size) for name, size in rank.stays.items() if size)
    yield "reserved: context, workspaces", rank.reserved
    for phase, parts in rank.phases.items():
        yield from ((f"{phase}: {name}", size) for name, size in parts.items() if size)


def _server(server: ServerMemory) -> Iterator[str]:
    where = "the trainer's GPUs" if server.colocated else f"{server.gpus} more GPUs"
    held = f"weights {server.weights / GIB:.2f}, keys and values {server.cache / GIB:.2f}"
    yield f"  {server.key}, on {where}: {held}"
    yield f"    room for {server.sequences} of the longest sequences at a time, asked for at most {server.asked}"


def _traffic(plan: Plan) -> Iterator[str]:
    yield "messages of a step, the busiest rank's"
    rows = [("message", "ranks", "GB sent", "calls", "link", "seconds")]
    for flow in plan.flows:
        rows.append(
            (flow.what, str(flow.ranks), f"{flow.sent / 1e9:.3f}", str(flow.calls), flow.link, f"{flow.seconds:.3f}")
        )
    yield from _table(rows)


def _times(plan: Plan) -> Iterator[str]:
    found = plan.times
    yield f"seconds of a step, from stated rates ({plan.setting.cluster.gpu.source})"
    yield from _table([(_WORDS[name], f"{seconds:.2f}") for name, seconds in found.parts.items()])
    together = ", writing beside the rest" if found.overlapped else ""
    yield (
        f"  a step {found.step:.1f} s{together}; {found.tokens_per_second:,.0f} written tokens/s; training at "
        f"{100 * found.utilisation:.0f} % of peak; most time: {_WORDS[found.bottleneck]}"
    )


def _verdict(plan: Plan, suggested: Alternative | None) -> Iterator[str]:
    worst = plan.worst.peak[1] / GIB
    memory = plan.setting.cluster.gpu.memory / GIB
    yield from (f"warning: {warning}" for warning in plan.warnings)
    if not plan.problems:
        yield f"fits: at most {worst:.1f} of {memory:.1f} GiB"
        return
    yield from (f"does not fit: {problem}" for problem in plan.problems)
    if suggested is None:
        yield "  -> no single change, pair of changes or larger number of nodes that was tried makes it fit"
    else:
        needed = suggested.plan.worst.peak[1] / GIB
        yield f"  -> {' '.join(suggested.words)} ({needed:.1f} of {memory:.1f} GiB)"


def _best(best: Sequence[Alternative]) -> Iterator[str]:
    yield "the best layouts: seconds of a step, of its training processes alone, GiB, what takes most time, change"
    for one in best:
        found = one.plan.times
        alone = sum(seconds for name, seconds in found.parts.items() if name not in ("write", "loss"))
        peak = one.plan.worst.peak[1] / GIB
        change = " ".join(one.words) or "none"
        yield f"    {found.step:8.1f}  {alone:8.1f}  {peak:5.1f}  {_WORDS[found.bottleneck]:24}  {change}"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield ("    " + "  ".join(cells)).rstrip()


def as_json(plan: Plan, suggested: Alternative | None, best: Sequence[Alternative]) -> str:
    """One JSON object. Memory in bytes, times in seconds."""
    setting = plan.setting
    document: dict[str, Any] = {
        "fits": not plan.problems,
        "problems": plan.problems,
        "warnings": plan.warnings,
        "suggestion": None if suggested is None else list(suggested.words),
        "gpu": asdict(setting.cluster.gpu),
        "assumptions": asdict(setting.cluster.assumptions),
        "processes": setting.processes,
        "gpus": setting.gpus,
        "nodes": setting.nodes,
        "job_nodes": setting.job_nodes,
        "layout": layout(setting),
        "ranks": [_rank(rank) for rank in plan.ranks],
        "servers": [{**asdict(server), "sequences": server.sequences} for server in plan.servers],
        "host_bytes": plan.host,
        "messages": [asdict(flow) for flow in plan.flows],
        "seconds": {**plan.times.parts, "step": plan.times.step},
        "tokens_per_second": plan.times.tokens_per_second,
        "utilisation": plan.times.utilisation,
        "bottleneck": plan.times.bottleneck,
        "best": [{"change": list(one.words), "seconds": one.plan.times.step} for one in best],
    }
    return json.dumps(document, indent=1)


def _rank(rank: RankMemory) -> dict[str, Any]:
    phase, needed = rank.peak
    return {**asdict(rank), "peak": {"phase": phase, "bytes": needed}}
