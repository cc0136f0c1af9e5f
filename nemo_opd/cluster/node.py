"""One node of a job in its role: python -m nemo_opd.cluster.node PLAN trainer|rollout|teacher

A trainer's node becomes torchrun, with SIGTERM ignored: SLURM sends it to every process of a step, and torchrun would
kill its workers half a minute later. The workers hear it themselves and save.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_opd.cluster.plan import TRAINER, Plan, as_words, found_urls, servers_of
from nemo_opd.config import Config
from nemo_opd.configuration.load import load
from nemo_opd.reliability.outcome import EXIT_CODES, Status, write_outcome
from nemo_opd.worker import write_output_to

_LOOK_SECONDS = 0.5
_MORE_SECONDS = 60.0  # for servers' nodes to start at all


def main(words: Sequence[str]) -> int:
    """Play the role to its end; a trainer's node does not come back from here."""
    plan, role = Plan.read(Path(words[0])), words[1]
    node = os.environ["SLURMD_NODENAME"]
    write_output_to(Path(plan.run_dir) / "logs" / f"node-{node}-{role}.txt")
    if role != TRAINER:
        from nemo_opd.cluster import serve  # late: it imports the servers' code

        return serve.run(plan, role, node)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    config = load(Path(plan.words[0]), plan.words[1:])
    urls = wait_for_servers(plan, config, node)
    if isinstance(urls, int):
        return urls
    command = trainer_command(plan, node, urls)
    os.execv(command[0], command)


def trainer_command(plan: Plan, node: str, more: Mapping[str, str]) -> list[str]:
    """torchrun's command on a node, with a meeting point on the first of them."""
    trainers = plan.nodes[TRAINER]
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", str(len(trainers)), "--nproc-per-node", str(plan.processes_per_node)),
        *("--rdzv-backend", "c10d", "--rdzv-id", plan.attempt),
        *("--rdzv-endpoint", f"{plan.addresses[trainers[0]]}:{plan.port}", "--local-addr", plan.addresses[node]),
        *("--signals-to-handle", "SIGINT", "-m", "nemo_opd.cli", "train", *plan.words, *as_words(more)),
    ]


def wait_for_servers(plan: Plan, config: Config, node: str) -> dict[str, str] | int:
    """Overrides with the addresses of the job's servers, or the exit code where they did not come or a stop did."""
    limits = [servers_of(config, section).start_seconds for section in plan.servers(config)]
    end = time.monotonic() + max(limits, default=0.0) + _MORE_SECONDS
    run_dir, first = Path(plan.run_dir), node == plan.nodes[TRAINER][0]
    while (urls := found_urls(plan, config)) is None:
        if _asked_to_stop(run_dir, plan.attempt):
            if first:
                reason = "control/stop asks for it, before the servers were there"
                write_outcome(run_dir, Status.PREEMPTED, None, reason, plan.attempt)
            return 0
        if time.monotonic() > end or (plan.folder / "failed").exists():
            return EXIT_CODES[Status.FAILED]  # the batch script says why
        time.sleep(_LOOK_SECONDS)
    return urls


def _asked_to_stop(run_dir: Path, attempt: str) -> bool:
    try:
        return (run_dir / "control" / "stop").read_text().strip() == attempt
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
