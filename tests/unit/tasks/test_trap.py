from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from nemo_opd.config import DataConfig, VerifyConfig
from nemo_opd.errors import ConfigError
from nemo_opd.prompts.stream import first_prompts
from nemo_opd.prompts.template import load_tokenizer
from nemo_opd.tasks import trap
from nemo_opd.tasks.cli import add_arguments, run
from nemo_opd.tasks.records import is_held_out
from nemo_opd.tasks.trap import LOOP, TrapTask, records
from nemo_opd.verify.build import build_verifier


def _walk(prompt: str) -> list[int]:
    """The machine again, written without the generator's code."""
    state, reached = int(prompt[0]), []
    for move in prompt[2:-1]:
        state = (state + int(move)) % 10
        reached.append(state)
    return reached


@pytest.mark.parametrize("task", [TrapTask(), TrapTask(2, 1, 2), TrapTask(6, 6, 10)], ids=str)
def test_correct_responses_walk_the_machine(task: TrapTask) -> None:
    for record in records(task, 60, seed=1):
        reached = _walk(record["prompt"])
        assert len(reached) == task.moves
        before = [int(record["prompt"][0]), *reached]
        moves = [f"{a}+{move}={b}" for a, move, b in zip(before, record["prompt"][2:-1], reached, strict=False)]
        assert record["response"] == ";".join(moves) + f"#{reached[-1]}"
        assert record["answer"] == str(reached[-1]) and record["trapped_at"] == -1


@pytest.mark.parametrize("task", [TrapTask(), TrapTask(2, 1, 2), TrapTask(6, 6, 10)], ids=str)
def test_a_trapped_response_errs_once_early_and_never_leaves_the_loop(task: TrapTask) -> None:
    steps = set()
    for record in records(task, 80, seed=1, trapped=1.0):
        reached, at = _walk(record["prompt"]), record["trapped_at"]
        written, _, rest = record["response"].partition(LOOP)
        states = [int(state[-1]) for state in written.split(";")[:-1]]
        moves = [state[2] for state in written.split(";")[:-1]]
        assert moves == list(record["prompt"][2 : 3 + at])
        assert states[:-1] == reached[:at] and states[-1] != reached[at] and len(states) == at + 1 <= task.early
        assert LOOP + rest == LOOP * task.loops
        assert "#" not in record["response"] and record["answer"] == str(reached[-1])
        assert len(record["response"]) >= task.shortest_loop
        steps.add(at)
    assert steps == set(range(task.early))


def test_shares_and_same_problems_for_teacher_and_student(tmp_path: Path) -> None:
    trap.write(tmp_path, TrapTask(), 1000, 100, 0.05, 0.6, seed=4)
    files = {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in tmp_path.glob("*.jsonl")}
    assert set(files) == {"teacher", "student", "train", "heldout"}
    fallen = {name: sum(r["trapped_at"] >= 0 for r in lines) for name, lines in files.items()}
    assert 20 <= fallen["teacher"] <= 80 and 540 <= fallen["student"] <= 660
    assert fallen["train"] == fallen["heldout"] == 0
    prompts = {name: [r["prompt"] for r in lines] for name, lines in files.items()}
    assert prompts["teacher"] == prompts["student"] == prompts["train"]
    assert len(set(prompts["train"])) == 1000 and not set(prompts["train"]) & set(prompts["heldout"])
    assert all(map(is_held_out, prompts["heldout"]))


def test_the_same_arguments_write_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        trap.write(tmp_path / name, TrapTask(), 40, 10, 0.05, 0.6, seed)
    for file in ("teacher.jsonl", "student.jsonl", "train.jsonl", "heldout.jsonl"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b != c


@pytest.mark.parametrize(
    "make",
    [
        lambda: TrapTask(moves=1),
        lambda: TrapTask(loops=1),
        lambda: TrapTask(early=0),
        lambda: TrapTask(moves=3, early=4),
        lambda: list(records(TrapTask(), 1, 0, trapped=2.0)),
        lambda: list(records(TrapTask(2, 1, 2), 1000, 0)),
    ],
)
def test_impossible_settings_are_refused(make) -> None:
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize(
    ("kind", "files", "more"),
    [
        ("shared-rule", "warmup train heldout heldout_prompted heldout_plain", ["--rule", "reversed", "--terms", "3"]),
        ("instance", "warmup train heldout heldout_prompted", ["--answers", "4", "--digits", "5", "--prompted", "0.3"]),
        ("trap", "teacher student train heldout", ["--moves", "3", "--early", "1", "--loops", "4"]),
    ],
)
def test_commands_write_what_tokenizer_and_stream_read(kind: str, files: str, more: list[str], tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args([kind, str(tmp_path), "--train", "30", "--heldout", "10", "--seed", "2", *more])) == 0
    assert {path.stem for path in tmp_path.glob("*.jsonl")} == set(files.split())
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    for path in tmp_path.glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(lines) == (10 if path.stem.startswith("heldout") else 30)
        for prompt in first_prompts(DataConfig(path=str(path)), tokenizer, 30):
            assert tokenizer.unk_token_id not in prompt.token_ids
        for line in lines:
            assert tokenizer.unk_token_id not in tokenizer(line["response"], add_special_tokens=False)["input_ids"]


def test_the_verifier_gives_a_loop_nothing(tmp_path: Path) -> None:
    trap.write(tmp_path, TrapTask(), 10, 10, 1.0, 1.0, seed=0)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args(["trap", str(tmp_path / "again"), "--train", "3", "--heldout", "3"]))
    tokenizer = load_tokenizer(tmp_path / "again" / "tokenizer")
    verifier = build_verifier(VerifyConfig(name="integer", answer_pattern="#"))
    assert verifier is not None
    for file, reward in (("student", 0.0), ("train", 1.0)):
        prompts = first_prompts(DataConfig(path=str(tmp_path / f"{file}.jsonl")), tokenizer, 10)
        lines = [json.loads(line) for line in (tmp_path / f"{file}.jsonl").read_text().splitlines()]
        assert [verifier(r["response"], p) for r, p in zip(lines, prompts, strict=True)] == [reward] * 10
