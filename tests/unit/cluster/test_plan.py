"""Who does what on the nodes of a job."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

import pytest

from nemo_opd.cluster import node
from nemo_opd.cluster.plan import (
    ROLES,
    TRAINER,
    Plan,
    dealt,
    found_urls,
    server_settings,
    url_file,
    write_key,
)
from nemo_opd.cluster.serve import settings_of
from nemo_opd.config import Config
from nemo_opd.configuration.load import load
from nemo_opd.errors import ConfigError
from nemo_opd.reliability.outcome import EXIT_CODES, Status, read_outcome
from tests.unit.configuration.workspace import make_workspace, write_model

BOTH = ("rollout.engine=vllm", "cluster.rollout_nodes=1", "teacher.engine=vllm", "cluster.teacher_nodes=2")
SERVED = ("loss=policy_gradient",)


def config_of(folder: Path, *overrides: str) -> Config:
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        make_workspace(folder)
    paths = [f"student.model={folder}/student", f"data.path={folder}/train.jsonl", f"run.dir={folder}/run"]
    teacher = [] if any(word.startswith("teachers.") for word in overrides) else [f"teacher.model={folder}/teacher"]
    return load(recipe if teacher else None, [*paths, *teacher, *overrides])


def plan_of(folder: Path, nodes: dict[str, tuple[str, ...]]) -> Plan:
    addresses = {name: f"10.0.0.{number}" for number, name in enumerate(sum(nodes.values(), ()))}
    every = {role: nodes.get(role, ()) for role in ROLES}
    return Plan("slurm-7-0", str(folder / "run"), ("recipe.yaml",), every, addresses, 4, 20007)


@pytest.mark.parametrize(
    ("components", "expected"),
    [
        ([["a", "b", "c", "d", "e"]], {"trainer": ("a", "b"), "rollout": ("c",), "teacher": ("d", "e")}),
        ([["a", "b"], ["c"], ["d", "e"]], {"trainer": ("a", "b"), "rollout": ("c",), "teacher": ("d", "e")}),
    ],
)
def test_nodes_are_dealt_to_roles(
    tmp_path: Path, components: list[list[str]], expected: dict[str, tuple[str, ...]]
) -> None:
    assert dealt(config_of(tmp_path, *BOTH, *SERVED), components) == expected


def test_without_roles_all_nodes_train(tmp_path: Path) -> None:
    assert dealt(config_of(tmp_path), [["a", "b"]]) == {"trainer": ("a", "b"), "rollout": (), "teacher": ()}


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ([["a", "b", "c"]], "--nodes: got 3 of them; expected more than the 3 that run servers alone"),
        ([["a"], ["b"]], "components of the job: got 2; expected 3: trainer, rollout, teacher;"),
        ([["a"], ["b"], ["c"]], "nodes of the teacher component: got 1; expected cluster.teacher_nodes;"),
    ],
)
def test_a_job_that_does_not_fit_is_refused(tmp_path: Path, components: list[list[str]], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        dealt(config_of(tmp_path, *BOTH, *SERVED), components)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.rollout_nodes=1"], "cluster.rollout_nodes: got 1; expected 0 with rollout.engine=hf"),
        (["cluster.rollout_nodes=-1"], "cluster.rollout_nodes: got -1; expected at least 0"),
        (["cluster.starts=0"], "cluster.starts: got 0; expected at least 1"),
        (["run.time_limit=0"], "run.time_limit: got 0.0; expected at least 1"),
        (["cluster.teacher_nodes=1"], "cluster.teacher_nodes: got 1; expected 0 without a teacher on servers"),
        (
            ["rollout.engine=vllm", "rollout.servers.placement=colocated", "cluster.rollout_nodes=1"],
            "rollout.servers.placement: got colocated; expected separate with cluster.rollout_nodes",
        ),
        (
            [
                *("rollout.engine=vllm", "rollout.servers.urls=http://a:1", "rollout.servers.protocol=openai"),
                *("rollout.servers.weights_dir=w", "cluster.rollout_nodes=1"),
            ],
            "rollout.servers.protocol: got openai; expected own with cluster.rollout_nodes",
        ),
    ],
)
def test_nodes_that_would_have_nothing_to_run_are_refused(
    tmp_path: Path, overrides: Sequence[str], message: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        config_of(tmp_path, *overrides)
    assert str(refusal.value).startswith(message)


def several(folder: Path) -> list[str]:
    make_workspace(folder)
    write_model(folder / "other")
    words = [f"{key}.engine=vllm" for key in ("teachers.a", "teachers.b")]
    words += [f"teachers.a.model={folder}/teacher", f"teachers.b.model={folder}/other"]
    return [*words, "train.steps=5", "data.max_prompt_tokens=64", "rollout.max_new_tokens=64"]


def test_several_teachers_take_nodes_in_turn(tmp_path: Path) -> None:
    words = several(tmp_path)
    with pytest.raises(ConfigError, match=r"got 1; expected at least 2, one for each of teachers\.a, teachers\.b"):
        config_of(tmp_path, *words, *SERVED, "cluster.teacher_nodes=1")
    config = config_of(tmp_path, *words, *SERVED, "cluster.teacher_nodes=3")
    plan = plan_of(tmp_path, {"trainer": ("t",), "teacher": ("x", "y", "z")})
    assert plan.servers(config) == {"teachers.a": ("x", "z"), "teachers.b": ("y",)}


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"trainer": ("a", "b"), "rollout": ("c",)})
    plan.folder.mkdir(parents=True)
    plan.write()
    assert Plan.read(plan.path) == plan


def test_servers_get_a_key_and_a_folder_unless_the_recipe_has_them(tmp_path: Path) -> None:
    config = config_of(tmp_path, *BOTH, *SERVED)
    plan = plan_of(tmp_path, {"trainer": ("a",), "rollout": ("b",), "teacher": ("c", "d")})
    key = plan.folder / "key"
    assert server_settings(config, plan, key) == {
        "rollout.servers.key_file": str(key),
        "rollout.servers.weights_dir": str(plan.folder / "weights"),
        "teacher.servers.key_file": str(key),
    }
    (tmp_path / "mine").write_text("a key")
    own = [f"{section}.servers.key_file={tmp_path}/mine" for section in ("rollout", "teacher")]
    assert server_settings(config_of(tmp_path, *BOTH, *SERVED, *own, "rollout.servers.transport=gloo"), plan, key) == {}


def test_a_key_is_its_owner_s_alone_and_stays(tmp_path: Path) -> None:
    write_key(tmp_path / "key")
    first = (tmp_path / "key").read_text()
    write_key(tmp_path / "key")
    assert (tmp_path / "key").read_text() == first
    assert len(first.strip()) == 64
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_a_server_listens_at_its_node_s_address_behind_the_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a key")
    words = [f"rollout.servers.key_file={tmp_path}/key", f"rollout.servers.weights_dir={tmp_path}"]
    config = config_of(tmp_path, *BOTH, *SERVED, *words)
    server = settings_of(config, "rollout", "10.0.0.3", "/scratch")
    assert (server.role, server.host, server.key_file) == ("writer", "10.0.0.3", str(tmp_path / "key"))
    assert (server.weights_dir, server.model) == (str(tmp_path), config.student.model)
    teacher = settings_of(config, "teacher", "10.0.0.4", "/scratch")
    assert (teacher.role, teacher.weights_dir, teacher.model) == ("teacher", "/scratch", config.teacher.model)


def test_addresses_are_there_when_every_node_has_said_them(tmp_path: Path) -> None:
    config = config_of(tmp_path, *BOTH, *SERVED)
    plan = plan_of(tmp_path, {"trainer": ("a",), "rollout": ("b",), "teacher": ("c", "d")})
    plan.folder.mkdir(parents=True)
    for section, name in (("rollout", "b"), ("teacher", "c")):
        url_file(plan, section, name).write_text(f"http://{name}:1,http://{name}:2\n")
    assert found_urls(plan, config) is None
    url_file(plan, "teacher", "d").write_text("http://d:1\n")
    assert found_urls(plan, config) == {
        "rollout.servers.urls": "http://b:1,http://b:2",
        "teacher.servers.urls": "http://c:1,http://c:2,http://d:1",
    }


def test_torchrun_meets_on_the_first_node_and_does_not_hear_sigterm(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"trainer": ("a", "b"), "rollout": ("c",)})
    command = node.trainer_command(plan, "b", {"rollout.servers.urls": "http://c:1"})
    options = dict(zip(command[3:15:2], command[4:16:2], strict=True))
    assert options == {
        "--nnodes": "2",
        "--nproc-per-node": "4",
        "--rdzv-backend": "c10d",
        "--rdzv-id": "slurm-7-0",
        "--rdzv-endpoint": "10.0.0.0:20007",
        "--local-addr": "10.0.0.1",
    }
    assert command[15:] == [
        *("--signals-to-handle", "SIGINT", "-m", "nemo_opd.cli", "train", "recipe.yaml"),
        "rollout.servers.urls=http://c:1",
    ]


def waiting(folder: Path) -> tuple[Plan, Config]:
    plan = plan_of(folder, {"trainer": ("a", "b"), "rollout": ("c",)})
    plan.folder.mkdir(parents=True)
    return plan, config_of(folder, "rollout.engine=vllm", "cluster.rollout_nodes=1")


def test_a_trainer_that_waits_for_servers_can_be_stopped(tmp_path: Path) -> None:
    plan, config = waiting(tmp_path)
    (Path(plan.run_dir) / "control" / "stop").write_text("slurm-7-0\n")
    assert node.wait_for_servers(plan, config, "b") == 0
    assert read_outcome(Path(plan.run_dir)) is None, "the first node says it"
    assert node.wait_for_servers(plan, config, "a") == 0
    outcome = read_outcome(Path(plan.run_dir))
    assert outcome is not None
    assert (outcome.status, outcome.step) == (Status.PREEMPTED, None)


def test_a_trainer_does_not_wait_for_servers_that_were_given_up(tmp_path: Path) -> None:
    plan, config = waiting(tmp_path)
    (plan.folder / "failed").write_text("the rollout servers on c ended 4 times\n")
    assert node.wait_for_servers(plan, config, "a") == EXIT_CODES[Status.FAILED]


def test_without_servers_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {TRAINER: ("a",)})
    assert node.wait_for_servers(plan, config_of(tmp_path), "a") == {}
