"""Some steps of a run, in the ranks of a pool."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.helpers.workspace import workspace_config


@dataclass(frozen=True)
class Attempt:
    """What a run left behind."""

    metrics: list[dict[str, float]]
    weights: dict[str, Tensor]
    algorithm: dict[str, Any]


def attempt(rank: int, folder: str, run_dir: str, overrides: tuple[str, ...], steps: int) -> Attempt:
    """Start or resume the run of `run_dir` and save after so many steps."""
    from nemo_opd.assemble import assemble
    from nemo_opd.engines.megatron.parallel import destroy_student_groups
    from nemo_opd.loop import one_step, refit_generator, save
    from nemo_opd.processes import Processes
    from nemo_opd.reliability.stop import StopRequest

    destroy_student_groups()  # of an earlier attempt in this process
    Path(run_dir).mkdir(exist_ok=True)
    config = workspace_config(Path(folder), *overrides, run_dir=Path(run_dir))
    processes = Processes.current()
    run = assemble(config, processes, StopRequest(Path(run_dir), "test", processes))
    refit_generator(run)
    reports = [one_step(run) for _ in range(steps)]
    save(run)
    for part in (run.recorder, run.generator):
        if part:
            part.close()
    weights = {name: tensor.clone() for name, tensor in run.trainer.export_weights()}
    return Attempt([dict(report.metrics) for report in reports if report], weights, run.state.algorithm)
