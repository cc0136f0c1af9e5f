"""The teacher on the student's prefixes: what it continues, over which problems, and the command that asks for it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_opd.cli import main
from nemo_opd.errors import ConfigError
from nemo_opd.evaluate.lengths import PrefixLength, parse_lengths
from nemo_opd.evaluate.prefixes import accuracy, rewards, table, teacher_on_prefixes, write
from nemo_opd.evaluate.run import Evaluation
from nemo_opd.types import Author, Finish, GenerateRequest, Prompt, Rollout, Sampling
from tests.helpers.ranks import RankPool
from tests.helpers.rollouts import make_prompt
from tests.helpers.workspace import make_workspace

EOS = 1
PROBLEMS = [make_prompt(i) for i in range(4)]


class Grader:
    """Right without a 3; a 9 is unreadable."""

    def __call__(self, text: str, prompt: Prompt) -> float | None:
        return None if "9" in text else float("3" not in text)

    def close(self) -> None: ...


def _joined(ids: torch.Tensor) -> str:
    return "".join(map(str, ids.tolist()))


def _rollout(request: GenerateRequest, ids: list[int], finish: Finish) -> Rollout:
    count = len(ids)
    return Rollout(
        request.prompt, request.sample, torch.tensor(ids), torch.zeros(count), torch.zeros(count, dtype=torch.int8),
        torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.bool), finish, _joined,
    )  # fmt: skip


class Student:
    """Writes 2 x (problem + 1) tokens and an end; the second half are 3s."""

    version = 0

    def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling, stop: Any) -> Iterator[Rollout]:
        for request in requests:
            half = request.prompt.index + 1
            yield _rollout(request, [2] * half + [3] * half + [EOS], Finish.EOS)

    def load_weights(self, weights: Iterable[Any], version: int) -> None: ...

    def close(self) -> None: ...


class Teacher(Student):
    """Ends every prefix at once, and remembers it."""

    def __init__(self) -> None:
        self.asked: list[GenerateRequest] = []

    def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling, stop: Any) -> Iterator[Rollout]:
        self.asked += requests
        for request in requests:
            yield _rollout(request, [*request.prefix_ids, EOS], Finish.EOS)


def evaluation(problems: Sequence[Prompt] = PROBLEMS, samples: int = 1) -> Evaluation:
    return Evaluation(problems, Sampling(16), samples, Grader(), seed=0)  # type: ignore[arg-type]


def points(lengths: str, teacher: Teacher | None = None) -> list[Any]:
    test = evaluation()
    return list(teacher_on_prefixes(test, write(test, Student()), teacher or Teacher(), parse_lengths(lengths, "-")))


def test_a_share_of_each_response_without_its_end_token() -> None:
    teacher = Teacher()
    _, half, most, whole = points("50%,75%,100%", teacher)
    assert (half.continued.value, most.continued.value, whole.continued.value) == (1.0, 0.25, 0.0)
    assert [p.continued.problems for p in (half, most, whole)] == [4, 4, 4]
    assert (half.mean_tokens, whole.mean_tokens) == (2.5, 5.0)
    by_length = [teacher.asked[i : i + 4] for i in range(0, 16, 4)]
    assert [r.prefix_ids for r in by_length[3]] == [(2,) * n + (3,) * n for n in range(1, 5)], "no end token"
    assert [len(r.prefix_ids) for r in by_length[2]] == [1, 3, 4, 6]
    assert all(r.prefix_author is Author.STUDENT for r in teacher.asked[4:])
    seeds = {tuple(r.seed for r in asked) for asked in by_length}
    assert len(seeds) == 1, "lengths are compared on the same random numbers"


def test_so_many_tokens_count_the_problems_that_have_them() -> None:
    start, two, five, nine = points("0,2,5,9")
    assert start.continued.value == 1.0 and start.mean_tokens == 0.0
    assert (two.continued.value, two.continued.problems) == (0.75, 4), "the shortest response is all prefix: 2 3"
    assert (five.continued.value, five.continued.problems, five.alone.problems) == (0.0, 2, 2)
    assert (nine.continued, nine.alone) == (None, None)
    assert "no response is that long" in table(None, [nine])


def test_the_teacher_alone_is_judged_on_the_same_problems() -> None:
    class Picky(Teacher):
        def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling, stop: Any) -> Iterator[Rollout]:
            for request in requests:
                wrong = request.prompt.index == 3 and not request.prefix_ids
                yield _rollout(request, [*request.prefix_ids, 3 if wrong else 2], Finish.EOS)

    _, four = points("4", Picky())
    assert four.continued.problems == four.alone.problems == 3
    assert four.alone.value == pytest.approx(2 / 3)
    assert four.continued.value == pytest.approx(1 / 3)


def test_accuracy_is_a_mean_over_problems_and_leaves_out_what_cannot_be_judged() -> None:
    estimate = accuracy("x", {(0, 0): 1.0, (0, 1): 0.0, (1, 0): 1.0})
    assert estimate is not None
    assert (estimate.value, estimate.problems, estimate.samples_per_problem) == (0.75, 2, 1)
    assert accuracy("x", {}) is None
    test = evaluation()
    unreadable = {(0, 0): _rollout(test.requests(PROBLEMS)[0], [9], Finish.EOS)}
    assert rewards(test, unreadable) == {}


def test_lengths_are_tokens_or_shares() -> None:
    assert parse_lengths("0, 64,25%", "-") == [PrefixLength(0, False), PrefixLength(64, False), PrefixLength(25, True)]
    assert [PrefixLength(50, True).of(n) for n in (0, 1, 5)] == [0, 0, 2]
    assert [PrefixLength(5, False).of(n) for n in (4, 5, 6)] == [None, 5, 5]
    for wrong in ("", "0.5", "half", "-1", "101%", "5%%", "5%x", "²"):
        with pytest.raises(ConfigError, match=r"--x: got .*expected tokens"):
            parse_lengths(wrong, "--x")


def test_wrong_lengths_are_refused_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["eval", str(tmp_path), "--data", "x", "--teacher-on-prefixes", "0.5"]) == 2
    assert "--teacher-on-prefixes: got `0.5`; expected tokens (64)" in capsys.readouterr().err
    (tmp_path / "x.jsonl").write_text("")
    assert main(["eval", str(tmp_path), "--data", str(tmp_path / "x.jsonl"), "--teacher-on-prefixes", "50%"]) == 2
    assert "teacher.model: got nothing; expected the model that continues" in capsys.readouterr().err


def _command(rank: int, folder: str, words: list[str]) -> tuple[int, str]:
    from nemo_opd.evaluate.command import main

    place = Path(folder)
    args = argparse.Namespace(
        path=place / "student",
        kind="model",
        data=place / "heldout.jsonl",
        out=place / "out" / "answer.json",
        compare_transformers=False,
        teacher_on_prefixes=parse_lengths("50%,4", "-"),
        overrides=["rollout.max_new_tokens=12", "verify.name=integer", "verify.answer_pattern=#", *words],
    )
    output = StringIO()
    with redirect_stdout(output):
        code = main(args)
    return code, output.getvalue()


def test_the_command_prints_a_table_and_writes_json(ranks1: RankPool, tmp_path: Path) -> None:
    folder = make_workspace(tmp_path, problems=4)
    [(code, output)] = ranks1.run(_command, str(folder), [f"teacher.model={folder / 'teacher'}"])
    assert code == 0
    lines = output.splitlines()
    assert lines[0].startswith("the student alone: 0.0 % [0.0, 19.4] (n=16)")
    assert [line.split()[0] for line in lines[1:]] == ["prefix", "0", "50%", "4"]
    answer = json.loads((tmp_path / "out" / "answer.json").read_text())
    assert [point["prefix"] for point in answer["teacher_on_prefixes"]] == ["0", "50%", "4"]
    assert answer["teacher_on_prefixes"][1]["continued"]["problems"] == 16
