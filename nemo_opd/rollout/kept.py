"""Rollouts that were finished, but not trained on, when a checkpoint was made: a resumed run begins with them.

They are one file of the checkpoint, whatever the number of processes: a rollout belongs to its prompt and not to the
rank that wrote it. What was not finished is written again, from the same seeds.

    rollouts.safetensors   integers, floats             `exchange.flatten`, positions count the prompts of the header
                           best_integers, best_floats   `Rollout.best`, where a stop rule wants it
                           header                       JSON: [epoch, index, digest] of each prompt
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from nemo_opd.processes import Processes
from nemo_opd.rollout.exchange import flatten, gather_rollouts, unflatten
from nemo_opd.rollout.source import name_of
from nemo_opd.types import BestIds, Prompt, Rollout

log = logging.getLogger(__name__)

FILE = "rollouts.safetensors"
Decode = Callable[[Tensor], str]
Key = tuple[int, int]
"""Epoch and index of a prompt."""


class KeptRollouts:
    """Those of an earlier attempt, until the steps that train on their prompts are begun. The same on every rank."""

    def __init__(self, path: Path | None = None, oldest: int = 0, decode: Decode = str) -> None:
        """
        Args:
            path: a checkpoint's file; there is none where nothing was kept.
            oldest: steps by which a token may be older than the policy that is trained on it.
            decode: int64 [response] -> text.
        """
        self._oldest, self._decode = oldest, decode
        self._digests: dict[Key, str] = {}
        self._groups: defaultdict[Key, list[Rollout]] = defaultdict(list)
        """By prompt; what stands there as their prompt knows its name alone."""
        if path is not None and path.exists():
            self._read(path)
            log.info("%d rollouts were finished before and will be trained on", sum(map(len, self._groups.values())))

    def take(self, prompts: Sequence[Prompt], step: int) -> list[Rollout]:
        """Hand out what there is for the prompts of the step with this number from 0.

        What would be too old there (the recipe permits less than it did) or answers another prompt (the data set, or
        how it is rendered, was changed) is dropped, and said: it is written again.
        """
        found, dropped = [], 0
        for prompt in prompts:
            key = prompt.epoch, prompt.index
            for rollout in self._groups.pop(key, []):
                if self._digests[key] != digest(prompt) or age(rollout, step) > self._oldest:
                    dropped += 1
                    continue
                found.append(replace(rollout, prompt=prompt, decode=self._decode))
        if dropped:
            log.warning("%d finished rollouts of step %d are too old or answer other prompts", dropped, step)
        return found

    def packed(self, rollouts: Sequence[Rollout]) -> bytes:
        """The file of a checkpoint: these, and what was not handed out yet. Nothing where there are none."""
        everything = [*rollouts, *(rollout for group in self._groups.values() for rollout in group)]
        if not everything:
            return b""
        digests = {key_of(rollout): digest(rollout.prompt) for rollout in rollouts}
        digests |= {key: self._digests[key] for key in self._groups}
        position = {key: number for number, key in enumerate(digests)}
        integers, floats = flatten((position[key_of(rollout)], rollout) for rollout in everything)
        best_integers, best_floats = _flatten_best(everything)
        header = [[*key, mark] for key, mark in digests.items()]
        tensors = {"integers": integers, "floats": floats, "best_integers": best_integers, "best_floats": best_floats}
        return to_bytes(tensors, {"header": json.dumps(header)})

    def _read(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it has no other iterator
            header = json.loads(file.metadata()["header"])
        prompts = [Prompt(index, epoch, messages=(), token_ids=()) for epoch, index, _ in header]
        rollouts = unflatten(tensors["integers"], tensors["floats"], prompts, lambda _: "")
        best = _unflatten_best(tensors["best_integers"], tensors["best_floats"])
        self._digests = {(epoch, index): mark for epoch, index, mark in header}
        for rollout in rollouts:
            self._groups[key_of(rollout)].append(replace(rollout, best=best.get(name_of(rollout))))


def age(rollout: Rollout, step: int) -> int:
    """Optimizer steps by which the oldest token for training that a policy of ours wrote is older than the policy that
    the step with this number trains."""
    versions = rollout.policy_version[rollout.loss_mask & (rollout.policy_version >= 0)]
    return step - int(versions.min()) if len(versions) else 0


def digest(prompt: Prompt) -> str:
    """Tells what the student read and what the verifier compares with."""
    return hashlib.sha256(f"{prompt.token_ids} {prompt.answer}".encode()).hexdigest()


def gather_kept(processes: Processes, mine: Sequence[Rollout], prompts: Sequence[Prompt]) -> list[Rollout]:
    """Every rank's rollouts on every rank, without their text, by (prompt position, sample). Collective.

    Args:
        mine: this rank's.
        prompts: those that they may be of, the same on every rank.
    """
    rollouts = gather_rollouts(processes, mine, prompts, lambda _: "")
    parts = zip(*(processes.gather(part) for part in _flatten_best(mine)), strict=True)
    best = {name: found for integers, floats in parts for name, found in _unflatten_best(integers, floats).items()}
    return [replace(rollout, best=best.get(name_of(rollout))) for rollout in rollouts]


def key_of(rollout: Rollout) -> Key:
    """Names its prompt."""
    return rollout.prompt.epoch, rollout.prompt.index


def _flatten_best(rollouts: Iterable[Rollout]) -> tuple[Tensor, Tensor]:
    """int32 [any]: epoch, index, sample, tokens, k and ids of each; float32 [any]."""
    integers, floats = [torch.zeros(0, dtype=torch.int32)], [torch.zeros(0)]
    for rollout in rollouts:
        if rollout.best is not None:
            shape = (len(rollout.best), rollout.best.ids.shape[1])
            integers += [torch.tensor([*name_of(rollout), *shape], dtype=torch.int32), rollout.best.ids.flatten()]
            floats.append(rollout.best.logprobs.flatten())
    return torch.cat(integers), torch.cat(floats)


def _unflatten_best(integers: Tensor, floats: Tensor) -> dict[tuple[int, int, int], BestIds]:
    found = {}
    i = f = 0
    while i < len(integers):
        epoch, index, sample, tokens, k = integers[i : i + 5].tolist()
        i += 5
        size = tokens * k
        shape = (tokens, k)
        best = BestIds(integers[i : i + size].reshape(shape), floats[f : f + size].reshape(shape))
        found[epoch, index, sample] = best
        i, f = i + size, f + size
    return found
