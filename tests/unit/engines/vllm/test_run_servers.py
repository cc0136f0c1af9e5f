"""What the processes of a run know of its servers, and what is left where they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_opd.config import Config, DataConfig, OneOfSeveral, RunConfig, ServersConfig, TeacherConfig, TrainConfig
from nemo_opd.engines.vllm import run_servers
from nemo_opd.engines.vllm.local import LocalServers
from nemo_opd.engines.vllm.run_servers import RunServers, private_folder, teacher_servers, writer_servers
from nemo_opd.engines.vllm.settings import TEACHER, WRITER, ServerSettings
from nemo_opd.errors import ConfigError
from nemo_opd.processes import Processes
from tests.helpers.ranks import RankPool
from tests.unit.configuration.workspace import write_model


def config_of(folder: Path, **teacher: object) -> Config:
    config = Config()
    config.run, config.data = RunConfig(dir=str(folder / "run")), DataConfig(path="unused", max_prompt_tokens=40)
    config.train = TrainConfig(steps=1)
    config.student.model = str(folder / "student")
    config.teacher = TeacherConfig(engine="vllm", model="the teacher", **teacher)  # type: ignore[arg-type]
    return config


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, tuple[ServerSettings, dict[str, str]]]:
    """By name, what would have been started; `tmp_path` is the shared memory, and has a student."""
    found: dict[str, tuple[ServerSettings, dict[str, str]]] = {}

    def start(self: LocalServers, name: str, settings: ServerSettings, environment: dict[str, str]) -> None:
        found[name] = (settings, environment)

    monkeypatch.setattr(LocalServers, "start", start)
    monkeypatch.setattr(run_servers, "SHARED_MEMORY", tmp_path)
    write_model(tmp_path / "student", vocab_size=96)
    return found


def test_servers_of_our_own_have_their_role_name_and_devices(
    started: dict[str, tuple[ServerSettings, dict[str, str]]], tmp_path: Path
) -> None:
    servers = ServersConfig(count=2, tensor_parallel_size=2, devices="4,5,6,7", memory_share=0.5, quantization="fp8")
    config = config_of(tmp_path, servers=servers, dtype="float32", micro_batch_tokens=32)
    config.rollout.max_new_tokens = 60
    owners = [writer_servers(config, Processes()), teacher_servers(config, "teacher", Processes())]
    config.teachers = {"math-hard": OneOfSeveral(engine="vllm", model="another")}
    owners.append(teacher_servers(config, "teachers.math-hard", Processes()))
    assert sorted(started) == ["teacher-0", "teacher-1", "teacher-math-hard-0", "writer-0"]
    teacher, environment = started["teacher-1"]
    assert (teacher.role, teacher.model, teacher.dtype, teacher.scored_ids) == (TEACHER, "the teacher", "float32", 96)
    assert (teacher.batch_tokens, teacher.max_running, teacher.max_positions) == (32, 32, None)
    assert (teacher.tensor_parallel_size, teacher.memory_share, teacher.quantization) == (2, 0.5, "fp8")
    assert environment == {"CUDA_VISIBLE_DEVICES": "6,7"}
    writer, environment = started["writer-0"]
    assert (writer.role, writer.max_positions, writer.scored_ids, environment) == (WRITER, 100, None, {})
    for owner in owners:
        owner.close()
    assert [path.name for path in tmp_path.iterdir()] == ["student"], "nothing is left in shared memory"


def test_servers_of_our_own_have_a_key_that_nobody_else_can_read(
    started: dict[str, tuple[ServerSettings, dict[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalServers, "urls", lambda *_: ["http://127.0.0.1:1"])
    monkeypatch.setattr(LocalServers, "watch", lambda *_: None)
    keys = []
    for _ in range(2):
        owner = writer_servers(config_of(tmp_path), Processes())
        key = owner.servers().key
        file = started["writer-0"][0].key_file
        assert file is not None and Path(file).read_text().strip() == key
        assert Path(file).stat().st_mode & 0o077 == 0 and Path(file).parent.stat().st_mode & 0o077 == 0
        keys.append(key)
        owner.close()
        assert not Path(file).exists()
    assert None not in keys and keys[0] != keys[1]


def test_a_process_on_another_machine_is_told_so(
    started: dict[str, tuple[ServerSettings, dict[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalServers, "urls", lambda *_: ["http://127.0.0.1:1"])
    monkeypatch.setattr(LocalServers, "watch", lambda *_: None)
    owner = writer_servers(config_of(tmp_path), Processes())
    key_file = started["writer-0"][0].key_file
    assert key_file is not None
    Path(key_file).unlink()  # it lies in the memory of the machine where the servers are
    with pytest.raises(ConfigError, match="writer servers: got a process on another machine; expected every process"):
        owner.servers()
    owner.close()


def test_a_key_of_the_recipe_stays(started: dict[str, tuple[ServerSettings, dict[str, str]]], tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config.rollout.servers.key_file = str(tmp_path / "own")
    writer_servers(config, Processes()).close()
    assert started["writer-0"][0].key_file == str(tmp_path / "own")


def test_a_killed_attempts_folder_is_removed_and_nobody_elses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run_servers, "SHARED_MEMORY", tmp_path)
    run, other = tmp_path / "run", tmp_path / "other"
    kept = [private_folder(run, "teacher-math-hard"), private_folder(run, "writer"), private_folder(other, "teacher")]
    left = private_folder(run, "teacher-math")
    assert left.stat().st_mode & 0o077 == 0
    new = private_folder(run, "teacher-math")
    assert not left.exists() and new.exists() and all(folder.exists() for folder in kept)


def ask(rank: int, settings: ServersConfig) -> tuple[Any, ...]:
    server = ServerSettings(model="m", role=TEACHER, ready_file="", weights_dir="", max_running=7)
    owner = RunServers("teacher", settings, server, Path("unused"), Processes.current())
    try:
        servers = owner.servers()
    except (RuntimeError, OSError) as error:
        return (type(error).__name__, str(error))
    return (servers.session, list(servers.urls), servers.key, servers.slots)


def test_all_processes_know_the_same_servers(ranks2: RankPool, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.touch(mode=0o600)
    key.write_text("secret")
    first, second = ranks2.run(ask, ServersConfig(urls="http://a:1, http://b:2,", key_file=str(key)))
    assert first == second
    assert len(first[0]) == 32 and first[1:] == (["http://a:1", "http://b:2"], "secret", 7)
