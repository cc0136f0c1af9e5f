"""Plans of recipes, and recipes whose plan is compared with what runs: rows that are as long as the recipe allows, on a
bare machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from nemo_opd.config import Config
from nemo_opd.planning.gpus import GPUS, Assumptions, Cluster
from nemo_opd.planning.plan import Options, Plan, make_setting, plan, read_recipe
from nemo_opd.planning.setting import Setting
from nemo_opd.types import Author, Finish, Prompt, Rollout, TrainBatch
from tests.helpers.megatron import random_hidden, recipe, replica_batch

TEACHER_HIDDEN = 192
ROWS = 2


def planned(recipe_file: Path, *words: str, **options: Any) -> Plan:
    """Of the recipe with these overrides; options as on the command line."""
    return plan(make_setting(read_recipe(recipe_file, words), Options(**options)))


def sent(found: Plan, what: str) -> float:
    """Bytes of a step that one rank sends for it."""
    return sum(flow.sent for flow in found.flows if flow.what == what)


def setting_of(config: Config, processes: int) -> Setting:
    """Without what is reserved on a GPU."""
    bare = Assumptions(reserved_gib=1e-9, slack=1.0)
    setting = make_setting(config, Options(gpus_per_node=processes, nodes=1, assumptions=bare))
    return dataclasses.replace(setting, cluster=Cluster(GPUS["h100"], 1, processes, bare))


def long_rows(
    student: Any, teacher: Any, dtype: str, prompt: int, response: int, chunk: int = 64, **more: Any
) -> Config:
    """A recipe with rows of one response each."""
    config = recipe(student, teacher, **more)
    config.student.dtype = config.teacher.dtype = dtype
    config.optimizer.distributed = False
    config.data.max_prompt_tokens, config.rollout.max_new_tokens = prompt, response
    config.train.micro_batch_tokens = config.teacher.micro_batch_tokens = prompt + response - 1
    config.train.prompts_per_step, config.train.loss_chunk_tokens = ROWS, chunk
    return config


def longest_rollouts(config: Config, vocabulary: int, count: int = ROWS) -> list[Rollout]:
    """Random, each as long as the recipe allows."""
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    draws = torch.Generator().manual_seed(0)
    return [
        Rollout(
            prompt=Prompt(i, 0, (), tuple(torch.randint(0, vocabulary, (prompt,), generator=draws).tolist())),
            sample=0,
            response_ids=torch.randint(0, vocabulary, (response,), generator=draws),
            sampler_logprobs=torch.full((response,), -3.0),
            author=torch.full((response,), int(Author.STUDENT), dtype=torch.int8),
            policy_version=torch.zeros(response, dtype=torch.int64),
            loss_mask=torch.ones(response, dtype=torch.bool),
            finish=Finish.EOS,
        )
        for i in range(count)
    ]


def long_batch(config: Config, loss: Any, trainer: Any, vocabulary: int) -> TrainBatch:
    """This replica's rows of one response each."""
    rollouts, place = longest_rollouts(config, vocabulary), trainer.place
    dtype = getattr(torch, config.teacher.dtype)
    scores = random_hidden(rollouts, 0, TEACHER_HIDDEN, dtype) if place.computes_loss else {}
    capacity = config.train.micro_batch_tokens
    return replica_batch(rollouts, scores, loss, place.data_parallel_rank, place.data_parallel_size, capacity)
