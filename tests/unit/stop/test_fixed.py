"""The control of fixed length: a lower limit that counts as a stop rule where it ends something."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from nemo_opd.stop.fixed import FixedLength
from nemo_opd.types import Finish, GenerateRequest, Rollout, Sampling
from tests.helpers.rollouts import make_prompt, make_rollout


class Writer:
    """Responses of 3, 4, 5, ... tokens, as far as they may."""

    version = 4

    def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling, stop: Any) -> Iterator[Rollout]:
        from dataclasses import replace

        for request in requests:
            length = 3 + request.prompt.index
            rollout = make_rollout(request.prompt.index, min(length, sampling.max_new_tokens))
            over = length > sampling.max_new_tokens
            yield replace(rollout, finish=Finish.LENGTH if over else Finish.EOS)


@pytest.mark.parametrize(
    ("limit", "lengths", "finishes"),
    [(9, [3, 4, 5, 5, 5], "EOS EOS EOS STOPPED STOPPED"), (4, [3, 4, 4, 4, 4], "EOS EOS LENGTH LENGTH LENGTH")],
    ids=["below the limit", "not below the limit"],
)
def test_a_rollout_ends_after_so_many_tokens(limit: int, lengths: list[int], finishes: str) -> None:
    rule = FixedLength(5)
    writer = rule.writer(Writer())
    assert writer.version == 4
    requests = [GenerateRequest(make_prompt(i), 0, i) for i in range(5)]
    rollouts = rule.cut(list(writer.generate(requests, Sampling(limit), lambda: False)), [None] * 5)
    assert [len(r.response_ids) for r in rollouts] == lengths
    assert " ".join(r.finish.name for r in rollouts) == finishes
    report = rule.end_step()
    assert report.metrics == {"stop/cut_share": finishes.count("STOPPED") / 5}
    assert report.discarded == 0
