"""`nemo-opd eval`: accuracy of a run, a checkpoint or a model folder on held-out problems, in one process."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_opd.assemble import build_evaluation, build_generator, check_same_tokens, decoder
from nemo_opd.config import Config
from nemo_opd.configuration.load import load
from nemo_opd.engines.hf.generator import HFGenerator
from nemo_opd.engines.protocols import Generator
from nemo_opd.errors import ConfigError
from nemo_opd.evaluate.prefixes import accuracy, rewards, table, teacher_on_prefixes, write
from nemo_opd.evaluate.run import Evaluation
from nemo_opd.processes import Processes
from nemo_opd.prompts.template import eos_token_ids, load_tokenizer
from nemo_opd.reliability.stop import StopRequest
from nemo_opd.types import Prompt


def main(args: argparse.Namespace) -> int:
    """Evaluate what `args.path` holds (`args.kind`: run, checkpoint or model) and print the result."""
    config = configuration(args)
    tokenizer = load_tokenizer(config.student.model)
    evaluation = build_evaluation(config, tokenizer)
    assert evaluation is not None
    generator = load_generator(args, config)
    if args.teacher_on_prefixes is not None:
        answer = prefix_answer(args, config, evaluation, generator)
        evaluation.verifier.close()
        write_answer(args, answer)
        return 0
    # Ctrl-C ends it at once, and a stop request in the folder is the training run's.
    result = evaluation.measure(generator, Processes(), StopRequest(None, "evaluation", Processes()))
    assert result is not None, "only a stop request ends an evaluation early"
    evaluation.verifier.close()
    answer = result.as_dict()
    sys.stdout.write(f"{args.path}: {result}\n")
    if args.compare_transformers:
        same = same_answers(config, evaluation, generator)
        count = len(evaluation.problems)
        sys.stdout.write(f"plain transformers gives the same tokens for {same} of {count} problems\n")
        answer["same_as_transformers"] = same
        if same < count:
            return 70
    write_answer(args, answer)
    return 0


def write_answer(args: argparse.Namespace, answer: Mapping[str, Any]) -> None:
    """Where `--out` asks for it."""
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(answer, indent=1) + "\n")


def prefix_answer(
    args: argparse.Namespace, config: Config, evaluation: Evaluation, student: Generator
) -> dict[str, Any]:
    """`--teacher-on-prefixes`: print the table, return it as JSON data. One of the two models is held at a time."""
    teacher_folder = str(config.teacher.model)
    tokenizers = load_tokenizer(config.student.model), load_tokenizer(teacher_folder, "teacher.model")
    check_same_tokens(*tokenizers)
    rollouts = write(evaluation, student)
    student.close()
    eos_ids = {  # the student's end a prefix, the teacher's its own responses
        *eos_token_ids(config.student.model, tokenizers[0]),
        *eos_token_ids(teacher_folder, tokenizers[1], "teacher.model"),
    }
    teacher = HFGenerator(
        Path(teacher_folder),
        eos_ids=sorted(eos_ids),
        decode=decoder(tokenizers[1]),
        dtype=config.teacher.dtype,
        batch_size=config.rollout.batch_size,
    )
    own = accuracy("student", rewards(evaluation, rollouts))
    points = list(teacher_on_prefixes(evaluation, rollouts, teacher, args.teacher_on_prefixes))
    teacher.close()
    sys.stdout.write(table(own, points))
    return {"student": own and own.as_dict(), "teacher_on_prefixes": [point.as_dict() for point in points]}


def configuration(args: argparse.Namespace) -> Config:
    """The run's own settings, or the schema's for a model folder, under those of the command line."""
    if args.kind == "model":
        recipe, settings = None, [f"student.model={args.path}", f"run.dir={args.path}", "train.steps=1"]
        if args.data is None:
            raise ConfigError("--data", "nothing", "a file with held-out problems", "name one")
    else:
        from nemo_opd.export import find_checkpoint  # late: a model folder needs no Megatron

        recipe, settings = find_checkpoint(args.path) / "config.yaml", []
    if args.data is not None:
        settings += [f"evaluate.path={args.data}", f"data.path={args.data}"]
    config = load(recipe, [*settings, *args.overrides], checked=False)
    if config.evaluate.path is None:
        raise ConfigError("--data", "nothing, and evaluate.path of the run is not set", "a file", "name one")
    return config


def load_generator(args: argparse.Namespace, config: Config) -> Generator:
    """A generator with the weights of the model folder, or of the checkpoint, in whatever layout it was written."""
    tokenizer = load_tokenizer(config.student.model)
    generator = build_generator(config, tokenizer, read_weights=args.kind == "model")
    assert generator is not None
    if args.kind != "model":
        from nemo_opd.checkpoint.store import read_state
        from nemo_opd.export import find_checkpoint, read_weights

        checkpoint = find_checkpoint(args.path)
        generator.load_weights(read_weights(checkpoint, config), version=read_state(checkpoint).step)
    return generator


def same_answers(config: Config, evaluation: Evaluation, generator: Generator) -> int:
    """For how many problems the greedy tokens of `generator` equal those of transformers' own `generate`."""
    from transformers import AutoModelForCausalLM

    greedy = replace(evaluation, sampling=replace(evaluation.sampling, greedy=True), samples_per_prompt=1)
    ours = {
        rollout.prompt.index: rollout.response_ids.tolist()
        for rollout in generator.generate(greedy.requests(greedy.problems), greedy.sampling, lambda: False)
    }
    model = AutoModelForCausalLM.from_pretrained(
        config.student.model,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    theirs = _transformers_answers(model, evaluation.problems, evaluation.sampling.max_new_tokens)
    return sum(ours[prompt.index] == theirs[prompt.index] for prompt in evaluation.problems)


def _transformers_answers(model, problems: Sequence[Prompt], max_new_tokens: int) -> dict[int, list[int]]:
    answers = {}
    for prompt in problems:
        ids = torch.tensor([prompt.token_ids])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens
        )
        answers[prompt.index] = output[0, ids.shape[1] :].tolist()
    return answers
