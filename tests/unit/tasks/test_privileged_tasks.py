"""The shared-rule and the instance task: what is told, what is not; teacher and warm-up see the same tokens."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nemo_opd.config import DataConfig, VerifyConfig
from nemo_opd.errors import ConfigError
from nemo_opd.prompts.stream import first_prompts
from nemo_opd.prompts.template import load_tokenizer, render_chat
from nemo_opd.tasks import instance, shared_rule
from nemo_opd.tasks.arithmetic import ArithmeticTask
from nemo_opd.tasks.instance import InstanceTask
from nemo_opd.tasks.records import PRIVILEGED, is_held_out
from nemo_opd.tasks.shared_rule import NONE, RULES, SharedRuleTask, in_base
from nemo_opd.tasks.tokenizer import write_tokenizer
from nemo_opd.teacher.insertion import ContextRenderer
from nemo_opd.types import Prompt
from nemo_opd.verify.build import build_verifier


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def _text(record: dict[str, Any]) -> str:
    prompt = record["prompt"]
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _told(record: dict[str, Any]) -> str | None:
    return None if isinstance(record["prompt"], str) else record["prompt"][0]["content"]


def _decimal(prompt: str) -> int:
    total, op = 0, "+"
    for character in "+" + prompt.rstrip("="):
        if character in "+-":
            op = character
        else:
            total += int(op + character)
    return total


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_decides_how_the_answer_is_written(rule: str) -> None:
    for held_out in (False, True):
        for record in shared_rule.records(SharedRuleTask(rule), 100, seed=3, held_out=held_out):
            number = _decimal(record["prompt"])
            back = {
                "reversed": lambda text: int(text[::-1]),
                "twice": lambda text: int(text[: len(text) // 2]),
            }.get(rule, lambda text: int(text, int(rule.removeprefix("base"))))
            assert back(record["answer"]) == number
            assert record["answer"] != str(number)
            assert record["response"].endswith("#" + record["answer"])
            assert record[PRIVILEGED] == RULES[rule].text and record["rule"] == rule
            assert is_held_out(record["prompt"]) == held_out


def test_bases() -> None:
    for base in range(2, 10):
        assert [int(in_base(n, base), base) for n in range(200)] == list(range(200))
        assert in_base(0, base) == "0"


def test_held_out_files_are_the_same_problems_with_and_without_the_rule(tmp_path: Path) -> None:
    shared_rule.write(tmp_path, SharedRuleTask(), train=300, held_out=50, prompted=0.5, seed=1)
    files = {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in tmp_path.glob("*.jsonl")}
    assert {name: len(lines) for name, lines in files.items()} == {
        "warmup": 300, "train": 300, "heldout": 50, "heldout_prompted": 50, "heldout_plain": 50
    }  # fmt: skip
    for bare, prompted, plain in zip(files["heldout"], files["heldout_prompted"], files["heldout_plain"], strict=True):
        assert _text(bare) == _text(prompted) == _text(plain)
        assert (_told(bare), _told(prompted), _told(plain)) == (None, RULES["base4"].text, None)
        assert bare["answer"] == prompted["answer"] != plain["answer"] == str(_decimal(_text(plain)))
        assert PRIVILEGED not in plain
    train = {_text(record) for name in ("train", "warmup") for record in files[name]}
    assert not train & {_text(record) for record in files["heldout"]}
    warmup = files["warmup"]
    assert all((_told(record) is None) == (record["rule"] == NONE) for record in warmup)
    assert 100 < sum(record["rule"] == NONE for record in warmup) < 200
    assert {record["rule"] for record in warmup} == {NONE, *RULES}


def test_the_map_is_balanced_and_no_digit_of_the_prompt_predicts_it() -> None:
    task = InstanceTask(answers=4)
    records = list(instance.records(task, 4000, seed=2))
    expected, slack = 1000, 6 * math.sqrt(4000 * 0.25 * 0.75)
    assert all(abs(count - expected) < slack for count in Counter(r["answer"] for r in records).values())
    for place in range(task.digits):
        pairs = Counter((r["prompt"][place], r["answer"]) for r in records)
        assert len(pairs) == 40 and all(abs(count - 100) < 6 * math.sqrt(100) for count in pairs.values())
    assert task.plateau == pytest.approx(math.log(4))


def test_a_prompt_has_one_answer_and_another_under_another_seed() -> None:
    task = InstanceTask()
    prompts = [r["prompt"] for r in instance.records(task, 200, seed=0)]
    assert len(set(prompts)) == 200
    same = sum(task.answer(p, 0) == task.answer(p, 1) for p in prompts)
    assert [task.answer(p, 0) for p in prompts] == [r["answer"] for r in instance.records(task, 200, seed=0)]
    assert same < 60  # a tenth by chance


def test_only_the_privileged_text_tells_the_answer(tmp_path: Path) -> None:
    instance.write(tmp_path, InstanceTask(), train=200, held_out=40, prompted=0.5, seed=1)
    files = {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in tmp_path.glob("*.jsonl")}
    assert set(files) == {"warmup", "train", "heldout", "heldout_prompted"}
    for name, shares in {"warmup": (60, 140), "train": (0, 0), "heldout": (0, 0), "heldout_prompted": (40, 40)}.items():
        told = [_told(record) for record in files[name]]
        assert shares[0] <= sum(text is not None for text in told) <= shares[1]
        for record, text in zip(files[name], told, strict=True):
            assert text in (None, record[PRIVILEGED])
            assert record[PRIVILEGED] == f"the answer is {record['answer']}."
            assert record["response"] == "#" + record["answer"]
    assert [_text(r) for r in files["heldout"]] == [_text(r) for r in files["heldout_prompted"]]
    held_out = {_text(r) for r in files["heldout"]}
    assert not held_out & {_text(r) for name in ("train", "warmup") for r in files[name]}


@pytest.mark.parametrize("kind", ["shared_rule", "instance"])
def test_stream_tokenizer_verifier_and_teacher_context_read_them(kind: str, tmp_path: Path, tokenizer) -> None:
    if kind == "shared_rule":
        shared_rule.write(tmp_path, SharedRuleTask(), train=60, held_out=20, prompted=0.5, seed=1)
    else:
        instance.write(tmp_path, InstanceTask(), train=60, held_out=20, prompted=0.5, seed=1)
    verifier = build_verifier(VerifyConfig(name="exact", answer_pattern="#"))
    assert verifier is not None
    renderer = ContextRenderer(tokenizer, place="system")
    read: dict[str, list[Prompt]] = {}
    for path in tmp_path.glob("*.jsonl"):
        read[path.stem] = first_prompts(DataConfig(path=str(path)), tokenizer, 60)
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for prompt, record in zip(read[path.stem], records, strict=True):
            assert tokenizer.unk_token_id not in prompt.token_ids
            assert verifier(record["response"], prompt) == 1.0
            assert verifier(record["response"] + "0", prompt) == 0.0
    for bare, told in zip(read["heldout"], read["heldout_prompted"], strict=True):
        inserted = renderer.encode([bare.meta[PRIVILEGED]])[0]
        assert renderer.render(bare.messages, inserted, "", "").ids == told.token_ids
        assert tuple(render_chat(tokenizer, bare.messages)) == bare.token_ids != told.token_ids


def test_the_same_arguments_write_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        shared_rule.write(tmp_path / name / "rule", SharedRuleTask(), 40, 10, 0.5, seed)
        instance.write(tmp_path / name / "instance", InstanceTask(), 40, 10, 0.5, seed)
    for path in sorted((tmp_path / "a").rglob("*.jsonl")):
        inner = path.relative_to(tmp_path / "a")
        assert path.read_bytes() == (tmp_path / "b" / inner).read_bytes() != (tmp_path / "c" / inner).read_bytes()


@pytest.mark.parametrize(
    "make",
    [
        lambda: SharedRuleTask("base10"),
        lambda: list(shared_rule.warmup_records(SharedRuleTask(), 1, 0, prompted=1.5)),
        lambda: list(shared_rule.records(SharedRuleTask(problems=ArithmeticTask("+", 1, 2)), 200, 0)),
        lambda: InstanceTask(answers=11),
        lambda: InstanceTask(answers=1),
        lambda: InstanceTask(digits=0),
        lambda: list(instance.records(InstanceTask(), 1, 0, prompted=-0.1)),
        lambda: list(instance.records(InstanceTask(digits=1), 11, 0)),
    ],
)
def test_impossible_settings_are_refused(make) -> None:
    with pytest.raises(ConfigError):
        make()
