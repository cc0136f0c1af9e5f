"""Do TRL's DistillationTrainer and we make the same updates of the same responses?

    pip install -e '.[bench]'; python -m benchmarks.trl_updates --student MODEL --teacher MODEL --data FILE [--out FILE]

TRL trains for a few steps (float32, reverse KL over the whole vocabulary, the rate from the first step on) and writes
down what it wrote. We train on exactly these prompts and responses, from the same student. Printed for each tensor: how
far TRL moved it, and how far we end from there, as a share of that. What the two draw, and in which order they take
prompts, is not compared here.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.against_trl import LR, NEW_TOKENS, RECORDED, ROW, _run
from benchmarks.step import machine
from nemo_opd.config import Config, ReverseKLLoss
from nemo_opd.packing import pack
from nemo_opd.types import Author, Finish, Need, Prompt, Rollout, ScoreRequest, TeacherNeeds, TrainBatch


def recorded(file: Path, steps: int) -> Iterator[list[Rollout]]:
    """The prompts and responses of each of TRL's steps."""
    found = load_file(file)
    for step in range(steps):
        parts = zip(*(found[f"{step}.{name}"] for name in RECORDED), strict=True)
        pairs = [(prompt[there.bool()], response[kept.bool()]) for prompt, there, response, kept in parts]
        yield [rollout(i, prompt, response) for i, (prompt, response) in enumerate(pairs)]


def rollout(number: int, prompt: Tensor, response: Tensor) -> Rollout:
    one = torch.ones(len(response))
    author = (one * Author.STUDENT).to(torch.int8)
    asked = Prompt(0, number, (), tuple(prompt.tolist()))
    return Rollout(asked, 0, response, one * torch.nan, author, one.long(), one.bool(), Finish.EOS)


def config(student: Path, teacher: Path, steps: int) -> Config:
    found = Config()
    found.student.model, found.teacher.model = str(student), str(teacher)
    found.student.dtype = found.teacher.dtype = "float32"
    found.teacher.micro_batch_tokens = found.train.micro_batch_tokens = ROW
    found.train.steps = steps
    found.optimizer.lr, found.optimizer.warmup_steps, found.optimizer.adam_beta2 = LR, 0, 0.999
    return found


def ours(recipe: Config, batches: Iterator[list[Rollout]]) -> dict[str, Tensor]:
    """The student after an update on each batch."""
    from nemo_opd.engines.megatron.scorer import MegatronScorer
    from nemo_opd.engines.megatron.trainer import MegatronTrainer
    from nemo_opd.losses import build_loss

    scorer = MegatronScorer(recipe)
    trainer = MegatronTrainer(recipe, build_loss(ReverseKLLoss()), None, recipe.train.steps)
    trainer.set_teacher_output(recipe.teacher.model)
    for rollouts in batches:
        requests = [
            ScoreRequest(i, r.prompt.token_ids, r.response_ids, trainer.place.loss_ranks[0])
            for i, r in enumerate(rollouts)
        ]
        scores = {answer.key: answer for answer in scorer.score(requests, TeacherNeeds(Need.FULL))}
        rows = pack(rollouts, scores, range(len(rollouts)), [0.0] * len(rollouts), ROW)
        tokens = sum(len(r.response_ids) for r in rollouts)
        trainer.train_step(TrainBatch(rows, {"reverse_kl": float(tokens)}))
    return dict(trainer.export_weights())


def table(first: Mapping[str, Tensor], theirs: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> list[str]:
    rows = ["| tensor | TRL moved it by (norm) | distance of ours from TRL's, share of that |", "|---|---|---|"]
    shares = []
    for name, weight in mine.items():
        moved = float((theirs[name].double() - first[name].double()).norm())
        shares.append(float((weight.double() - theirs[name].double()).norm()) / moved)
        rows.append(f"| {name} | {moved:.2e} | {shares[-1]:.1e} |")
    return [*rows, f"| **largest** | | **{max(shares):.1e}** |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name in ("student", "teacher", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, help="write the table there too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        words = [word for name in ("student", "teacher", "data") for word in (f"--{name}", str(getattr(args, name)))]
        _run([sys.executable, "-m", "benchmarks.trl_side", *words, "--out", scratch, "--batch", str(args.batch),
              "--steps", str(args.steps), "--lr", str(LR), "--warmup", "0", "--tokens", str(NEW_TOKENS),
              "--seed", "1", "--record"])  # fmt: skip
        batches = recorded(Path(scratch) / "batches.safetensors", args.steps)
        mine = ours(config(args.student, args.teacher, args.steps), batches)
        theirs = load_file(Path(scratch) / "model" / "model.safetensors")
    text = table(load_file(args.student / "model.safetensors"), theirs, mine)
    text += ["", f"{args.steps} steps of {args.batch} prompts. {machine()}, trl {version('trl')}."]
    print("\n".join(text))
    if args.out:
        head = "# The same updates as TRL\n\n    python -m benchmarks.trl_updates\n\n"
        args.out.write_text(head + "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
