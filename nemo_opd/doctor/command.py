"""`nemo-opd doctor`: the cheap checks first, then, where these found nothing that a run would fail at, the models."""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from nemo_opd import worker
from nemo_opd.config import Config
from nemo_opd.configuration.check import launched_processes, world_size
from nemo_opd.configuration.load import load, to_yaml
from nemo_opd.doctor.container import container_findings
from nemo_opd.doctor.disk import disk_findings
from nemo_opd.doctor.finding import Finding, Verdict, as_json, failed, table
from nemo_opd.doctor.gpus import gpu_findings
from nemo_opd.doctor.installed import version_findings
from nemo_opd.doctor.memory import memory_findings
from nemo_opd.doctor.network import network_findings
from nemo_opd.doctor.options import Options
from nemo_opd.doctor.slurm import slurm_findings
from nemo_opd.doctor.tokens import token_findings
from nemo_opd.doctor.worker import OPTIONS, RECIPE, read_findings, run
from nemo_opd.errors import ConfigError
from nemo_opd.launch import Children, child_environment, torchrun_command
from nemo_opd.reliability.outcome import INTERRUPTED, new_attempt

log = logging.getLogger(__name__)

FAILED = 1
"""Exit code where a check failed."""

CHECKS: tuple[Callable[[Config], list[Finding]], ...] = (
    version_findings,
    disk_findings,
    container_findings,
    network_findings,
    gpu_findings,
    slurm_findings,
    token_findings,
)
"""What is looked at before any model is built. A check is a function of the configuration that gives findings."""


def main(args: argparse.Namespace) -> int:
    """Print the table, or JSON; 1 where a check failed. Below a launcher every process measures, the first prints."""
    config = load(args.recipe, args.overrides)
    options = Options(args.prompts, args.tokens, args.reference, args.bound)
    launched = launched_processes() is not None
    rank = worker.join_launcher() if launched else 0
    findings = static_findings(config, args.gpu)
    if args.static:
        findings.append(Finding("models", Verdict.SKIPPED, "--static"))
    elif failed(findings):
        findings.append(Finding("models", Verdict.SKIPPED, "not built, as a check before them failed"))
    else:
        measured = measured_findings(config, options, launched)
        if measured is None:
            return INTERRUPTED
        findings += measured
    if rank == 0:
        sys.stdout.write((as_json(findings) if args.json else table(findings)) + "\n")
    return FAILED if failed(findings) else 0


def static_findings(config: Config, gpu: str | None = None) -> list[Finding]:
    """Of all `CHECKS`, and of memory on the GPU of that name; one that the configuration breaks is a failed check, and
    the others go on."""
    checks: list[Callable[[Config], list[Finding]]] = [*CHECKS, partial(memory_findings, gpu=gpu)]
    findings = []
    for check in checks:
        try:
            findings += check(config)
        except ConfigError as error:
            findings.append(Finding(error.key, Verdict.FAIL, str(error.got), error.expected, error.way_out))
    return findings


def measured_findings(config: Config, options: Options, launched: bool = False) -> list[Finding] | None:
    """Those of `nemo_opd.doctor.measure`, in as many processes as a run of this recipe has. None when interrupted.

    Nothing is written into the run folder. A folder of our own is kept when something went wrong: it has the logs.
    """
    folder = Path(tempfile.mkdtemp(prefix="nemo-opd-doctor-"))
    config = replace(config, run=replace(config.run, dir=str(folder)))
    if launched or world_size(config) == 1:
        done = run(config, options, folder)
    else:
        status = _in_processes(config, options, folder)
        if status == INTERRUPTED:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        done = status == 0
    findings = read_findings(folder)
    if not done and not failed(findings):
        way_out = f"see the messages above and {folder}/logs"
        findings.append(Finding("models: processes", Verdict.FAIL, "ended without a word", "an end", way_out))
    if done:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        log.info("logs are in %s", folder)
    return findings


def _in_processes(config: Config, options: Options, folder: Path) -> int:
    """torchrun's exit status, as `nemo_opd.launch` starts a run."""
    (folder / RECIPE).write_text(to_yaml(config))
    (folder / OPTIONS).write_text(options.to_json())
    attempt, processes = new_attempt(), world_size(config)
    program = ["-m", "nemo_opd.doctor.worker", str(folder)]
    children = Children(folder, attempt, saves=False)
    command = torchrun_command(processes, attempt, folder / "torchrun", program)
    status = children.run(command, child_environment(processes, attempt))
    return INTERRUPTED if children.killed else status
