"""Can the teacher still rescue what the student began? Its accuracy on continuations of student-written prefixes.

On-policy distillation asks the teacher about prefixes that the student wrote and that it would not write itself. How
far that takes it from what it can do is measured here: the student answers every problem, the teacher continues from
prefixes of growing length, and the verifier reads the whole (arXiv 2605.11182, where Qwen3-14B falls from 62.1 to 46.0
on GPQA-D). Accuracy that falls with the length says how far the teacher's opinion of late tokens is worth something.

An end token of the student's is not part of a prefix: there would be nothing to continue. A prefix of so many tokens
exists only in responses that are that long; these are the harder problems, so next to the accuracy on them stands the
teacher's own, from an empty prefix, on the same problems. Continuations draw with the seeds of the evaluation, at their
positions in the response, so that lengths are compared on the same random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_opd.engines.protocols import Generator
from nemo_opd.errors import ConfigError
from nemo_opd.evaluate.lengths import PrefixLength
from nemo_opd.evaluate.metrics import Estimate, mean_over_problems
from nemo_opd.evaluate.run import Evaluation
from nemo_opd.types import Author, Finish, GenerateRequest, Rollout

EMPTY = PrefixLength(0, is_percent=False)
Key = tuple[int, int]
"""Problem and sample."""
Rewards = Mapping[Key, float]


@dataclass(frozen=True)
class PrefixPoint:
    """One line of the table."""

    length: PrefixLength
    continued: Estimate | None
    """The teacher after the student's prefix; None where no response is that long."""
    alone: Estimate | None
    """The teacher after nothing, on the same problems."""
    mean_tokens: float
    """of the prefixes"""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "prefix": str(self.length),
            "continued": self.continued and self.continued.as_dict(),
            "alone": self.alone and self.alone.as_dict(),
            "mean_prefix_tokens": self.mean_tokens,
        }


def write(evaluation: Evaluation, generator: Generator) -> dict[Key, Rollout]:
    """The student's response to every problem and sample."""
    requests = evaluation.requests(evaluation.problems)
    rollouts = generator.generate(requests, evaluation.sampling, lambda: False)
    return {(rollout.prompt.index, rollout.sample): rollout for rollout in rollouts}


def rewards(evaluation: Evaluation, rollouts: Mapping[Key, Rollout]) -> dict[Key, float]:
    """The verifier's numbers; problems that it cannot judge are left out."""
    found = {key: evaluation.verifier(rollout.text, rollout.prompt) for key, rollout in rollouts.items()}
    return {key: reward for key, reward in found.items() if reward is not None}


def accuracy(name: str, found: Rewards) -> Estimate | None:
    """Mean over problems of the mean over their samples; None where there is nothing.

    Where problems have different numbers of samples, the interval takes each for a single trial: wider, never narrower.
    """
    by_problem: dict[int, list[float]] = {}
    for (problem, _), reward in sorted(found.items()):
        by_problem.setdefault(problem, []).append(reward)
    if not by_problem:
        return None
    counts = set(map(len, by_problem.values()))
    values = [sum(row) / len(row) for row in by_problem.values()]
    return mean_over_problems(name, values, counts.pop() if len(counts) == 1 else 1)


def teacher_on_prefixes(
    evaluation: Evaluation, student: Mapping[Key, Rollout], teacher: Generator, lengths: Sequence[PrefixLength]
) -> Iterator[PrefixPoint]:
    """The teacher's accuracy after each length, shortest first as given; an empty prefix comes first.

    Args:
        student: its response to every problem and sample.
        teacher: writes on; its ids must be the student's.

    Raises:
        ConfigError: the verifier could judge no answer.
    """
    alone = rewards(evaluation, write(evaluation, teacher))
    if not alone:
        got = f"{len(evaluation.problems)} problems without a single verified answer"
        raise ConfigError("evaluate.path", got, "answers that verify.name can read", "check data.answer_key")
    yield PrefixPoint(EMPTY, accuracy("teacher", alone), accuracy("teacher alone", alone), 0.0)
    for length in lengths:
        if length.amount == 0:
            continue  # that was the first line
        requests = _continuations(evaluation, student, length)
        rollouts = teacher.generate(requests, evaluation.sampling, lambda: False)
        found = rewards(evaluation, {(r.prompt.index, r.sample): r for r in rollouts})
        same = {key: reward for key, reward in alone.items() if key in found}
        tokens = [len(request.prefix_ids) for request in requests]
        mean = sum(tokens) / len(tokens) if tokens else 0.0
        yield PrefixPoint(length, accuracy("teacher", found), accuracy("teacher alone", same), mean)


def _continuations(
    evaluation: Evaluation, student: Mapping[Key, Rollout], length: PrefixLength
) -> list[GenerateRequest]:
    requests = []
    for request in evaluation.requests(evaluation.problems):
        rollout = student[request.prompt.index, request.sample]
        ids = rollout.response_ids.tolist()
        ids = ids[:-1] if rollout.finish is Finish.EOS else ids
        tokens = length.of(len(ids))
        if tokens is not None:
            requests.append(replace(request, prefix_ids=tuple(ids[:tokens]), prefix_author=Author.STUDENT))
    return requests


def table(student: Estimate | None, points: Sequence[PrefixPoint]) -> str:
    """Aligned columns, one line per length."""
    lines = [("prefix", "tokens", "teacher continues", "teacher alone, same problems")]
    lines += [(str(p.length), f"{p.mean_tokens:.1f}", _cell(p.continued), _cell(p.alone)) for p in points]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    rows = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3]]) for line in lines]
    return "\n".join([f"the student alone: {_cell(student)}", *rows]) + "\n"


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "no response is that long"
    return str(estimate).removeprefix(f"{estimate.name} ")
