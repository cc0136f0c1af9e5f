"""What a run writes down: metrics.jsonl, TensorBoard events, samples of its rollouts and what the diagnosis says. Only
rank 0 writes, into files that its user alone may read, and without secrets that it knows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from nemo_opd.observe.token_scores import TokenScores, shown_rollouts
from nemo_opd.reliability.files import open_private, private_folder, replace_private
from nemo_opd.reliability.redact import redact_values
from nemo_opd.types import Author, Rollout, StepReport

Piece = Callable[[int], str]

FINDINGS = "diagnosis.jsonl"
"""What the diagnosis said, one line each; made by the first."""


class Recorder:
    """Writes one line per step; a resumed run continues the files, without the steps that it will do again."""

    def __init__(
        self, run_dir: Path, first_step: int, rollouts_per_step: int, tensorboard: bool, piece: Piece | None = None
    ) -> None:
        """`piece` gives the text of a token id for token-level records; without it they have ids only."""
        self._folder = run_dir
        self._rollouts_per_step = rollouts_per_step
        self._piece = piece
        for name in ("metrics.jsonl", FINDINGS):
            _forget_steps(run_dir / name, first_step)
        self._metrics: IO[str] = open_private(run_dir / "metrics.jsonl", "a")
        private_folder(run_dir / "rollouts")
        self._events = _summary_writer(private_folder(run_dir / "tensorboard"), first_step) if tensorboard else None

    def write(self, report: StepReport) -> None:
        """One line of metrics.jsonl and one scalar per metric."""
        self._line({"step": report.step, "policy_version": report.policy_version, **report.metrics})
        self._scalars(report.step, report.metrics)

    def write_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Evaluation results stand on lines of their own, marked by `evaluation`."""
        self._line({"step": step, "evaluation": True, **metrics})
        self._scalars(step, metrics)

    def write_findings(self, findings: Sequence[Mapping[str, Any]]) -> None:
        """What the diagnosis says of a step."""
        if findings:
            with open_private(self._folder / FINDINGS, "a") as file:
                file.writelines(redact_values(json.dumps(finding)) + "\n" for finding in findings)

    def has_evaluation(self, step: int) -> bool:
        """Do the results of this step's evaluation stand in metrics.jsonl?"""
        lines = (self._folder / "metrics.jsonl").read_text().splitlines()
        return any(line["step"] == step and line.get("evaluation", False) for line in map(json.loads, lines))

    def write_rollouts(
        self, step: int, rollouts: Sequence[Rollout], scores: Mapping[int, TokenScores] | None = None
    ) -> None:
        """The step's first rollouts, one per prompt as far as they go, to rollouts/step-*.jsonl.

        Args:
            scores: by position in `rollouts`, what the loss measured at its tokens; None writes no tokens.
        """
        if not self._rollouts_per_step:
            return
        with open_private(self._folder / "rollouts" / f"step-{step:08d}.jsonl") as file:
            for i in shown_rollouts(rollouts, self._rollouts_per_step):
                fields = describe(rollouts[i])
                if scores is not None:
                    fields["tokens"] = describe_tokens(rollouts[i], scores.get(i, {}), self._piece)
                file.write(redact_values(json.dumps(fields, ensure_ascii=False)) + "\n")

    def close(self) -> None:
        self._metrics.close()
        if self._events:
            self._events.close()

    def _line(self, fields: Mapping[str, Any]) -> None:
        self._metrics.write(redact_values(json.dumps(fields)) + "\n")
        self._metrics.flush()

    def _scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._events:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)


def describe(rollout: Rollout) -> dict[str, Any]:
    """A rollout as plain JSON data."""
    written = rollout.sampler_logprobs[~rollout.sampler_logprobs.isnan()]
    return {
        "epoch": rollout.prompt.epoch,
        "index": rollout.prompt.index,
        "sample": rollout.sample,
        "messages": [dict(message) for message in rollout.prompt.messages],
        "answer": rollout.prompt.answer,
        "response": rollout.text,
        "response_tokens": len(rollout.response_ids),
        "finish": rollout.finish.name.lower(),
        "reward": rollout.reward,
        "policy_version": int(rollout.policy_version.max()) if len(rollout.policy_version) else None,
        "mean_sampler_logprob": float(written.mean()) if len(written) else None,
    }


def describe_tokens(rollout: Rollout, scores: TokenScores, piece: Piece | None) -> dict[str, list[Any]]:
    """One list per field, each as long as the response; null where a number is not known.

    `text` is each token's own text, in which a character that is spread over several tokens is not readable.
    """
    ids = rollout.response_ids.tolist()
    fields: dict[str, list[Any]] = {"id": ids}
    if piece is not None:
        fields["text"] = [piece(token) for token in ids]
    fields["author"] = [Author(author).name.lower() for author in rollout.author.tolist()]
    fields["trained"] = rollout.loss_mask.tolist()
    fields["sampler_logprob"] = _numbers(rollout.sampler_logprobs)
    return fields | {name: _numbers(values) for name, values in scores.items()}


def _numbers(values: Tensor) -> list[float | None]:
    """Four digits each: they are for looking at."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]


def _forget_steps(path: Path, first_step: int) -> None:
    """Drop lines of steps at or after `first_step`, and a last line that was cut off by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= first_step:
                kept.append(line)
        except ValueError:
            continue
    replace_private(path, "".join(line + "\n" for line in kept))


def _summary_writer(folder: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # late: it takes a second to import

    return SummaryWriter(log_dir=str(folder), purge_step=first_step + 1)
