"""Finished rollouts go into a checkpoint and come back, bit for bit, for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_opd.processes import Processes
from nemo_opd.rollout.ahead import RolloutsAhead, check_versions
from nemo_opd.rollout.kept import FILE, KeptRollouts, age
from nemo_opd.rollout.source import StudentSource, name_of
from nemo_opd.types import BestIds, GenerateRequest, Prompt, Rollout, Sampling, StopRequested
from tests.helpers.ranks import RankPool
from tests.helpers.rollouts import make_prompt, make_rollout
from tests.unit.rollout.test_ahead import Stream, eventually

SAMPLES, PROMPTS = 2, 3


def decode(ids: torch.Tensor) -> str:
    return " ".join(map(str, ids.tolist()))


def finished(index: int, sample: int, best: bool = False) -> Rollout:
    length = 2 + (3 * index + sample) % 5
    rollout = make_rollout(index, length, sample, reward=None if index == 1 else 0.1 + index)
    rollout = replace(rollout, decode=decode, loss_mask=torch.ones(length, dtype=torch.bool))
    if not best:
        return rollout
    ids = torch.arange(4 * (length - 1), dtype=torch.int32).reshape(-1, 4)
    return replace(rollout, best=BestIds(ids, -(ids + 1.0) / 7))


def same(one: Rollout, other: Rollout) -> bool:
    tensors = ("response_ids", "sampler_logprobs", "author", "policy_version", "loss_mask")
    equal = all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
    equal &= all(getattr(one, name).dtype == getattr(other, name).dtype for name in tensors)
    if one.best is not None and other.best is not None:
        equal &= torch.equal(one.best.ids, other.best.ids) and torch.equal(one.best.logprobs, other.best.logprobs)
    plain = ("prompt", "sample", "finish", "text", "reward")
    equal &= all(getattr(one, name) == getattr(other, name) for name in plain)
    return equal and (one.best is None) == (other.best is None)


def write(path: Path, rollouts: Sequence[Rollout]) -> Path:
    path.write_bytes(KeptRollouts().packed(rollouts))
    return path


@pytest.mark.parametrize("best", [False, True])
def test_what_was_kept_comes_back(tmp_path: Path, best: bool) -> None:
    rollouts = [finished(index, sample, best and index != 2) for index in (4, 1, 2) for sample in (1, 0)]
    kept = KeptRollouts(write(tmp_path / FILE, rollouts), oldest=2, decode=decode)
    back = kept.take([make_prompt(1), make_prompt(9)], step=9) + kept.take([make_prompt(2), make_prompt(4)], step=9)
    assert sorted(map(name_of, back)) == sorted(map(name_of, rollouts))
    originals = {name_of(rollout): rollout for rollout in rollouts}
    assert all(same(rollout, originals[name_of(rollout)]) for rollout in back)
    assert kept.packed([]) == b"" and kept.take([make_prompt(1)], step=9) == [], "each is handed out once"


def test_what_nobody_asked_for_yet_is_kept_on(tmp_path: Path) -> None:
    """Two resumes, and a step between them: the second file has what is left of the first, and what is new."""
    kept = KeptRollouts(write(tmp_path / FILE, [finished(1, 0), finished(2, 0, best=True)]), 2, decode)
    assert [rollout.prompt.index for rollout in kept.take([make_prompt(1)], 8)] == [1]
    (tmp_path / "second").write_bytes(kept.packed([finished(5, 1)]))
    again = KeptRollouts(tmp_path / "second", 2, decode)
    back = again.take([make_prompt(index) for index in (1, 2, 5)], 9)
    assert all(same(one, other) for one, other in zip(back, [finished(2, 0, best=True), finished(5, 1)], strict=True))


def test_a_rollout_is_as_old_as_before_and_one_that_is_too_old_is_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All tokens are of version 7: fine for the policies 7 to 9, if two steps are permitted."""
    path = write(tmp_path / FILE, [finished(3, 0)])
    for step, oldest, fresh in ((9, 2, True), (10, 2, False), (9, 1, False), (7, 0, True)):
        found = KeptRollouts(path, oldest, decode).take([make_prompt(3)], step)
        assert len(found) == fresh, (step, oldest)
        check_versions(found, step, oldest)
        if fresh:
            assert age(found[0], step) == step - 7
    assert "1 finished rollouts of step 10 are too old" in caplog.text


@pytest.mark.parametrize("changed", [{"token_ids": (1, 2, 4)}, {"answer": "other"}], ids=["prompt", "answer"])
def test_an_answer_to_another_prompt_is_not_used(tmp_path: Path, changed: dict[str, Any]) -> None:
    kept = KeptRollouts(write(tmp_path / FILE, [finished(3, 0)]), 2, decode)
    assert kept.take([replace(make_prompt(3), **changed)], 8) == []


class Generator:
    """Writes at once, but never to prompts of `never`, until it is asked to stop. Remembers what it was asked."""

    def __init__(self, version: int, never: Sequence[int] = ()) -> None:
        self.version, self.never = version, never
        self.asked: list[tuple[int, int, int]] = []

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: Sampling, stop_requested: StopRequested
    ) -> Iterator[Rollout]:
        self.asked += [name_of(request) for request in requests]
        for request in sorted(requests, key=lambda request: request.prompt.index in self.never):
            while request.prompt.index in self.never:
                if stop_requested():
                    return
            rollout = finished(request.prompt.index, request.sample, best=True)
            yield replace(rollout, policy_version=torch.full_like(rollout.policy_version, self.version))


def ahead_of(
    generator: Generator, processes: Processes, folder: Path, at: int = 0, staleness: int = 2
) -> tuple[RolloutsAhead, Any]:
    """Draws of a run at this step, which resumes where the folder holds rollouts; and its `written`."""
    source = StudentSource(generator, Sampling(9), SAMPLES, seed=0)  # type: ignore[arg-type]
    stream = Stream()
    stream.take(at * PROMPTS)

    def written(
        prompts: Sequence[Prompt], step: int, stop_requested: StopRequested, ready: Sequence[Rollout]
    ) -> Iterator[Rollout]:
        mine = [prompts[i] for i in processes.share(len(prompts))]
        return source.rollouts(mine, step, stop_requested, ready)

    kept = KeptRollouts(folder / FILE, staleness, decode)
    return RolloutsAhead(stream, processes, lambda: False, PROMPTS, staleness, 6, kept), written


def _stopped(rank: int, folder: str) -> int:
    """Step 0 is handed out and trained; of steps 1 and 2 all is finished but what belongs to prompts 5 and 7."""
    processes = Processes.current()
    generator = Generator(version=0, never=(5, 7))
    draws, written = ahead_of(generator, processes, Path(folder))
    assert len(list(draws.draw(written, 0, PROMPTS)[1])) == SAMPLES * len(processes.share(PROMPTS))
    wanted = SAMPLES * sum(index not in (5, 7) for step in (1, 2) for index in share_of(processes, step))
    eventually(lambda: sum(len(begun.written()) for begun in draws._begun) == wanted)
    assert draws.finished_more(1)
    draws.close()
    kept = draws.kept(1)
    assert not draws.finished_more(1)
    if rank == 0:
        (Path(folder) / FILE).write_bytes(kept)
    return wanted


def share_of(processes: Processes, step: int) -> range:
    share = processes.share(PROMPTS)
    return range(step * PROMPTS + share.start, step * PROMPTS + share.stop)


def _resumed(rank: int, folder: str) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int, int]]]:
    """What is asked of the generator, and (name, version) of all that is trained on in steps 1 and 2."""
    processes = Processes.current()
    generator = Generator(version=1)
    draws, written = ahead_of(generator, processes, Path(folder), at=1)
    trained = []
    for step in (1, 2):
        prompts, rollouts = draws.draw(written, step, PROMPTS)
        assert [prompt.index for prompt in prompts] == list(range(step * PROMPTS, (step + 1) * PROMPTS))
        for rollout in rollouts:
            assert rollout.best is not None and rollout.text == decode(rollout.response_ids)
            trained.append((*name_of(rollout), int(rollout.policy_version[0])))
    draws.close()
    return generator.asked, trained


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2)])
def test_they_belong_to_prompts_not_to_processes(
    ranks1: RankPool, ranks2: RankPool, tmp_path: Path, before: int, after: int
) -> None:
    pools = {1: ranks1, 2: ranks2}
    assert sum(pools[before].run(_stopped, str(tmp_path))) == 4 * SAMPLES
    answers = pools[after].run(_resumed, str(tmp_path))
    asked = [name for found, _ in answers for name in found]
    trained = sorted(name for _, found in answers for name in found)
    everything = [(0, index, sample) for index in range(3, 9) for sample in range(SAMPLES)]
    assert [name[:3] for name in trained] == everything, "each once"
    again = [name for name in everything if name[1] in (5, 7)]
    assert sorted(name for name in asked if name[1] < 9) == again, "the others were finished"
    assert [name[3] for name in trained] == [int(name in again) for name in everything]
