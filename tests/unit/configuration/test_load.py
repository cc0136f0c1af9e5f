"""Precedence of the layers, slots by name, and values as they are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_opd.algorithms import ALGORITHMS
from nemo_opd.config import (
    SLOTS,
    Config,
    CrossEntropyLoss,
    DatasetPrefix,
    OneOfSeveral,
    PolicyGradientLoss,
    ReverseKLLoss,
)
from nemo_opd.configuration.load import load, to_yaml
from nemo_opd.errors import ConfigError
from tests.unit.configuration.workspace import make_workspace


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return make_workspace(tmp_path)


def add(recipe: Path, text: str) -> None:
    recipe.write_text(recipe.read_text() + text)


def test_schema_then_record_then_recipe_then_command_line(recipe: Path) -> None:
    assert load(recipe).teacher.engine == Config().teacher.engine == "megatron"
    assert load(recipe, ["algorithm=sft"]).teacher.engine == "none"
    add(recipe, "algorithm: sft\noptimizer: {lr: 3e-4}\n")
    assert load(recipe).optimizer.lr == 3e-4
    assert load(recipe, ["optimizer.lr=5e-5"]).optimizer.lr == 5e-5
    config = load(recipe, ["teacher.engine=megatron", "loss=reverse_kl"])
    assert (config.teacher.engine, config.loss, config.prefix) == ("megatron", ReverseKLLoss(), DatasetPrefix())


def test_of_a_key_given_twice_on_the_command_line_the_last_counts(recipe: Path) -> None:
    assert load(recipe, ["train.steps=5", "train.steps=7"]).train.steps == 7


@pytest.mark.parametrize("text", ["loss: policy_gradient\n", "loss: {name: policy_gradient}\n"])
def test_a_bare_word_is_the_name_of_a_slot(recipe: Path, text: str) -> None:
    add(recipe, text)
    assert load(recipe).loss == PolicyGradientLoss()
    assert load(recipe, ["loss=reverse_kl"]) == load(recipe, ["loss.name=reverse_kl"])


def test_a_parameter_can_be_set_beside_the_name_of_an_earlier_layer(recipe: Path) -> None:
    add(recipe, "algorithm: policy_gradient_opd\nloss: {clip_ratio: 0.2}\n")
    assert load(recipe).loss == PolicyGradientLoss(clip_ratio=0.2)
    assert load(recipe, ["loss.clip_ratio=0.3"]).loss == PolicyGradientLoss(clip_ratio=0.3)
    assert load(recipe, ["loss.clip_ratio=null"]).loss == PolicyGradientLoss()


def test_a_changed_name_drops_the_parameters_of_earlier_layers(recipe: Path) -> None:
    add(recipe, "loss: {name: policy_gradient, clip_ratio: 0.2}\n")
    assert load(recipe, ["loss=policy_gradient"]).loss == PolicyGradientLoss(clip_ratio=0.2)
    assert load(recipe, ["loss=reverse_kl"]).loss == ReverseKLLoss()
    with pytest.raises(ConfigError, match=r"loss\.clip_ratio: got an unknown key"):
        load(recipe, ["loss=reverse_kl", "loss.clip_ratio=0.2"])


def test_sft_is_the_loop_with_other_slots(recipe: Path) -> None:
    config = load(recipe, ["algorithm=sft"])
    assert (config.prefix, config.loss, config.teacher.engine) == (DatasetPrefix(), CrossEntropyLoss(), "none")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_record_stands_under_its_name_and_fills_slots_of_the_schema(name: str) -> None:
    record = ALGORITHMS[name]
    assert record.name == name
    assert record.source
    for slot, choice in record.slots.items():
        assert type(choice) is SLOTS[slot][choice.name]


@pytest.mark.parametrize("slot", SLOTS)
def test_every_choice_of_a_slot_knows_its_name(slot: str) -> None:
    assert {name: choice().name for name, choice in SLOTS[slot].items()} == {name: name for name in SLOTS[slot]}


def test_texts_of_the_command_line_are_taken_as_they_stand(recipe: Path) -> None:
    words = ["verify.answer_pattern=#### ", "data.system_prompt=You are: a 'helper' = {x}, 50% [of] $5"]
    config = load(recipe, words)
    assert config.verify.answer_pattern == "#### "
    assert config.data.system_prompt == "You are: a 'helper' = {x}, 50% [of] $5"
    assert load(recipe, ["data.system_prompt=null"]).data.system_prompt is None
    assert load(recipe, ["data.prompt_key=null"]).data.prompt_key == "null", "a text that cannot be unset"


def test_words_of_yaml_1_1_stay_words(recipe: Path) -> None:
    add(recipe, "verify: {answer_pattern: no}\n")
    assert load(recipe).verify.answer_pattern == "no"


def test_the_resolved_configuration_is_a_recipe(recipe: Path, tmp_path: Path) -> None:
    words = ["loss=policy_gradient", "loss.clip_ratio=0.2", "verify.answer_pattern=#### ", "optimizer.lr=1e-6"]
    words += ["data.system_prompt=a: b\n\"c\" 'd' no 1e-5 ~", "data.answer_key=null"]
    config = load(recipe, words)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config))
    assert load(resolved) == config
    assert load(resolved, ["train.steps=99"]).train.steps == 99


def test_arguments_of_a_chat_template_have_its_names(recipe: Path, tmp_path: Path) -> None:
    section = "data:\n  template_arguments: {enable_thinking: true, n: 3}\n"
    recipe.write_text(recipe.read_text().replace("data:\n", section))
    words = ["data.template_arguments.enable_thinking=false", "data.template_arguments.effort=low"]
    config = load(recipe, words)
    assert config.data.template_arguments == {"enable_thinking": False, "n": 3, "effort": "low"}
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config))
    assert load(resolved) == config
    assert load(recipe).data.template_arguments["enable_thinking"] is True


def test_teachers_have_names_that_the_recipe_chooses(recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text().replace("teacher:\n  model: teacher\n", "")
    recipe.write_text(text + "teachers:\n  math: {model: teacher, weight: 3}\n  code-2: {source: frozen}\n")
    config = load(recipe, ["teachers.math.engine=hf", "teachers.other.model=teacher", "data.teacher_key=task"])
    assert list(config.teachers) == ["math", "code-2", "other"], "in the order in which they were named"
    assert all(isinstance(teacher, OneOfSeveral) for teacher in config.teachers.values())
    assert (config.teachers["math"].engine, config.teachers["math"].weight) == ("hf", 3.0)
    assert config.every_teacher()["teachers.code-2"].source == "frozen"
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config))
    assert load(resolved) == config


@pytest.mark.parametrize(
    "words",
    [
        "algorithm=rlvr verify.name=exact",
        "algorithm=rlvr verify.name=exact loss=k2 teacher.engine=megatron teacher.source=frozen reward.loss_weight=0.1",
        "algorithm=opsd context.field=answer teacher.source=current",
        "algorithm=peer_conditioned verify.name=exact loss.divergence=reverse loss.k=16 teacher.source=frozen",
        "reward=group_relative verify.name=exact rollout.samples_per_prompt=8 weight=tis",
        "loss=minillm reward=group_relative verify.name=exact rollout.samples_per_prompt=8",
    ],
)
def test_slots_go_together(recipe: Path, words: str) -> None:
    """What docs/algorithms.md says of combinations."""
    if "algorithm" in words:
        recipe.write_text(recipe.read_text().replace("teacher:\n  model: teacher\n", ""))
    told = "opsd" in words or "peer_conditioned" in words
    load(recipe, [*words.split(), "rollout.max_new_tokens=32", *(["context.max_tokens=64"] if told else [])])


def test_checks_can_be_left_to_the_caller(recipe: Path) -> None:
    assert load(recipe, ["student.model=nowhere"], checked=False).student.model == "nowhere"
    words = ["run.dir=r", "student.model=m", "data.path=d", "train.steps=1"]
    assert load(None, words, checked=False).data.path == "d"
