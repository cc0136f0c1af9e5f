"""Rules about vLLM servers: what they are not asked for, and how they are reached."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from urllib.parse import urlsplit

from nemo_opd.config import Config, DatasetPrefix, ServersConfig, TeacherMixedPrefix, TrapStop
from nemo_opd.errors import ConfigError


def server_rules(config: Config) -> None:
    """Raises ConfigError for servers that would not be used, cannot be reached, or cannot do what is asked."""
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
    if isinstance(config.stop, TrapStop):
        expected = f"hf with stop {config.stop.name}, which reads the student's distribution while it writes"
        raise ConfigError("rollout.engine", "vllm", expected, "set rollout.engine=hf, or leave stop out")
    if config.rollout.dtype == "float64":
        raise ConfigError("rollout.dtype", "float64", "bfloat16 or float32 with engine vllm", "choose one of these")
    _reachable("rollout.servers", config.rollout.servers)


def _reachable(key: str, servers: ServersConfig) -> None:
    if servers.key_file is not None and not Path(servers.key_file).is_file():
        raise ConfigError(f"{key}.key_file", f"no file {servers.key_file}", "a file with the key", "check the path")
    if servers.urls is None:
        if importlib.util.find_spec("vllm") is None:
            way_out = f"install it (pip install 'nemo_opd[vllm]'), or name servers that stand already ({key}.urls)"
            raise ConfigError(f"{key}.urls", "nothing", "vLLM to start servers with; it is not installed here", way_out)
        _devices(key, servers)
        return
    for url in addresses(servers.urls):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            expected = "addresses as in http://node1:8000,http://node2:8000"
            raise ConfigError(f"{key}.urls", url, expected, "correct it")
    if servers.weights_dir is None:
        way_out = "set it to what the servers were started with"
        raise ConfigError(f"{key}.weights_dir", "nothing", "the folder that these servers read weights from", way_out)


def _devices(key: str, servers: ServersConfig) -> None:
    needed = servers.count * servers.tensor_parallel_size
    if servers.devices is not None and len(servers.devices.split(",")) != needed:
        got = f"{servers.devices} ({len(servers.devices.split(','))} GPUs)"
        expected = f"{needed} of them ({servers.count} servers of {servers.tensor_parallel_size})"
        raise ConfigError(f"{key}.devices", got, expected, "name as many as the servers use")


def addresses(urls: str) -> list[str]:
    """The addresses in ``servers.urls``."""
    return [url.strip() for url in urls.split(",") if url.strip()]
