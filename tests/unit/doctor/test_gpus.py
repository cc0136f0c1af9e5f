"""GPUs and their memory, from what torch is made to say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_opd.config import Config
from nemo_opd.doctor import gpus
from nemo_opd.doctor.finding import Finding, Verdict
from nemo_opd.doctor.gpus import Gpu, gpu_findings, look, processes_here
from nemo_opd.doctor.memory import memory_findings
from tests.helpers.workspace import make_workspace, workspace_config

GIB = 1 << 30
EIGHT = tuple(Gpu("NVIDIA H100 80GB HBM3", 79 * GIB, 80 * GIB) for _ in range(8))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("gpus"), problems=4)


def sees(visible: str | None) -> tuple[Gpu, ...]:
    """A node of eight."""
    return EIGHT if visible is None else EIGHT[: len(visible.split(","))]


def by_name(rows: list[Finding]) -> dict[str, Finding]:
    assert all(row.way_out for row in rows if row.verdict in (Verdict.WARN, Verdict.FAIL))
    return {row.name.removeprefix("gpus: "): row for row in rows}


@pytest.mark.parametrize(("driver", "verdict"), [(False, Verdict.OK), (True, Verdict.WARN)])
def test_no_gpu(workspace: Path, monkeypatch: pytest.MonkeyPatch, driver: bool, verdict: Verdict) -> None:
    monkeypatch.setattr(gpus, "DRIVER", (Path("/dev/null" if driver else "/dev/no-such-device"),))
    (row,) = gpu_findings(workspace_config(workspace), {}, lambda visible: ())
    assert row.verdict is verdict and "on CPU" in str(row.found)


@pytest.mark.parametrize(("processes", "verdict"), [(8, Verdict.OK), (16, Verdict.FAIL)])
def test_a_gpu_for_each_process(workspace: Path, processes: int, verdict: Verdict) -> None:
    config = workspace_config(workspace, f"train.processes={processes}")
    row = by_name(gpu_findings(config, {}, sees))["for processes"]
    assert (row.verdict, row.found) == (verdict, 8)


def test_processes_of_this_node(workspace: Path) -> None:
    config = workspace_config(workspace, "train.processes=16")
    launched = {"MASTER_ADDR": "n1", "MASTER_PORT": "1", "RANK": "9", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_GPUS_ON_NODE": "4"}
    assert processes_here(config, {}) == 16
    assert processes_here(config, launched) == 8
    assert processes_here(config, job) == 4


def test_memory_that_somebody_has(workspace: Path) -> None:
    config = workspace_config(workspace, "train.processes=2")
    busy = (EIGHT[0], replace(EIGHT[0], free=40 * GIB), EIGHT[0])
    row = by_name(gpu_findings(config, {}, lambda visible: busy))["least free memory, GiB"]
    assert (row.verdict, row.found) == (Verdict.WARN, 40.0)
    idle_but_third = (EIGHT[0], EIGHT[0], busy[1])
    row = by_name(gpu_findings(config, {}, lambda visible: idle_but_third))["least free memory, GiB"]
    assert row.verdict is Verdict.OK, "no process is started on the third"


def test_torch_that_ends_with_an_error(workspace: Path) -> None:
    def broken(visible: str | None) -> tuple[Gpu, ...]:
        raise RuntimeError("CUDA error: out of memory")

    (row,) = gpu_findings(workspace_config(workspace), {}, broken)
    assert row.verdict is Verdict.FAIL and "out of memory" in str(row.found)
    (row,) = memory_findings(workspace_config(workspace), None, {}, broken)
    assert row.verdict is Verdict.SKIPPED


def served(workspace: Path, **given: object) -> Config:
    """Two servers beside two processes."""
    config = workspace_config(workspace, "train.processes=2")
    servers = replace(config.rollout.servers, count=2, **given)  # type: ignore[arg-type]
    return replace(config, rollout=replace(config.rollout, engine="vllm", servers=servers))


@pytest.mark.parametrize(
    ("given", "environment", "verdict"),
    [
        ({"devices": "2,3"}, {}, Verdict.OK),
        ({"devices": "1,2"}, {}, Verdict.FAIL),
        ({"devices": "1,2", "memory_share": 0.4}, {}, Verdict.WARN),
        ({"devices": "7,8"}, {}, Verdict.FAIL),
        ({"devices": "3,3"}, {}, Verdict.FAIL),
        ({"devices": "GPU-1,GPU-2"}, {}, Verdict.SKIPPED),
        ({}, {}, Verdict.FAIL),
        ({"placement": "colocated"}, {}, Verdict.OK),
        ({"placement": "colocated", "devices": "0,1"}, {}, Verdict.OK),
        ({"placement": "colocated", "devices": "1,2"}, {}, Verdict.FAIL),
        ({"devices": "0,1"}, {"CUDA_VISIBLE_DEVICES": "4,5"}, Verdict.OK),
        ({"devices": "5,6"}, {"CUDA_VISIBLE_DEVICES": "4,5"}, Verdict.FAIL),
    ],
)
def test_devices_of_servers(
    workspace: Path, given: dict[str, object], environment: dict[str, str], verdict: Verdict
) -> None:
    row = by_name(gpu_findings(served(workspace, **given), environment, sees))["rollout.servers.devices"]
    assert row.verdict is verdict


def test_servers_that_want_the_same_gpu(workspace: Path) -> None:
    config = served(workspace, devices="2,3")
    servers = replace(config.rollout.servers, count=1, devices="3")
    config = replace(config, teacher=replace(config.teacher, engine="vllm", servers=servers))
    row = by_name(gpu_findings(config, {}, sees))["teacher.servers.devices"]
    assert row.verdict is Verdict.FAIL and row.found == "in use: 3 (rollout.servers)"


def test_servers_on_nodes_of_their_own_have_all_gpus(workspace: Path) -> None:
    config = served(workspace, devices="0,1")
    config = replace(config, cluster=replace(config.cluster, rollout_nodes=1))
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    assert by_name(gpu_findings(config, job, sees))["rollout.servers.devices"].verdict is Verdict.OK
    assert by_name(gpu_findings(config, {}, sees))["rollout.servers.devices"].verdict is Verdict.FAIL


@pytest.mark.parametrize(("size", "verdict"), [(4, Verdict.OK), (2, Verdict.WARN), (8, Verdict.FAIL)])
def test_servers_on_nodes_of_their_own_want_all_gpus_and_no_more(workspace: Path, size: int, verdict: Verdict) -> None:
    config = served(workspace, tensor_parallel_size=size)
    config = replace(config, cluster=replace(config.cluster, rollout_nodes=1))
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    row = by_name(gpu_findings(config, job, sees))["for rollout.servers"]
    assert (row.verdict, row.found) == (verdict, 2 * size)
    rows = by_name(gpu_findings(config, {**job, "SLURM_HET_SIZE": "2"}, sees))
    assert "for rollout.servers" not in rows, "nodes of another component may be of another kind"


def test_torch_itself_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the process that a machine with a driver asks; every GPU is hidden from it."""
    monkeypatch.setattr(gpus, "DRIVER", (Path("/dev/null"),))
    look.cache_clear()
    assert look("") == ()
    monkeypatch.setattr(gpus.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with 1"):
        look("another")


# --- memory


def test_memory_without_a_gpu(workspace: Path) -> None:
    (row,) = memory_findings(workspace_config(workspace), None, {}, lambda visible: ())
    assert (row.verdict, row.found) == (Verdict.SKIPPED, "no GPU here: say --gpu to compare with one")


def test_memory_of_a_gpu_that_is_named(workspace: Path) -> None:
    (row,) = memory_findings(workspace_config(workspace), "h100", {}, lambda visible: pytest.fail("not asked"))
    assert row.verdict is Verdict.OK and 0 < float(row.found or 0) < 79
    assert row.bound.startswith("at most 79.6")


def test_memory_of_the_smallest_gpu_that_is_here(workspace: Path) -> None:
    need = float(memory_findings(workspace_config(workspace), "h100", {})[0].found or 0)
    verdicts = []
    for size in (need * 0.99, need * 1.05, need * 1.2):
        seen = (EIGHT[0], Gpu("another", 0, int(size * GIB)))
        (row,) = memory_findings(workspace_config(workspace), None, {}, lambda visible, seen=seen: seen)  # type: ignore[misc]
        verdicts.append(row.verdict)
        assert row.verdict is Verdict.OK or "nemo-opd plan" in row.way_out
    assert verdicts == [Verdict.FAIL, Verdict.WARN, Verdict.OK]


def test_what_does_not_fit_comes_with_a_change(workspace: Path) -> None:
    config = workspace_config(workspace)
    student = replace(config.student, model="models/Qwen3-8B", dtype="bfloat16")
    teacher = replace(config.teacher, model="models/Qwen3-8B", dtype="bfloat16")
    (row,) = memory_findings(replace(config, student=student, teacher=teacher), "h100", {})
    assert row.verdict is Verdict.FAIL and row.way_out.startswith("for example student.tensor_model_parallel_size=")


def test_a_server_without_room(workspace: Path) -> None:
    config = served(workspace, devices="2,3")
    tight = replace(config.rollout, servers=replace(config.rollout.servers, memory_share=0.01))
    rows = [memory_findings(one, "h100", {})[1] for one in (config, replace(config, rollout=tight))]
    assert [row.verdict for row in rows] == [Verdict.OK, Verdict.FAIL] and rows[1].way_out


def test_a_model_that_plan_does_not_know(workspace: Path) -> None:
    config = workspace_config(workspace)
    (row,) = memory_findings(replace(config, student=replace(config.student, model="models/x")), "h100", {})
    assert row.verdict is Verdict.SKIPPED and "student.model" in str(row.found)
