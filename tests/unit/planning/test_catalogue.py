"""Sizes of published models: the counts that their publishers give, and how a recipe's model is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_opd.errors import ConfigError
from nemo_opd.planning.catalogue import known_models, model_shape, read_sizes
from tests.unit.configuration.workspace import write_model

PUBLISHED = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.3-70B": 70_553_706_496,
}
"""Parameters of the published checkpoints, as their safetensors files count them."""


def test_every_model_has_as_many_parameters_as_was_published() -> None:
    assert {name: model_shape("student.model", f"models/{name}").parameters for name in known_models()} == PUBLISHED


@pytest.mark.parametrize(("name", "billions"), [("Qwen3-30B-A3B", 3.3), ("Qwen3-235B-A22B", 22)])
def test_a_token_passes_through_the_parameters_that_the_name_says(name: str, billions: float) -> None:
    shape = model_shape("student.model", name)
    embedding = shape.vocabulary * shape.hidden
    assert shape.active + 2 * embedding == pytest.approx(billions * 1e9, rel=0.02)


def test_a_folder_counts_more_than_its_name(tmp_path: Path) -> None:
    write_model(tmp_path / "Qwen3-8B")
    assert model_shape("student.model", str(tmp_path / "Qwen3-8B")).layers == 4


@pytest.mark.parametrize("name", ["Qwen3-1.7B-Base", "Llama-3.3-70B-Instruct"])
def test_a_variant_has_the_sizes_of_its_model(name: str) -> None:
    plain = name.removesuffix("-Base").removesuffix("-Instruct")
    assert model_shape("student.model", f"models/{name}").parameters == PUBLISHED[plain]


def test_an_unknown_model_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(
        ConfigError,
        match=r"student.model: got no folder models/Qwen3-9B; expected a model folder, or a"
        r" path that ends in one of Llama-3.2-3B, .*Qwen3-8B; give a folder with at least the model's",
    ):
        model_shape("student.model", "models/Qwen3-9B")  # fmt: skip


def test_a_family_that_nobody_plans_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "mamba", architectures=["MambaForCausalLM"])
    with pytest.raises(ConfigError, match="got a model of architecture MambaForCausalLM"):
        model_shape("student.model", str(tmp_path / "mamba"))
    with pytest.raises(ConfigError, match="got a model of architecture MambaForCausalLM"):
        read_sizes("student.model", tmp_path / "mamba", convertible=True)


def test_experts_in_some_layers_alone_are_refused(tmp_path: Path) -> None:
    values = json.loads((Path(__file__).parents[3] / "nemo_opd/planning/models/Qwen3-30B-A3B.json").read_text())
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "config.json").write_text(json.dumps({**values, "mlp_only_layers": [0]}))
    with pytest.raises(ConfigError, match="layers with and without experts"):
        model_shape("student.model", str(tmp_path / "moe"))


def test_experts_are_counted_under_the_name_of_transformers_4_and_of_5(tmp_path: Path) -> None:
    values = json.loads((Path(__file__).parents[3] / "nemo_opd/planning/models/Qwen3-30B-A3B.json").read_text())
    values["num_local_experts"] = values.pop("num_experts")
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "config.json").write_text(json.dumps(values))
    assert model_shape("student.model", str(tmp_path / "moe")).parameters == PUBLISHED["Qwen3-30B-A3B"]
