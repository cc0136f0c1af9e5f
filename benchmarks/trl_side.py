"""TRL's part of `against_trl`, in processes of its own: trains, and writes the seconds of each step."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from benchmarks.against_trl import RECORDED
from nemo_opd.prompts.template import render_chat


class Seconds(TrainerCallback):
    """From the end of one step to the end of the next: whatever a step costs is in it."""

    def __init__(self) -> None:
        self.found: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.found.append(now - self._last)
        self._last = now


class Counting(DistillationTrainer):
    """Remembers how long its responses are; warms up as we do, where the first step has a rate above 0."""

    lengths: list[float]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        warmup = max(1, self.args.warmup_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: min(1.0, (step + 1) / warmup)
        )
        return self.lr_scheduler

    def _generate_single_turn(self, *arguments: Any, **more: Any) -> Any:
        answer = super()._generate_single_turn(*arguments, **more)
        completions = answer[0] if isinstance(answer, tuple) else answer
        self.lengths.append(sum(map(len, completions)) / len(completions))
        return answer


class Recording(Counting):
    """Writes down what it trains on, for `trl_updates`."""

    steps: list[dict[str, torch.Tensor]]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        answer = super()._generate_and_score_completions(inputs)
        self.steps.append({name: answer[name].clone() for name in RECORDED})
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="write the batches too")
    for name in ("student", "teacher", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("batch", "steps", "warmup", "tokens", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.student, padding_side="left")
    prompts = [json.loads(line)["prompt"] for line in args.data.read_text().splitlines()]
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    theirs = tokenizer.apply_chat_template(messages[0], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert list(theirs["input_ids"]) == list(render_chat(tokenizer, messages[0])), "both train on the same prompts"
    config = DistillationConfig(
        output_dir=str(args.out), max_steps=args.steps, per_device_train_batch_size=args.batch, learning_rate=args.lr,
        warmup_steps=args.warmup, max_completion_length=args.tokens, beta=1.0,
        temperature=1.0, top_p=1.0, top_k=0, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[],
        save_strategy="no", logging_steps=10_000, adam_beta2=0.999, weight_decay=0.0, max_grad_norm=1.0,
        disable_tqdm=True, seed=args.seed, dataloader_num_workers=0,
        ddp_backend="gloo" if "RANK" in os.environ else None,
    )  # fmt: skip
    seconds = Seconds()
    Counting.lengths, Recording.steps = [], []
    trainer = (Recording if args.record else Counting)(
        model=AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32),
        args=config, train_dataset=Dataset.from_dict({"prompt": messages}), processing_class=tokenizer,
        callbacks=[seconds],
    )  # fmt: skip
    trainer.train()
    if int(os.environ.get("RANK", "0")):
        return
    trainer.model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    if args.record:
        found = {f"{i}.{name}": values for i, step in enumerate(Recording.steps) for name, values in step.items()}
        save_file(found, args.out / "batches.safetensors")
    (args.out / "result.json").write_text(json.dumps({"seconds": seconds.found, "tokens": Counting.lengths}))


if __name__ == "__main__":
    main()
