"""Rules about vLLM servers: what they are not asked for, and how they are reached."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from urllib.parse import urlsplit

from nemo_opd.config import Config, DatasetPrefix, ServersConfig, TeacherConfig, TeacherMixedPrefix, TrapStop
from nemo_opd.configuration.objective_rules import reads_whole_teacher
from nemo_opd.errors import ConfigError

SERVED_LOSSES = (
    "policy_gradient, k2, trust_region with loss.outlier=mask or clip, and stop_gradient, tail or renormalised with "
    "loss.teacher=scores and loss.support=teacher or intersection"
)
STOCK_TEMPERATURE = 2.0


def server_rules(config: Config) -> None:
    """Raises ConfigError for servers that would not be used, cannot be reached, or cannot do what is asked."""
    _writers(config)
    for key, teacher in config.every_teacher().items():
        _teacher(config, key, teacher)


def _writers(config: Config) -> None:
    if config.rollout.engine != "vllm":
        if config.rollout.servers != ServersConfig():
            way_out = "set rollout.engine=vllm, or leave rollout.servers out"
            raise ConfigError("rollout.servers", "settings", f"none with engine {config.rollout.engine}", way_out)
        return
    if isinstance(config.prefix, DatasetPrefix) and config.evaluate.path is None:
        raise ConfigError("rollout.engine", "vllm", "hf, as the data set wrote the responses", "leave it out")
    if isinstance(config.prefix, TeacherMixedPrefix):
        expected = "hf with prefix teacher_mixed, where both models draw each token together"
        raise ConfigError("rollout.engine", "vllm", expected, "set rollout.engine=hf")
    if config.rollout.servers.protocol == "openai":
        _stock_writers(config)
    if isinstance(config.stop, TrapStop):
        _best_ids(config, config.stop)
    if config.rollout.dtype == "float64":
        raise ConfigError("rollout.dtype", "float64", "bfloat16 or float32 with engine vllm", "choose one of these")
    servers = config.rollout.servers
    _transport(servers)
    if servers.urls is not None and servers.weights_dir is None and servers.transport == "disk":
        way_out = "set it to what the servers were started with"
        expected = "the folder that these servers read weights from"
        raise ConfigError("rollout.servers.weights_dir", "nothing", expected, way_out)
    _addresses("rollout.servers", servers)


def _stock_writers(config: Config) -> None:
    """What vLLM's own HTTP server does not do."""
    key, servers = "rollout.servers", config.rollout.servers
    _stock(key, servers)
    if servers.transport != "disk":
        expected = "disk with protocol openai: a stock server takes weights from a folder"
        raise ConfigError(f"{key}.transport", servers.transport, expected, "leave transport out, or protocol")
    if servers.placement != "separate":
        expected = "separate with protocol openai: a stock server keeps its memory"
        raise ConfigError(f"{key}.placement", servers.placement, expected, "leave placement out, or protocol")
    temperatures = {
        "rollout.temperature": config.rollout.temperature,
        "evaluate.temperature": config.evaluate.temperature,
    }
    for name, got in temperatures.items():
        if got > STOCK_TEMPERATURE:
            expected = f"at most {STOCK_TEMPERATURE:g} with rollout.servers.protocol=openai, vLLM's limit over HTTP"
            raise ConfigError(name, got, expected, "lower it, or leave protocol out")
    if config.rollout.staleness:
        expected = "0 with rollout.servers.protocol=openai: stock servers take weights only while they write nothing"
        raise ConfigError("rollout.staleness", config.rollout.staleness, expected, "leave staleness out, or protocol")
    if isinstance(config.stop, TrapStop):
        expected = f"own with stop {config.stop.name}, which reads the student's distribution while it writes"
        raise ConfigError(f"{key}.protocol", "openai", expected, "leave protocol out, or stop")


def _stock(key: str, servers: ServersConfig) -> None:
    if servers.urls is None:
        expected = "own for servers that the run starts itself"
        raise ConfigError(f"{key}.protocol", "openai", expected, f"set {key}.urls, or leave protocol out")


def _transport(servers: ServersConfig) -> None:
    key, colocated = "rollout.servers", servers.placement == "colocated"
    if servers.transport == "ipc" and not colocated:
        expected = "colocated with transport ipc, by which servers read the memory of the trainer's own GPUs"
        raise ConfigError(f"{key}.placement", servers.placement, expected, "set it, or choose transport nccl or disk")
    if servers.transport == "nccl" and colocated:
        expected = "ipc or disk with placement colocated, as NCCL does not join two processes on one GPU"
        raise ConfigError(f"{key}.transport", servers.transport, expected, "choose one of these, or placement separate")
    if servers.transport != "disk" and servers.weights_dir is not None:
        expected = f"nothing with transport {servers.transport}, which needs no folder"
        raise ConfigError(f"{key}.weights_dir", servers.weights_dir, expected, "leave it out")


def _best_ids(config: Config, stop: TrapStop) -> None:
    """Servers say the student's best ids as they write, and nothing else of its distribution."""
    rest = f"with rollout.engine=vllm and stop {stop.name}, as servers say the best ids of the model's own distribution"
    for name, only in (("divergence", "tail"), ("support", "student")):
        if getattr(stop, name) != only:
            way_out = f"set stop.{name}={only}, or rollout.engine=hf"
            raise ConfigError(f"stop.{name}", getattr(stop, name), f"{only} {rest}", way_out)
    for name, plain in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
        if getattr(config.rollout, name) != plain:
            way_out = "leave it out, or set rollout.engine=hf"
            raise ConfigError(f"rollout.{name}", getattr(config.rollout, name), f"{plain} {rest}", way_out)


def _teacher(config: Config, key: str, teacher: TeacherConfig) -> None:
    if teacher.engine != "vllm":
        if teacher.servers != ServersConfig():
            way_out = f"set {key}.engine=vllm, or leave {key}.servers out"
            raise ConfigError(f"{key}.servers", "settings", f"none with engine {teacher.engine}", way_out)
        return
    few = "which reports a few log-probabilities per token"
    if reads_whole_teacher(config.loss):
        way_out = f"choose one of {SERVED_LOSSES}, or set {key}.engine=megatron"
        expected = f"a loss that a served teacher can serve, {few}"
        raise ConfigError("loss.name", config.loss.name, expected, way_out)
    if isinstance(config.stop, TrapStop) and config.stop.divergence == "full":
        expected = f"tail with {key}.engine=vllm, {few}"
        raise ConfigError("stop.divergence", "full", expected, "set stop.divergence=tail")
    if teacher.base_model is not None:
        expected = f"nothing with {key}.engine=vllm, whose servers hold one model"
        way_out = f"set {key}.engine=megatron, or choose another loss"
        raise ConfigError(f"{key}.base_model", teacher.base_model, expected, way_out)
    if teacher.servers.protocol == "openai":
        _stock(f"{key}.servers", teacher.servers)
        if isinstance(config.stop, TrapStop) and config.stop.support == "student":
            expected = f"teacher with {key}.servers.protocol=openai, as a stock server scores no ids that it is given"
            raise ConfigError("stop.support", "student", expected, f"set it, or leave {key}.servers.protocol out")
    if teacher.dtype == "float64":
        raise ConfigError(f"{key}.dtype", "float64", "bfloat16 or float32 with engine vllm", "choose one of these")
    if teacher.servers.weights_dir is not None:
        expected = "nothing, as a teacher takes no weights from the run"
        raise ConfigError(f"{key}.servers.weights_dir", teacher.servers.weights_dir, expected, "leave it out")
    for name in ("placement", "transport"):
        if (got := getattr(teacher.servers, name)) != getattr(ServersConfig(), name):
            expected = "nothing, as it is about servers that write"
            raise ConfigError(f"{key}.servers.{name}", got, expected, "leave it out")
    _addresses(f"{key}.servers", teacher.servers)


def reachable_servers(config: Config) -> None:
    """Raises ConfigError where this machine lacks the key of servers, or vLLM to start some with."""
    used = {"rollout.servers": config.rollout.servers} if config.rollout.engine == "vllm" else {}
    for key, teacher in config.every_teacher().items():
        if teacher.engine == "vllm":
            used[f"{key}.servers"] = teacher.servers
    for key, servers in used.items():
        if servers.key_file is not None and not Path(servers.key_file).is_file():
            raise ConfigError(f"{key}.key_file", f"no file {servers.key_file}", "a file with the key", "check the path")
        elsewhere = os.environ.get("NEMO_OPD_SERVER_PYTHON")  # nemo_opd.engines.vllm.local looks at it
        if servers.urls is None and not elsewhere and importlib.util.find_spec("vllm") is None:
            way_out = f"install it (pip install 'nemo_opd[vllm]'), or name servers that stand already ({key}.urls)"
            raise ConfigError(f"{key}.urls", "nothing", "vLLM to start servers with; it is not installed here", way_out)


def _addresses(key: str, servers: ServersConfig) -> None:
    if servers.urls is None:
        _devices(key, servers)
        return
    for url in addresses(servers.urls):
        parts = urlsplit(url)
        if "@" in parts.netloc:  # and it is not repeated here
            expected = "addresses as in http://node1:8000, and the key in a file"
            raise ConfigError(
                f"{key}.urls", "an address with a name or password in it", expected, f"set {key}.key_file"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            expected = "addresses as in http://node1:8000,http://node2:8000"
            raise ConfigError(f"{key}.urls", url, expected, "correct it")


def _devices(key: str, servers: ServersConfig) -> None:
    needed = servers.count * servers.tensor_parallel_size
    if servers.devices is not None and len(servers.devices.split(",")) != needed:
        got = f"{servers.devices} ({len(servers.devices.split(','))} GPUs)"
        expected = f"{needed} of them ({servers.count} servers of {servers.tensor_parallel_size})"
        raise ConfigError(f"{key}.devices", got, expected, "name as many as the servers use")


def addresses(urls: str) -> list[str]:
    """The addresses in ``servers.urls``."""
    return [url.strip() for url in urls.split(",") if url.strip()]
