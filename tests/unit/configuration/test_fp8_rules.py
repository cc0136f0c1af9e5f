"""What is refused of FP8 before a model loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_opd.config import FP8Config
from nemo_opd.configuration.load import load
from nemo_opd.errors import ConfigError
from tests.unit.configuration.workspace import make_workspace, write_model

WIDE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    recipe = make_workspace(tmp_path)
    for name in ("wide", "wider"):
        write_model(tmp_path / name, **WIDE)
    return recipe


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("name", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_sizes_that_fit_pass(recipe: Path, who: str, name: str) -> None:
    settings = ["student.model=wide", "teacher.model=wider", f"{who}.fp8.recipe={name}"]
    assert getattr(load(recipe, settings), who).fp8.recipe == name


def test_layers_in_bf16_unless_megatron_refuses_them() -> None:
    assert FP8Config("blockwise").bf16_layers() == (1, 1)
    assert FP8Config("blockwise", bf16_layers_at_start=2, bf16_layers_at_end=0).bf16_layers() == (2, 0)
    assert FP8Config("delayed").bf16_layers() == (0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["student.fp8.recipe=e5m2"], "student.fp8.recipe: got e5m2; expected one of none, delayed, tensorwise,"),
        (["student.fp8.format=e5m2"], "student.fp8.format: got e5m2; expected one of hybrid, e4m3;"),
        (["student.fp8.amax_history=4"], "student.fp8: got settings without a recipe; expected a recipe; set"),
        (
            ["student.fp8.recipe=blockwise"],
            "student.fp8.recipe: got blockwise with a hidden size of 32; expected a multiple of 128, as recipe",
        ),
        (
            ["student.fp8.recipe=mxfp8", "student.tensor_model_parallel_size=2"],
            "student.fp8.recipe: got mxfp8 with a attention output of a process of 16; expected a multiple of 32",
        ),
        (
            ["student.model=wide", "student.fp8.recipe=delayed", "student.fp8.bf16_layers_at_end=1"],
            "student.fp8.bf16_layers_at_end: got 1; expected 0 with recipe delayed, which Megatron runs in all layers",
        ),
        (
            [
                *("student.model=wide", "student.fp8.recipe=blockwise", "student.fp8.bf16_layers_at_start=3"),
                "student.pipeline_model_parallel_size=2",
            ],
            "student.fp8.bf16_layers_at_start: got 3; expected at most the 2 layers of a pipeline stage;",
        ),
        (
            ["student.model=wide", "student.fp8.recipe=blockwise", "student.dtype=float32"],
            "student.fp8.recipe: got blockwise beside student.dtype=float32; expected bfloat16 beside FP8;",
        ),
        (
            ["teacher.model=wider", "teacher.fp8.recipe=blockwise", "teacher.fp8.param_gather=true"],
            "teacher.fp8.param_gather: got True; expected false but for a student with the distributed optimizer",
        ),
        (
            ["student.model=wide", "student.fp8.recipe=mxfp8", "student.fp8.param_gather=true"],
            "student.fp8.param_gather: got True; expected false with recipe mxfp8, whose weights Megatron",
        ),
        (
            ["teacher.model=wider", "teacher.fp8.recipe=blockwise", "teacher.engine=hf"],
            "teacher.fp8.recipe: got blockwise; expected none with teacher.engine=hf; set teacher.engine=megatron",
        ),
        (
            ["teacher.fidelity.max_kl=0.1"],
            "teacher.fidelity: got settings; expected nothing without teacher.fp8.recipe of an external teacher",
        ),
        (["rollout.servers.quantization=int4"], "rollout.servers.quantization: got int4; expected one of none, fp8;"),
    ],
)
def test_what_cannot_work_is_refused(recipe: Path, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(recipe, settings)
    assert str(refused.value).startswith(message)


def test_a_self_teacher_scores_in_the_students_precision(recipe: Path) -> None:
    settings = ["algorithm=opsd", "student.model=wide", "student.fp8.recipe=blockwise", "teacher.model=null"]
    more = ["context.text=a rule", "context.max_tokens=64", "teacher.source=frozen"]
    assert load(recipe, [*settings, *more]).teacher.fp8.recipe == "none"
    with pytest.raises(ConfigError, match=r"teacher.fp8: got .*expected the student's"):
        load(recipe, [*settings, *more, "teacher.fp8.recipe=tensorwise"])


def test_experts_are_refused(recipe: Path, tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    write_model(tmp_path / "experts", **WIDE, **experts, architectures=["Qwen3MoeForCausalLM"])
    with pytest.raises(ConfigError, match=r"student\.fp8\.recipe: got tensorwise; expected none for a mixture of expe"):
        load(recipe, ["student.model=experts", "teacher.model=wider", "student.fp8.recipe=tensorwise"])
