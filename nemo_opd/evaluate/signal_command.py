"""`nemo-opd signal`: which teacher context tells good responses from bad ones, before anything is trained on it.

The student writes a group of responses to each prompt, the verifier grades them, and the teacher scores each as a whole
under every context. In one process, whatever the recipe's layouts.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from nemo_opd.assemble import build_external_scorer, build_generator, decoder, teacher_tokenizer
from nemo_opd.config import (
    Config,
    LayoutConfig,
    PeersContext,
    PrivilegedContext,
    SamePromptContext,
    SlotConfig,
    StudentPrefix,
)
from nemo_opd.configuration.check import CHOICES
from nemo_opd.configuration.load import load
from nemo_opd.engines.megatron.parallel import init_distributed
from nemo_opd.engines.protocols import Scorer
from nemo_opd.errors import ConfigError
from nemo_opd.evaluate.signal import Agreement, agreement
from nemo_opd.processes import Processes
from nemo_opd.prompts.stream import PromptStream
from nemo_opd.prompts.template import load_tokenizer
from nemo_opd.rollout.exchange import gather_rollouts
from nemo_opd.rollout.source import StudentSource
from nemo_opd.teacher.build import build_context
from nemo_opd.types import Need, Rollout, Sampling, ScoreRequest, TeacherNeeds
from nemo_opd.verify.build import build_verifier

log = logging.getLogger(__name__)

PEERS = tuple(f"peers.{variant}" for variant in CHOICES["context.variant"])


def main(args: argparse.Namespace) -> int:
    """Print one line per context, and write them to `args.out` as JSON."""
    config = load(args.recipe, args.overrides)
    names = args.context or default_names(config)
    slots = {name: context_slot(config, name) for name in names}
    config = in_one_process(config)
    init_distributed()
    rollouts = write_responses(config, args.prompts)
    scorer = build_external_scorer(config, load_tokenizer(config.student.model))
    found = {}
    for name, slot in slots.items():
        log.info("scoring %d responses under %s", len(rollouts), name)
        found[name] = measure(config, slot, scorer, rollouts, args.draws)
    scorer.close()
    sys.stdout.write(table(found, len(rollouts)) + "\n")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(as_dict(config, found, len(rollouts)), indent=1) + "\n")
    return 0


def default_names(config: Config) -> list[str]:
    """The same prompt, the privileged one where the recipe has one, and all that peers can be."""
    own = ["privileged"] if isinstance(config.context, PrivilegedContext) else []
    return ["same_prompt", *own, *PEERS]


def context_slot(config: Config, name: str) -> SlotConfig:
    """The context that a name stands for, with the recipe's own parameters where its context is of that kind.

    Raises:
        ConfigError: no such name, privileged information that the recipe does not name, or peers of nobody.
    """
    if name == "same_prompt":
        return SamePromptContext()
    if name == "privileged":
        if isinstance(config.context, PrivilegedContext):
            return config.context
        way_out = "set context=privileged and context.field (or context.text) as well"
        raise ConfigError("--context", "privileged", "a recipe that says what is privileged", way_out)
    if name not in PEERS:
        expected = f"same_prompt, privileged or one of {', '.join(PEERS)}"
        raise ConfigError("--context", name, expected, "choose among these")
    if config.rollout.samples_per_prompt < 2:
        got, expected = config.rollout.samples_per_prompt, "at least 2, as peers are other rollouts of the same prompt"
        raise ConfigError("rollout.samples_per_prompt", got, expected, "set it to 8, for example")
    own = config.context if isinstance(config.context, PeersContext) else PeersContext()
    return replace(own, variant=name.partition(".")[2])


def in_one_process(config: Config) -> Config:
    """Without parallelism; the student writes, and a self teacher is the student as it stands in its folder."""
    if config.teachers:
        way_out = "say what to measure in `teacher`: teacher.model=... without teachers"
        raise ConfigError("teachers", ", ".join(config.teachers), "one teacher, as one is measured", way_out)
    whole: dict[str, Any] = {field.name: getattr(LayoutConfig(), field.name) for field in fields(LayoutConfig)}
    student = replace(config.student, **whole)
    teacher = replace(config.teacher, **whole)
    if teacher.source != "external":
        teacher = replace(teacher, source="external", model=student.model, dtype=student.dtype)
    if teacher.engine == "none":
        way_out = "set teacher.engine=megatron and teacher.model, or teacher.source=frozen"
        raise ConfigError("teacher.engine", "none", "a teacher, whose scores are looked at", way_out)
    return replace(config, student=student, teacher=teacher, prefix=StudentPrefix())


def write_responses(config: Config, prompts: int) -> list[Rollout]:
    """The verified responses to the first `prompts` prompts of the stream.

    Raises:
        ConfigError: there is no verifier, or it could grade nothing.
    """
    tokenizer = load_tokenizer(config.student.model)
    verifier = build_verifier(config.verify)
    if verifier is None:
        way_out = "set verify.name (exact, integer, math, ...)"
        raise ConfigError("verify.name", "none", "a verifier, as scores are compared with rewards", way_out)
    generator = build_generator(config, tokenizer, read_weights=True)
    assert generator is not None
    rollout = config.rollout
    sampling = Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
    source = StudentSource(generator, sampling, rollout.samples_per_prompt, config.run.seed)
    chosen = PromptStream(config.data, tokenizer, config.run.seed).take(prompts)
    log.info("writing %d responses to each of %d prompts", rollout.samples_per_prompt, prompts)
    written = gather_rollouts(Processes(), source.rollouts(chosen, 0, lambda: False), chosen, decoder(tokenizer))
    rollouts = [replace(one, reward=verifier(one.text, one.prompt)) for one in written]
    verifier.close()
    if all(one.reward is None for one in rollouts):
        way_out = "check data.answer_key and verify.name"
        raise ConfigError("data.path", "no record that verify.name can read", "answers to compare with", way_out)
    return rollouts


def measure(config: Config, slot: SlotConfig, scorer: Scorer, rollouts: Sequence[Rollout], draws: int) -> Agreement:
    """Agreement of the teacher under one context with the verifier, where it has a context and a whole score."""
    context = build_context(slot, teacher_tokenizer(config), config.run.seed, config.data)
    contexts = context.context_ids(rollouts)
    requests = [
        ScoreRequest(i, ids, rollouts[i].response_ids)
        for i, ids in enumerate(contexts)
        if ids is not None and len(rollouts[i].response_ids) and rollouts[i].reward is not None
    ]
    groups: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for answer in scorer.score(requests, TeacherNeeds(Need.SAMPLED)):
        rollout = rollouts[answer.key]
        if bool(answer.valid.all()) and answer.sampled_logprobs is not None and rollout.reward is not None:
            key = rollout.prompt.epoch, rollout.prompt.index
            groups.setdefault(key, []).append((float(answer.sampled_logprobs.double().sum()), rollout.reward))
    ordered = {key: sorted(groups[key]) for key in sorted(groups)}  # scorers answer in any order
    return agreement(ordered, getattr(slot, "success_threshold", 1.0), draws, config.run.seed)


def table(found: dict[str, Agreement], responses: int) -> str:
    """A Markdown table; `responses` is how many were written."""
    lines = [
        "| teacher sees | responses (of all) | successes | AUC [95 %] | Spearman [95 %] | pairwise [95 %] | pairs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        counts = f"{one.responses} ({responses}) | {one.successes}"
        lines.append(f"| {name} | {counts} | {one.auc} | {one.spearman} | {one.pairwise} | {one.pairwise.n} |")
    return "\n".join(lines)


def as_dict(config: Config, found: dict[str, Agreement], responses: int) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "student": config.student.model,
        "teacher": config.teacher.model,
        "data": config.data.path,
        "seed": config.run.seed,
        "responses_written": responses,
        "contexts": {name: one.as_dict() for name, one in found.items()},
    }
