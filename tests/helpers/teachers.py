"""A served teacher without a model: the real routes and streams over HTTP, numbers from a formula, faults on demand."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn
from torch import Tensor

from nemo_opd.engines.vllm.server import application
from nemo_opd.engines.vllm.settings import TEACHER, ServerSettings
from nemo_opd.engines.vllm.wire import (
    NEEDS,
    Attach,
    Attached,
    EngineFailed,
    Score,
    Scored,
    WireScore,
    packed,
    unpacked,
)
from nemo_opd.types import Need

IDS = 96


def logprob(context: int, offset: int, ids: Tensor) -> Tensor:
    """What a stand-in says of `ids` at response token `offset` after `context` tokens; different at every position."""
    return -1.0 - ((7 * context + 31 * offset + 3 * ids) % 101).float() / 10


class StandIn:
    """What `nemo_opd.engines.vllm.teacher.Teacher` is to the routes."""

    def __init__(
        self,
        positions: int = 256,
        scored_ids: int = IDS,
        role: str = TEACHER,
        at_ids: bool = True,
        weights: str = "",
    ) -> None:
        self.settings = ServerSettings(model="", role=TEACHER, ready_file="", weights_dir="")
        self._told = Attached(role, weights, scored_ids + 5, scored_ids, at_ids, positions, 64, "stand-in")
        self.asked: list[int] = []
        """Keys of requests, as often as they came."""
        self.dead = False
        self.fault: Callable[[WireScore], str] = lambda request: ""
        """Of a request: the error that it ends with, ``die`` for one that the server dies of, ``hang`` for one that it
        hangs at, nothing for one that is answered."""

    def health(self) -> dict[str, Any]:
        return {"status": "ready", "steps": 0, "running": 0}

    async def attach(self, message: Attach) -> None:
        self._alive()

    def description(self, vllm: str) -> Attached:
        return self._told

    async def score(self, message: Score) -> AsyncGenerator[Mapping[str, Any], None]:
        self._alive()
        self.asked += [request.key for request in message.requests]
        yield {"steps": 0}
        for request in message.requests:
            await asyncio.sleep(0)
            fault = self.fault(request)
            if fault == "die":
                self.dead = True
            while fault == "hang":
                await asyncio.sleep(0.05)
                yield {"steps": 0}
            self._alive()
            if fault:
                yield {"key": request.key, "error": fault}
            else:
                yield Scored(request.key, packed(_numbers(request, NEEDS[message.need], message.k))).to_dict()
        yield {"end": len(message.requests)}

    def _alive(self) -> None:
        if self.dead:
            raise EngineFailed("it is dead")


def _numbers(request: WireScore, need: Need, k: int) -> dict[str, Tensor]:
    context, rows = len(request.context), len(request.response)
    ids = torch.tensor(request.response)[:, None]
    if need is Need.AT_IDS:
        ids = unpacked(request.at_ids, {"ids": (torch.int64, (rows, k))})["ids"]
    if need is Need.TOP_K:
        ids = torch.stack([logprob(context, t, torch.arange(IDS)).topk(k).indices for t in range(rows)])
    logprobs = torch.stack([logprob(context, t, ids[t]) for t in range(rows)])
    return {"logprobs": logprobs, "ids": ids} if need is Need.TOP_K else {"logprobs": logprobs}


@contextmanager
def standing(served: StandIn, key: str | None = None) -> Iterator[str]:
    """The address of a server of `served`, in a thread of this process."""
    server = uvicorn.Server(uvicorn.Config(application(served, key), port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = server.force_exit = True
    thread.join(10)
