"""Rules about nodes that run servers alone (`cluster.*`)."""

from __future__ import annotations

from nemo_opd.config import Config
from nemo_opd.errors import ConfigError


def cluster_rules(config: Config) -> None:
    """Raises ConfigError for nodes that would have nothing to run."""
    rollout, cluster = config.rollout, config.cluster
    if cluster.rollout_nodes:
        if rollout.engine != "vllm":
            expected = f"0 with rollout.engine={rollout.engine}, which writes in the trainer's processes"
            way_out = "set rollout.engine=vllm, or leave it out"
            raise ConfigError("cluster.rollout_nodes", cluster.rollout_nodes, expected, way_out)
        if rollout.servers.protocol != "own":
            expected = "own with cluster.rollout_nodes, whose servers the job starts"
            raise ConfigError("rollout.servers.protocol", rollout.servers.protocol, expected, "leave one of them out")
        if rollout.servers.placement != "separate":
            expected = "separate with cluster.rollout_nodes, which are not the trainer's"
            raise ConfigError("rollout.servers.placement", rollout.servers.placement, expected, "leave one of them out")
    served = served_teachers(config)
    if cluster.teacher_nodes and not served:
        way_out = "set teacher.engine=vllm, or leave it out"
        raise ConfigError("cluster.teacher_nodes", cluster.teacher_nodes, "0 without a teacher on servers", way_out)
    if 0 < cluster.teacher_nodes < len(served):
        expected = f"at least {len(served)}, one for each of {', '.join(served)}"
        raise ConfigError("cluster.teacher_nodes", cluster.teacher_nodes, expected, "give it more, or 0")


def server_nodes(config: Config) -> dict[str, int]:
    """How many nodes of a job run the servers of each section alone: ``rollout``, ``teacher``, ``teachers.NAME``."""
    cluster, served = config.cluster, served_teachers(config)
    found = {key: len(range(i, cluster.teacher_nodes, len(served))) for i, key in enumerate(served)}
    return {key: count for key, count in {"rollout": cluster.rollout_nodes, **found}.items() if count}


def served_teachers(config: Config) -> list[str]:
    """Keys of the teachers that stand on servers of our own kind: ``teacher``, or ``teachers.NAME`` of several."""
    teachers = config.every_teacher().items()
    return [key for key, one in teachers if one.engine == "vllm" and one.servers.protocol == "own"]
