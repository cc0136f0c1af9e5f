"""Megatron's interleaved schedule where no message is buffered, as between GPUs. Over gloo a small send is through
before anybody receives it: tests with real ranks would not notice two that wait for each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.helpers.ranks import RankPool
from tests.helpers.tiny import tiny_config

Op = tuple[int, str, int, bool]
"""(the stage that the way begins at, forward or backward, the how manieth on this way, is it sent?)"""
Calls = list[set[Op]]
"""What a stage sends and receives in each call that communicates."""


class Group:
    """What the schedule asks of a process group."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = lambda: rank, lambda: size


def recorded(stage: int, stages: int, config: Any) -> tuple[Any, Calls]:
    """A communicator that sends nothing, and what it was asked for."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    calls: Calls = []
    counts: dict[tuple[int, str, bool], int] = {}
    before = (stage - 1) % stages

    class Recorded(P2PCommunicator):
        def __init__(self) -> None:
            self.pp_group, self.config = Group(stage, stages), config  # type: ignore[assignment]
            self.virtual_pipeline_model_parallel_size = config.virtual_pipeline_model_parallel_size

        def _communicate(self, *, tensor_send_next: Any, tensor_send_prev: Any, **asked: Any) -> Any:
            kinds = {
                "send_prev": ((before, "backward", True), tensor_send_prev is not None),
                "recv_prev": ((before, "forward", False), asked["recv_prev"]),
                "send_next": ((stage, "forward", True), tensor_send_next is not None),
                "recv_next": ((stage, "backward", False), asked["recv_next"]),
            }
            ops = {name: kind for name, (kind, wanted) in kinds.items() if wanted}
            for kind in ops.values():
                counts[kind] = counts.get(kind, 0) + 1
            calls.append({(kind[0], kind[1], counts[kind], kind[2]) for kind in ops.values()})
            got = (
                torch.zeros(1, 1, 4).requires_grad_() if name in ops else None for name in ("recv_prev", "recv_next")
            )
            return *got, None if asked.get("wait_on_reqs", True) else {name: mock.Mock() for name in ops}

    return Recorded(), calls


class Chunk(torch.nn.Module):
    """A layer."""

    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        self.config, self.vp_stage, self.input = config, number, torch.zeros(1, 1, 4)
        self.weight = torch.nn.Parameter(torch.ones(4))

    def set_input_tensor(self, tensor: Any) -> None:
        [got] = tensor if isinstance(tensor, list) else [tensor]
        self.input = torch.zeros(1, 1, 4) if got is None else got

    def forward(self) -> torch.Tensor:
        return self.input * self.weight


def calls_of(stage: int, stages: int, chunks: int, rows: int, forward_only: bool, folder: Path) -> Calls:
    """Run the schedule of one stage alone: what it sends and receives does not depend on what arrives."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.process_groups_config import ProcessGroupCollection

    from nemo_opd.config import StudentConfig
    from nemo_opd.engines.megatron import cpu
    from nemo_opd.engines.megatron.families import read_architecture
    from nemo_opd.engines.megatron.model import transformer_config
    from nemo_opd.engines.megatron.parallel import Layout

    cpu.install()
    layout = Layout(1, stages, 1, stage, vp=chunks)
    config = transformer_config(read_architecture(folder), StudentConfig(model=""), layout, torch.float32)
    communicator, calls = recorded(stage, stages, config)
    groups = ProcessGroupCollection()
    groups.tp = groups.cp = groups.dp_cp = Group()
    groups.pp, groups.embd, groups.pos_embd = communicator.pp_group, None, None

    def step(rows: Any, model: Chunk) -> Any:
        next(rows)
        return model(), lambda output, **_: (output.sum(), torch.zeros((), dtype=torch.int), {})

    with (
        mock.patch.object(schedules, "is_pp_first_stage", lambda _: stage == 0),
        mock.patch.object(schedules, "is_pp_last_stage", lambda _: stage == stages - 1),
        mock.patch.object(schedules, "get_model_type", lambda _: None),
    ):
        schedules.forward_backward_pipelining_with_interleaving(
            forward_step_func=step,
            data_iterator=[iter(range(rows)) for _ in range(chunks)],
            model=[Chunk(config, number) for number in range(chunks)],
            num_microbatches=rows,
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            p2p_communicator=communicator,
            pg_collection=groups,
        )
    return [call for call in calls if call]


def played(programs: list[Calls]) -> list[int]:
    """How many calls of each stage end, where a message arrives only while both ends are in the call that has it.

    First shapes, then tensors: `P2PCommunicator` tells shapes before, and waits for the device each time.
    """
    ended, begun, told = [0] * len(programs), set[Op](), set[Op]()
    moved = True
    while moved:
        moved = False
        for stage, calls in enumerate(programs):
            call = calls[ended[stage]] if ended[stage] < len(calls) else set()
            wanted = {(way, direction, number, not sent) for way, direction, number, sent in call}
            if call and not call <= begun:
                begun, moved = begun | call, True
            elif call and wanted <= begun and not call <= told:
                told, moved = told | call, True
            elif call and wanted <= told:
                ended[stage], moved = ended[stage] + 1, True
    return ended


def ways(calls: Calls, sent: bool) -> list[tuple[int, str]]:
    """Messages that a stage sends (gets) one after the other."""
    messages = [[(way, direction) for way, direction, _, was_sent in call if was_sent == sent] for call in calls]
    assert max(map(len, messages)) == 1
    return [message for of_a_call in messages for message in of_a_call]


def play(rank: int, folder: Path, stages: int, chunks: int, rows: int, forward_only: bool) -> list[Calls]:
    return [calls_of(stage, stages, chunks, rows, forward_only, folder) for stage in range(stages)]


@pytest.mark.parametrize("forward_only", [False, True], ids=["training", "scoring"])
@pytest.mark.parametrize(("stages", "chunks", "rows"), [(2, 2, 2), (2, 3, 6), (3, 4, 3), (4, 2, 8), (8, 2, 16)])
def test_every_message_is_awaited_when_it_is_sent(
    ranks1: RankPool, tmp_path: Path, stages: int, chunks: int, rows: int, forward_only: bool
) -> None:
    tiny_config(num_hidden_layers=stages * chunks, hidden_size=4, architectures=["Qwen3ForCausalLM"]).save_pretrained(
        tmp_path
    )
    programs = ranks1.run(play, tmp_path, stages, chunks, rows, forward_only)[0]
    messages = rows * (stages * chunks - 1) * (1 if forward_only else 2)
    assert sum(len(call) for calls in programs for call in calls) == 2 * messages
    assert played(programs) == [len(calls) for calls in programs]
    if stages == 2:  # all that one sends the other goes through one communicator, which knows no names
        for sender, receiver in (programs, programs[::-1]):
            assert ways(sender, True) == ways(receiver, False)
    broken = [calls[:] for calls in programs]
    broken[0] = [*broken[0][:1], *broken[0][2:], broken[0][1]]
    assert played(broken) != [len(calls) for calls in programs], "the second call last: nobody waits for that"
