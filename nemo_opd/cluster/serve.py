"""The servers of one node of a job: started, watched, and ended with the job."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from nemo_opd.cluster.plan import ROLLOUT, Plan, servers_of, url_file
from nemo_opd.config import Config, ServersConfig
from nemo_opd.configuration.load import load
from nemo_opd.engines.vllm.local import LocalServers, ServerFailed, devices_of
from nemo_opd.engines.vllm.run_servers import placed, teacher_settings, writer_settings
from nemo_opd.engines.vllm.settings import ServerSettings
from nemo_opd.reliability.files import replace_private
from nemo_opd.worker import configure_logging

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5


def run(plan: Plan, role: str, node: str) -> int:
    """Serve until the job is over; returns 0, or 1 when servers failed more often than they are started again.

    SIGTERM is not heard: SLURM sends it to servers and trainers at once, and these still need servers while they end.
    """
    configure_logging()
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # not SIG_IGN, which the servers would inherit
    config = load(Path(plan.words[0]), plan.words[1:])
    served = plan.servers(config)
    section = next(key for key, nodes in served.items() if node in nodes and (key == ROLLOUT) == (role == ROLLOUT))
    with tempfile.TemporaryDirectory(prefix="nemo_opd-") as scratch:
        local = LocalServers(Path(plan.run_dir) / "logs", Path(scratch))
        try:
            return _serve(plan, config, section, node, local, scratch)
        except ServerFailed as error:
            log.error("%s", error)
            return 1
        finally:
            local.close()


def _serve(plan: Plan, config: Config, section: str, node: str, local: LocalServers, scratch: str) -> int:
    settings, ended = servers_of(config, section), plan.folder / "ended"
    gpus = node_devices(settings)
    server = settings_of(config, section, plan.addresses[node], scratch)
    published = url_file(plan, section, node)
    ports = _ports(published, settings.count)
    for number, port in enumerate(ports):
        devices = devices_of(gpus, number, settings.tensor_parallel_size)
        local.start(f"{section}-{node}-{number}", replace(server, port=port), devices)
    urls = local.urls(settings.start_seconds, ended.exists)
    if len(urls) == settings.count:
        local.watch(settings.restarts)
        replace_private(published, ",".join(urls) + "\n")
    while not ended.exists():
        if local.all_given_up:
            return 1
        time.sleep(_LOOK_SECONDS)
    return 0


def settings_of(config: Config, section: str, address: str, scratch: str) -> ServerSettings:
    """What a server of that section is started with on a node that others reach at `address`."""
    settings = servers_of(config, section)
    server = placed(writer_settings(config) if section == ROLLOUT else teacher_settings(config, section), settings)
    return replace(server, host=address, weights_dir=settings.weights_dir or scratch)


def node_devices(settings: ServersConfig, environment: Mapping[str, str] = os.environ) -> str | None:
    """GPUs of the servers of a node that has nothing else to do, ``"0,1,2,3"``: those of the recipe, else the first of
    those that this step may see. None for one server alone, which takes what it needs of all.

    Raises ServerFailed where the step sees fewer than the servers use.
    """
    if settings.devices is not None or settings.count == 1:
        return settings.devices
    needed = settings.count * settings.tensor_parallel_size
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    ids = [one.strip() for one in visible.split(",") if one.strip()] or [str(number) for number in range(needed)]
    if len(ids) < needed:
        raise ServerFailed(f"{needed} GPUs for {settings.count} servers, and this node's step sees {visible}")
    return ",".join(ids[:needed])


def _ports(published: Path, count: int) -> list[int]:
    """Those of servers that this node had before, where it is started again: the run knows them; else any."""
    if not published.exists():
        return [0] * count
    urls = published.read_text(encoding="utf-8").strip().split(",")
    return [urlsplit(url).port or 0 for url in urls]
