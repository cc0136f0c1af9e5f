"""What FP8 changes of a plan, against numbers by hand for a small model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from nemo_opd.config import FP8Config
from nemo_opd.errors import ConfigError
from nemo_opd.planning.activations import layer_activations
from nemo_opd.planning.fp8 import Fp8
from nemo_opd.planning.gpus import GPUS, Assumptions
from nemo_opd.planning.moments import moments
from nemo_opd.planning.plan import Options, make_setting, plan, read_recipe
from nemo_opd.planning.text import as_json
from tests.helpers.planned import planned, sent

SIZES = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
MATRICES = 256 * (256 + 2 * 128 + 256) + 3 * 256 * 512
"""Numbers of a layer: query, key and value, the output's projection; gate, up and down."""
PARAMETERS = 4 * (MATRICES + 2 * 256 + 2 * 64) + 2 * 1000 * 256 + 256
BLOCK = 1 + 4 / (128 * 128)
"""Bytes of a weight in blocks of 128 x 128 with one fp32 scale each."""
RECIPE = """\
run: {dir: run}
student: {model: small}
teacher: {model: small}
data: {path: data/train.jsonl, max_prompt_tokens: 128}
rollout: {max_new_tokens: 128, samples_per_prompt: 2, dtype: bfloat16}
train: {steps: 10, prompts_per_step: 8, micro_batch_tokens: 512, processes: 2}
"""
ON_SERVERS = ("rollout.engine=vllm", "rollout.servers.urls=http://a:1", "rollout.servers.transport=nccl")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(SIZES))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def fp8(recipe: str, gpu: str = "h100", **settings: Any) -> Fp8:
    return Fp8(FP8Config(recipe=recipe, **settings), GPUS[gpu])


@pytest.mark.parametrize(
    ("recipe", "gpu", "trained", "forward", "saved", "gradient"),
    [
        ("delayed", "h100", 2, 1, 1, 2),  # Hopper transposes what backward reads
        ("tensorwise", "h200", 2, 1, 1, 2),
        ("tensorwise", "b200", 1, 1, 1, 1),
        ("blockwise", "h100", 2 * BLOCK, BLOCK, 1 + 4 / 128, 2 + 8 / 128),
        ("mxfp8", "b200", 2 + 2 / 32, 1 + 1 / 32, 1 + 1 / 32, 2 + 2 / 32),  # blocks of a row are none of a column
        ("blockwise", "b200", 2 + 2 / 32, 1 + 1 / 32, 1 + 1 / 32, 2 + 2 / 32),
    ],
)
def test_bytes_of_a_number(
    recipe: str, gpu: str, trained: float, forward: float, saved: float, gradient: float
) -> None:
    found = fp8(recipe, gpu)
    assert (found.trained, found.weight, found.saved, found.gradient) == (trained, forward, saved, gradient)


@pytest.mark.parametrize(
    ("settings", "pp", "layers"),
    [
        ({"recipe": "none"}, 2, [0, 0]),
        ({"recipe": "delayed"}, 2, [4, 4]),
        ({"recipe": "blockwise"}, 1, [6]),
        ({"recipe": "blockwise"}, 4, [1, 2, 2, 1]),
        ({"recipe": "blockwise", "bf16_layers_at_start": 2, "bf16_layers_at_end": 0}, 4, [0, 2, 2, 2]),
        ({"recipe": "blockwise", "bf16_layers_at_start": 8, "bf16_layers_at_end": 8}, 1, [0]),
    ],
)
def test_layers_of_each_stage(settings: dict[str, Any], pp: int, layers: list[int]) -> None:
    found = Fp8(FP8Config(**settings), GPUS["h100"])
    assert [found.layers(8, pp, stage) for stage in range(pp)] == layers
    assert found.fewest(8, pp) == min(layers)


def test_layers_of_each_stage_in_chunks() -> None:
    """Layers 6 to 12 of 16: of chunks a stage has its own, wherever they lie."""
    found = Fp8(FP8Config(recipe="blockwise", bf16_layers_at_start=5, bf16_layers_at_end=4), GPUS["h100"])
    assert [found.layers(16, 2, stage) for stage in (0, 1)] == [3, 4]
    assert [found.layers(16, 2, stage, 2) for stage in (0, 1)] == [4, 3]  # 9 to 12; 6 to 8
    assert [found.layers(16, 4, stage, 2) for stage in range(4)] == [2, 2, 1, 2]
    assert found.fewest(16, 4, 2) == 1


def test_weights_in_bf16_have_a_copy_in_fp8(recipe: Path) -> None:
    """The student's along both directions, the teacher's, which asks for no gradient, along rows; 2 of 4 layers."""
    plain = planned(recipe).ranks[0].stays
    stays = planned(recipe, "student.fp8.recipe=blockwise", "teacher.fp8.recipe=blockwise").ranks[0].stays
    assert stays["student, weights"] == stays["teacher, weights"] == 2 * PARAMETERS
    assert stays["student, weights in FP8 besides"] == 2 * MATRICES * 2 * BLOCK
    assert stays["teacher, weights in FP8 besides"] == 2 * MATRICES * BLOCK
    assert {name: size for name, size in stays.items() if "FP8" not in name} == plain
    halves = planned(
        recipe, "student.tensor_model_parallel_size=2", "student.sequence_parallel=true", "student.fp8.recipe=delayed"
    )
    assert halves.ranks[0].stays["student, weights in FP8 besides"] == 4 * MATRICES / 2 * 2


def test_weights_that_are_kept_in_fp8(recipe: Path) -> None:
    words = ("student.fp8.recipe=blockwise", "student.fp8.param_gather=true")
    plain, found = planned(recipe), planned(recipe, *words)
    stays = found.ranks[0].stays
    assert stays["student, weights"] == 2 * (PARAMETERS - 2 * MATRICES) + 2 * MATRICES * 2 * BLOCK
    assert "student, weights in FP8 besides" not in stays
    for name in ("student, gradients", "student, optimizer", "teacher, weights"):
        assert stays[name] == plain.ranks[0].stays[name]
    gathered = "replicas: weights, gathered"
    assert sent(plain, gathered) == PARAMETERS * 2 / 2
    assert sent(found, gathered) == ((PARAMETERS - 2 * MATRICES) * 2 + 2 * MATRICES) / 2
    assert sent(planned(recipe, *words, gpu="b200"), gathered) == sent(plain, gathered)  # computed as mxfp8 there


def test_a_copy_of_the_student_has_its_fp8(recipe: Path) -> None:
    words = ("teacher.model=null", "teacher.source=frozen", "student.fp8.recipe=delayed")
    stays = planned(recipe, *words).ranks[0].stays
    assert stays["teacher, copy of the student"] == 2 * PARAMETERS
    assert stays["teacher, weights in FP8 besides"] == 4 * MATRICES
    kept = planned(recipe, *words, "student.fp8.param_gather=true").ranks[0].stays
    assert kept["teacher, copy of the student"] == kept["student, weights"] == 2 * PARAMETERS  # two directions


@pytest.mark.parametrize(("name", "number", "answer"), [("blockwise", 1 + 4 / 128, 0), ("delayed", 1, 256)])
def test_inputs_of_linear_layers_are_kept_in_fp8(recipe: Path, name: str, number: float, answer: float) -> None:
    student = planned(recipe).setting.student
    plain = layer_activations(student.shape, student.spread, 2)
    found = layer_activations(student.shape, student.spread, 2, fp8=fp8(name))
    assert plain["input of the attention"] == 2 * 256
    assert found["input of the attention"] == found["input of the feed-forward"] == number * 256
    assert plain["feed-forward"] == 2 * 5 * 512
    assert found["feed-forward"] == 2 * 4 * 512 + number * 512  # their product is what the last is given
    assert found["attention"] == plain["attention"] + answer
    for same in ("norm before attention", "norm before the feed-forward"):
        assert found[same] == plain[same]


def test_activations_of_layers_with_and_without_fp8(recipe: Path) -> None:
    def training(*words: str) -> dict[str, float]:
        return dict(moments(planned(recipe, *words).setting, 0, "te")["backward of a layer"])

    plain, found = training(), training("student.fp8.recipe=blockwise")
    number, row = 1 + 4 / 128, 512
    assert plain["activations"] - found["activations"] == pytest.approx(row * 2 * (2 - number) * (2 * 256 + 512))
    assert found["gradient of gate and up in FP8"] == row * 2 * 512 * 2 * number
    assert "gradient of gate and up in FP8" not in plain
    full = "student.recompute=full"
    assert training(full)["activations"] == training(full, "student.fp8.recipe=blockwise")["activations"]


def test_arithmetic_in_fp8(recipe: Path) -> None:
    """Matrices of layers in FP8 at its rate; attention's own products, other layers and output layers at that of bf16.
    Of 16 sequences of 256 positions each of 2 ranks has 8."""
    assumed = Assumptions(train_efficiency=1.0, score_efficiency=1.0, call_seconds=1e-12, fp8_efficiency=0.8)
    words = ("student.fp8.recipe=blockwise", "teacher.fp8.recipe=blockwise")
    plain = planned(recipe, assumptions=assumed).times.parts
    found = planned(recipe, *words, assumptions=assumed).times.parts
    moved = 8 * 256 * 2 * (2 * MATRICES) * (1 / 989e12 - 1 / (1979e12 * 0.8))
    assert plain["train"] - found["train"] == pytest.approx(3 * moved)
    assert plain["score"] - found["score"] == pytest.approx(moved)
    assert found["loss"] == plain["loss"]


def test_servers_in_fp8(recipe: Path) -> None:
    plain, found = planned(recipe, *ON_SERVERS), planned(recipe, *ON_SERVERS, "rollout.servers.quantization=fp8")
    (before,), (after,) = plain.servers, found.servers
    assert before.weights == 2 * PARAMETERS
    assert after.weights == 2 * (PARAMETERS - 4 * MATRICES) + 4 * MATRICES
    assert after.cache == before.cache + 4 * MATRICES
    assert after.longest == before.longest  # keys and values stay in bf16
    assert sent(found, "first rank to all servers") == sent(plain, "first rank to all servers")  # scaled over there
    # 128 steps of 16 sequences, each of which reads the matrices once; prompts are read by arithmetic
    read = 128 * 4 * MATRICES / (3.35e12 * 0.6)
    prompts = 8 * 128 * 2 * 4 * MATRICES / 0.4 * (1 / 989e12 - 1 / (1979e12 * 0.7))
    assert plain.times.parts["write"] - found.times.parts["write"] == pytest.approx(read + prompts)


def test_servers_of_experts_in_fp8(recipe: Path) -> None:
    words = (
        *ON_SERVERS,
        "student.model=models/Qwen3-30B-A3B",
        "teacher.model=models/Qwen3-8B",
        "rollout.servers.tensor_parallel_size=4",
    )
    plain, found = planned(recipe, *words), planned(recipe, *words, "rollout.servers.quantization=fp8")
    matrices = 48 * (2048 * (2 * 4096 + 2 * 512) + 128 * 3 * 2048 * 768)
    assert plain.servers[0].weights - found.servers[0].weights == matrices / 4
    assert found.times.parts["write"] < plain.times.parts["write"]


def test_a_served_teacher_in_fp8_scores_faster(recipe: Path) -> None:
    words = ("teacher.engine=vllm", "teacher.servers.urls=http://a:1", "loss=policy_gradient")
    plain, found = planned(recipe, *words), planned(recipe, *words, "teacher.servers.quantization=fp8")
    saved = 16 * 256 * 2 * 4 * MATRICES / 0.55 * (1 / 989e12 - 1 / (1979e12 * 0.7))
    assert plain.times.parts["score"] - found.times.parts["score"] == pytest.approx(saved)


def test_without_a_recipe_fp8_changes_nothing(recipe: Path) -> None:
    """Whatever its rates are, and with its rules written out."""
    setting = make_setting(read_recipe(recipe, ON_SERVERS), Options())
    slow = dataclasses.replace(
        setting.cluster,
        gpu=dataclasses.replace(setting.cluster.gpu, fp8=1.0, capability=(10, 0)),
        assumptions=Assumptions(fp8_efficiency=1e-6),
    )
    documents = [
        json.loads(as_json(plan(one), None, ())) for one in (setting, dataclasses.replace(setting, cluster=slow))
    ]
    for document in documents:
        del document["gpu"], document["assumptions"]
    assert documents[0] == documents[1]
    assert "FP8" not in json.dumps(documents[0])


@pytest.mark.parametrize("key", ["student", "teacher"])
def test_a_recipe_that_the_gpu_does_not_know_is_refused(recipe: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}.fp8.recipe: got mxfp8 on h200; expected delayed, tensorwise, block"):
        planned(recipe, f"{key}.fp8.recipe=mxfp8", gpu="h200")
    assert not planned(recipe, f"{key}.fp8.recipe=mxfp8", gpu="b200").problems
