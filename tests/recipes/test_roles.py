"""What slurm/opd.sh would start for each recipe of several nodes: its steps, every server of every node, the trainer's
command. From the script's question to the settings of a server all is real; processes and GPUs are not there."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nemo_opd.cluster import prepare, serve
from nemo_opd.cluster.node import trainer_command
from nemo_opd.cluster.plan import Plan, as_words, found_urls, servers_of, url_file
from nemo_opd.configuration.load import load
from nemo_opd.configuration.server_rules import addresses
from nemo_opd.engines.vllm.settings import ServerSettings
from nemo_opd.planning.plan import Options, make_setting, plan, read_recipe
from nemo_opd.planning.setting import Setting
from tests.recipes.test_plans import PLANNED, ROOT, name, put_in_place

GPUS = 8
"""Of a node."""


def setting_of(path: Path) -> Setting:
    return make_setting(read_recipe(path, ()), Options(gpus_per_node=GPUS))


SEVERAL = [path for path in PLANNED if setting_of(path).nodes > 1]


@pytest.fixture(autouse=True)
def _cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers have a Python of their own; no launcher's or job's variables."""
    monkeypatch.setenv("NEMO_OPD_SERVER_PYTHON", sys.executable)
    for variable in ("MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)


def answered(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Plan, list[tuple[str, list[str]]]]:
    """What opd.sh is told in a job of as many nodes as planned: the plan's file, and nodes of each step."""
    names = [f"n{number}" for number in range(setting_of(path).nodes)]
    component = ",".join(f"{name}=10.0.0.{number}" for number, name in enumerate(names, 1))
    words = ["--attempt", "slurm-7-0", "--port", "20007", "--per-node", str(GPUS), "--component", component]
    assert prepare.main([*words, "--", str(path)]) == 0
    verdict, _, file, _, *steps = capsys.readouterr().out.split("\0")[:-1]
    assert verdict == "start"
    assert steps[1::3] == ["0"] * (len(steps) // 3)
    lists = [nodes.split(",") for nodes in steps[2::3]]
    return Plan.read(Path(file)), list(zip(steps[::3], lists, strict=True))


class Started:
    """In the place of a node's processes: the servers that it would start, all of them listening at once."""

    def __init__(self, plan: Plan) -> None:
        self.servers: list[tuple[ServerSettings, Mapping[str, str]]] = []
        self._plan = plan

    def start(self, name: str, settings: ServerSettings, environment: Mapping[str, str]) -> None:
        self.servers.append((settings, environment))

    def urls(self, seconds: float, stop_requested: Any) -> list[str]:
        (self._plan.folder / "ended").touch()  # so that the node does not wait for the end of the job
        return [f"http://{server.host}:{8000 + number}" for number, (server, _) in enumerate(self.servers)]

    def watch(self, restarts: int) -> None: ...


def served_nodes(plan: Plan, path: Path) -> Iterator[tuple[str, str, Started]]:
    """(section, node, its servers) of all nodes with servers."""
    config = load(Path(plan.words[0]), plan.words[1:])
    for section, nodes in plan.servers(config).items():
        for node in nodes:
            started: Any = Started(plan)
            assert serve._serve(plan, config, section, node, started, "scratch") == 0
            assert url_file(plan, section, node).exists()
            yield section, node, started


def test_all_recipes_of_several_nodes_are_seen() -> None:
    assert len(SEVERAL) == 6


@pytest.mark.parametrize("path", SEVERAL, ids=name)
def test_the_head_of_a_recipe_asks_for_the_planned_nodes(path: Path) -> None:
    setting = setting_of(path)
    recipe = path.relative_to(ROOT).as_posix()
    command = f"#   sbatch --nodes={setting.nodes} --gpus-per-node={GPUS} slurm/opd.sh {recipe}"
    assert command in path.read_text().splitlines()
    assert sum(setting.job_nodes.values()) == setting.nodes, "nobody has to start anything by hand"
    assert setting.job_nodes["trainer"] * GPUS == setting.processes
    assert setting.gpus == GPUS * setting.nodes
    assert plan(setting).warnings == []


@pytest.mark.parametrize("path", SEVERAL, ids=name)
def test_a_job_starts_what_the_recipe_plans(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    put_in_place(path)
    setting = setting_of(path)
    job, steps = answered(path, capsys)
    assert {role: len(nodes) for role, nodes in steps} == setting.job_nodes
    assert [node for _, nodes in steps for node in nodes] == [f"n{number}" for number in range(setting.nodes)]

    planned = {serving.key.removesuffix(".servers"): serving for serving in setting.servings}
    for section, node, started in served_nodes(job, path):
        serving = planned[section]
        assert len(started.servers) == serving.servers // serving.nodes
        for server, _ in started.servers:
            assert (server.tensor_parallel_size, server.memory_share) == (serving.tp, serving.share)
            assert (server.host, server.port) == (job.addresses[node], 0), "each takes a port that is free"
            assert server.key_file == str(job.folder / "key")
            assert server.role == ("writer" if section == "rollout" else "teacher")
        if len(started.servers) > 1:
            devices = [environment["CUDA_VISIBLE_DEVICES"].split(",") for _, environment in started.servers]
            assert all(len(ids) == serving.tp for ids in devices)
            every = [gpu for ids in devices for gpu in ids]
            assert sorted(every) == [str(number) for number in range(GPUS)], "every GPU, and each once"
        else:
            assert serving.tp == GPUS

    config = load(Path(job.words[0]), job.words[1:])
    urls = found_urls(job, config)
    assert urls is not None
    trains = load(Path(job.words[0]), [*job.words[1:], *as_words(urls)])  # what each of its processes does first
    assert trains.train.processes == setting.processes == int(read_recipe(path, ()).train.processes or 0)
    for section, serving in planned.items():
        assert len(addresses(servers_of(trains, section).urls or "")) == serving.servers
    command = trainer_command(job, "n0", urls)
    sizes = [command[command.index(option) + 1] for option in ("--nnodes", "--nproc-per-node", "--rdzv-endpoint")]
    assert sizes == [str(setting.job_nodes["trainer"]), str(GPUS), "10.0.0.1:20007"]
