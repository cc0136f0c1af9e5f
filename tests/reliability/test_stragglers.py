"""A rank that is three times slower than the other, in a real run: named within ten steps; without it nobody is."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.figures import record, trials
from tests.helpers.ranks import RankPool
from tests.helpers.workspace import make_workspace, workspace_config

STEPS = 10


def _run(rank: int, folder: str, name: str, steps: int, delay: float) -> tuple[list[dict[str, float]], float]:
    """Metrics of some steps, and this rank's median time of writing before anything is delayed."""
    import statistics

    from nemo_opd.assemble import assemble
    from nemo_opd.engines.megatron.parallel import destroy_student_groups
    from nemo_opd.loop import one_step, refit_generator
    from nemo_opd.processes import Processes
    from nemo_opd.reliability import faults
    from nemo_opd.reliability.stop import StopRequest

    destroy_student_groups()
    run_dir = Path(folder) / name
    run_dir.mkdir(exist_ok=True)
    processes = Processes.current()
    config = workspace_config(Path(folder), "train.processes=2", "rollout.max_new_tokens=24", run_dir=run_dir)
    run = assemble(config, processes, StopRequest(run_dir, "test", processes))
    refit_generator(run)
    own, reports = [], []
    try:
        for _ in range(steps):
            if len(own) == 5 and delay:
                slow = max(processes.largest([statistics.median(own)])[0], 0.05)
                faults.arm(f"step.rollout=sleep:{delay * slow} rank=1")
            reports.append(one_step(run))
            own.append(run.own.seconds()["rollout"])
    finally:
        faults.arm("")
    for part in (run.recorder, run.generator):
        if part:
            part.close()
    return [dict(report.metrics) for report in reports if report], statistics.median(own[:5])


def test_a_delayed_rank_is_named_and_without_delay_nobody(ranks2: RankPool, tmp_path: Path) -> None:
    folder = make_workspace(tmp_path)
    (clean, _), _ = ranks2.run(_run, str(folder), "clean", trials(200, 30), 0.0)
    alarms = sum("straggler/rank" in line for line in clean)
    record("R11", f"false alarms in {len(clean)} steps of 2 real ranks", str(alarms))
    assert alarms == 0
    (delayed, _), _ = ranks2.run(_run, str(folder), "delayed", 5 + STEPS, 2.0)
    named = [line["straggler/rank"] for line in delayed if "straggler/rank" in line]
    assert named == [1.0], "once, within ten steps of the delay"
    assert [line["straggler/named"] for line in delayed[:5]] == [0.0] * 5
    found = next(i for i, line in enumerate(delayed) if "straggler/rank" in line) - 4
    record("R11", "a rank delayed by 3x is named after so many steps", str(found))
