"""How many processes a run has, and who says so."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from nemo_opd.config import SLOTS, Config, OneOfSeveral
from nemo_opd.configuration.check import CHOICES, RANGES, check, launched_processes, world_size
from nemo_opd.configuration.load import load
from nemo_opd.errors import ConfigError
from tests.unit.configuration.workspace import make_workspace

TORCHRUN = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "RANK": "1", "WORLD_SIZE": "4"}
SRUN = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500", "SLURM_PROCID": "3", "SLURM_NTASKS": "8"}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return make_workspace(tmp_path)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [((1, 1), (1, 1), 1), ((2, 1), (1, 2), 2), ((2, 2), (1, 2), 4), ((2, 1), (1, 3), 6), ((1, 4), (2, 3), 12)],
)
def test_smallest_number_of_processes_that_fits_both(
    student: tuple[int, int], teacher: tuple[int, int], expected: int
) -> None:
    config = Config()
    config.student.tensor_model_parallel_size, config.student.pipeline_model_parallel_size = student
    config.teacher.tensor_model_parallel_size, config.teacher.pipeline_model_parallel_size = teacher
    assert world_size(config, {}) == expected
    config.train.processes = 2 * expected
    assert world_size(config, {}) == 2 * expected


def test_ranks_that_share_sequences_are_counted() -> None:
    config = Config()
    config.student.tensor_model_parallel_size, config.student.context_parallel_size = 2, 4
    config.teacher.context_parallel_size = 3
    assert world_size(config, {}) == 24


@pytest.mark.parametrize("engine", ["none", "hf", "vllm"])
def test_only_a_megatron_teacher_asks_for_processes(engine: str) -> None:
    config = Config()
    config.teacher.engine, config.teacher.pipeline_model_parallel_size = engine, 3
    assert world_size(config, {}) == 1


@pytest.mark.parametrize(
    "words",
    [
        ("loss=policy_gradient",),
        ("loss=k2", "stop=kat", "stop.window=8", "stop.stride=8"),
        ("loss=trust_region", "loss.outlier=mask"),
        ("loss=tail", "loss.teacher=scores", "loss.support=teacher"),
        ("loss=k2", "student.tensor_model_parallel_size=2"),
    ],
    ids=" ".join,
)
def test_a_served_teacher_serves_losses_of_few_numbers(recipe: Path, words: tuple[str, ...]) -> None:
    served = ("teacher.engine=vllm", "teacher.servers.urls=http://node1:8000, http://node2:8000")
    assert load(recipe, [*served, *words]).teacher.servers.urls is not None
    several = ("teacher.model=null", "teachers.a.model=teacher", "teachers.b.model=teacher", "teachers.b.engine=vllm")
    if "stop=kat" not in words:
        load(recipe, [*several, "teachers.b.servers.urls=http://node1:8000", "data.teacher_key=task", *words])


def test_a_launcher_decides_how_many_processes_there_are() -> None:
    config = Config()
    config.train.processes = 2
    assert world_size(config, TORCHRUN) == 4
    config.student.tensor_model_parallel_size = 3
    with pytest.raises(ConfigError, match="WORLD_SIZE: got 4; expected a multiple of 3"):
        world_size(config, TORCHRUN)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (TORCHRUN, 4),
        (SRUN, 8),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}, None),  # a batch script
        ({"RANK": "0", "WORLD_SIZE": "4"}, None),  # left over by something else
        ({**TORCHRUN, "WORLD_SIZE": ""}, None),
    ],
)
def test_who_counts_as_a_launcher(environment: dict[str, str], expected: int | None) -> None:
    assert launched_processes(environment) == expected


def test_a_launcher_of_the_wrong_size_is_refused_with_the_recipe(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    load(recipe, ["student.tensor_model_parallel_size=2"])
    with pytest.raises(ConfigError, match="WORLD_SIZE: got 4; expected a multiple of 3"):
        load(recipe, ["teacher.pipeline_model_parallel_size=3"])


def test_the_distributed_optimizer_needs_transformer_engine(recipe: Path) -> None:
    pytest.importorskip("torch")
    try:
        import transformer_engine  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"optimizer\.distributed: got True; expected false or null"):
            load(recipe, ["optimizer.distributed=true"])
    else:
        load(recipe, ["optimizer.distributed=true"])


def _settings(section: object, prefix: str = "") -> dict[str, object]:
    """Every dotted key below a section with its default."""
    found: dict[str, object] = {}
    for name, value in vars(section).items():
        if dataclasses.is_dataclass(value):
            found |= _settings(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def test_rules_name_keys_of_the_schema() -> None:
    """A rule about a key that was renamed would never be broken."""
    choices = {f"{slot}.{name}" for slot in SLOTS for choice in SLOTS[slot].values() for name in vars(choice())}
    settings = {*_settings(Config()), *(f"teacher.{name}" for name in vars(OneOfSeveral()))}
    assert set(CHOICES) | set(RANGES) <= settings | choices


def test_every_number_of_the_schema_has_a_range() -> None:
    numbers = {
        key
        for key, value in {**_settings(Config()), **_settings(OneOfSeveral(), "teacher.")}.items()
        if key.split(".")[0] not in SLOTS and isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert numbers - set(RANGES) == set()
    assert all(low <= high and not math.isnan(low) for low, high in RANGES.values())


def test_defaults_pass_every_range_and_choice(recipe: Path) -> None:
    check(load(recipe, checked=False), {})


@pytest.mark.parametrize(
    "words",
    [
        ("loss=reverse_kl",),
        ("loss=tail", "loss.divergence=jsd"),
        ("loss=policy_gradient",),
        ("loss=policy_gradient", "loss.importance_ratio=none", "weight=tis"),
        ("loss=k2", "weight=icepop"),
        ("loss=minillm",),
        ("prefix=mixed", "prefix.loss=same"),
    ],
    ids=lambda words: " ".join(words),
)
def test_losses_that_may_read_older_tokens(recipe: Path, words: tuple[str, ...]) -> None:
    """Divergences as they are, losses of the sampled token with an importance ratio in either place."""
    servers = ("rollout.engine=vllm", "rollout.servers.urls=http://a:1", "rollout.servers.weights_dir=/w")
    assert load(recipe, [*servers, "rollout.staleness=2", *words]).rollout.staleness == 2
