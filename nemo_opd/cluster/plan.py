"""Who does what on the nodes of a job, as a file in the run folder that every node reads.

run/control/job-ATTEMPT/plan.json           this
run/control/job-ATTEMPT/key                 what requests to the job's servers carry; its owner alone may read it
run/control/job-ATTEMPT/rollout-n3.urls     written by a node once its servers listen
run/control/job-ATTEMPT/failed              written by the batch script: why servers are given up
run/control/job-ATTEMPT/ended               written by the batch script: servers end
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_opd.config import Config, ServersConfig
from nemo_opd.configuration.cluster_rules import served_teachers
from nemo_opd.errors import ConfigError
from nemo_opd.reliability.files import replace_private

TRAINER = "trainer"
ROLLOUT = "rollout"
TEACHER = "teacher"
ROLES = (TRAINER, ROLLOUT, TEACHER)
"""Also the order in which they are given the nodes of a job, or the components of a heterogeneous one."""


@dataclass(frozen=True)
class Plan:
    """Example: ``Plan("slurm-12-0", "runs/a", ("my.yaml", "run.dir=runs/a"), {"trainer": ("n1", "n2"), ...}, ...)``."""

    attempt: str
    run_dir: str
    words: tuple[str, ...]
    """RECIPE and overrides as they were typed, then what the job itself sets."""
    nodes: dict[str, tuple[str, ...]]
    """Of each role; none where the role has no nodes of its own."""
    addresses: dict[str, str]
    """Of each node, as SLURM reaches it."""
    processes_per_node: int
    port: int
    """Where the trainers meet, on the first of them."""

    @property
    def folder(self) -> Path:
        return job_folder(Path(self.run_dir), self.attempt)

    @property
    def path(self) -> Path:
        return self.folder / "plan.json"

    def write(self) -> None:
        replace_private(self.path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Plan:
        fields = json.loads(path.read_text(encoding="utf-8"))
        nodes = {role: tuple(names) for role, names in fields.pop("nodes").items()}
        return cls(**{**fields, "nodes": nodes, "words": tuple(fields["words"])})

    def servers(self, config: Config) -> dict[str, tuple[str, ...]]:
        """The nodes behind each section of the recipe that has servers: ``rollout``, ``teacher``, ``teachers.NAME``."""
        teachers = served_teachers(config)
        found = {ROLLOUT: self.nodes[ROLLOUT]} if self.nodes[ROLLOUT] else {}
        if self.nodes[TEACHER]:
            found |= {key: self.nodes[TEACHER][i :: len(teachers)] for i, key in enumerate(teachers)}
        return found


def job_folder(run_dir: Path, attempt: str) -> Path:
    """Of one attempt."""
    return run_dir / "control" / f"job-{attempt}"


def dealt(config: Config, nodes: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The nodes of each role.

    Args:
        nodes: those of the job; of a heterogeneous one those of each component.

    Raises:
        ConfigError: there are not enough, or the components are others than the roles.
    """
    wanted = {ROLLOUT: config.cluster.rollout_nodes, TEACHER: config.cluster.teacher_nodes}
    if len(nodes) == 1:
        every, servers = list(nodes[0]), sum(wanted.values())
        if len(every) <= servers:
            got, expected = f"{len(every)} of them", f"more than the {servers} that run servers alone (cluster.*)"
            raise ConfigError("--nodes", got, expected, "ask sbatch for more nodes, or set cluster.* lower")
        first = len(every) - servers
        second = first + wanted[ROLLOUT]
        return {TRAINER: tuple(every[:first]), ROLLOUT: tuple(every[first:second]), TEACHER: tuple(every[second:])}
    roles = [TRAINER, *(role for role, count in wanted.items() if count)]
    if len(nodes) != len(roles):
        expected = f"{len(roles)}: {', '.join(roles)}"
        raise ConfigError("components of the job", len(nodes), expected, "see slurm/README.md, heterogeneous jobs")
    for role, names in list(zip(roles, nodes, strict=True))[1:]:
        if len(names) != wanted[role]:
            way_out = f"set cluster.{role}_nodes={len(names)}, or ask sbatch for {wanted[role]} nodes"
            raise ConfigError(f"nodes of the {role} component", len(names), f"cluster.{role}_nodes", way_out)
    return {role: () for role in ROLES} | {role: tuple(names) for role, names in zip(roles, nodes, strict=True)}


def server_settings(config: Config, plan: Plan, key_file: Path) -> dict[str, str]:
    """Overrides for the servers that the job starts: their key, and a folder that all nodes see for the weights. What
    the recipe sets stays."""
    found = {}
    for section in plan.servers(config):
        servers = servers_of(config, section)
        if servers.key_file is None:
            found[f"{section}.servers.key_file"] = str(key_file)
        if section == ROLLOUT and servers.transport == "disk" and servers.weights_dir is None:
            found[f"{section}.servers.weights_dir"] = str(plan.folder / "weights")
    return found


def servers_of(config: Config, section: str) -> ServersConfig:
    """``rollout.servers``, ``teacher.servers`` or ``teachers.NAME.servers``."""
    return config.rollout.servers if section == ROLLOUT else config.every_teacher()[section].servers


def write_key(path: Path) -> None:
    """A new key in a new file that its owner alone may read; a file that is there stays."""
    if not path.exists():
        replace_private(path, secrets.token_hex(32) + "\n")


def url_file(plan: Plan, section: str, node: str) -> Path:
    """Where a node says the addresses of its servers."""
    return plan.folder / f"{section}-{node}.urls"


def found_urls(plan: Plan, config: Config) -> dict[str, str] | None:
    """Overrides with the addresses of all servers of the job; None while one of its nodes has not said them."""
    found = {}
    for section, nodes in plan.servers(config).items():
        files = [url_file(plan, section, node) for node in nodes]
        if not all(file.exists() for file in files):
            return None
        found[f"{section}.servers.urls"] = ",".join(file.read_text(encoding="utf-8").strip() for file in files)
    return found


def as_words(overrides: Mapping[str, str]) -> list[str]:
    """``key=value`` for each."""
    return [f"{key}={value}" for key, value in overrides.items()]
