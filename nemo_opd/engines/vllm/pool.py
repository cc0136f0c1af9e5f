"""Several servers as one: requests are dealt out to whichever has least to do, and survive the loss of a server."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from nemo_opd.engines.vllm.client import Client, ServerGone, ServerRefused
from nemo_opd.engines.vllm.wire import Attach, Attached, Generate, Refit, WireRequest, WireSampling

log = logging.getLogger(__name__)

Tell = Callable[[dict[str, Any]], None]
"""Told of each line about a request, from the event loop's thread."""

_REFILL_SHARE = 8
"""A server gets more once 1/8 of its slots is free: each portion is an HTTP request of its own."""


class Pool:
    """Belongs to one event loop. A server that was lost is asked for nothing until `take` finds it alive again."""

    def __init__(self, clients: Sequence[Client], slots: int) -> None:
        """`slots`: requests that one server is given at a time."""
        self._clients, self._slots = tuple(clients), slots
        self._lost: set[Client] = set()
        self.resent = 0
        """Requests that were sent again because their server was lost."""

    @property
    def alive(self) -> list[Client]:
        return [client for client in self._clients if client not in self._lost]

    async def attach(self, message: Attach, seconds: float) -> list[Attached]:
        """All servers. Raises ServerGone, ServerRefused for the first that cannot be had."""
        return list(await asyncio.gather(*(client.attach(message, seconds) for client in self._clients)))

    async def take(self, message: Refit, attach: Attach, seconds: float) -> None:
        """Give every server the same weights; those that were lost are attached first. A server that does not take
        them is left out, so that all which go on hold the same version.

        Raises ServerGone or ServerRefused, the first server's reason, when none took them.
        """
        took = await asyncio.gather(*(self._take(client, message, attach, seconds) for client in self._clients))
        if not self.alive:
            raise next(error for error in took if error is not None)

    async def _take(self, client: Client, message: Refit, attach: Attach, seconds: float) -> Exception | None:
        try:
            if client in self._lost:
                await client.attach(attach, seconds)
            await client.refit(message, seconds)
        except (ServerGone, ServerRefused) as error:
            if client not in self._lost:
                log.error("a server is left out: %s", error)
            self._lost.add(client)
            return error
        if client in self._lost:
            self._lost.remove(client)
            log.info("%s is back, with policy version %d", client.url, message.version)
        return None

    async def write(
        self,
        session: str,
        sampling: WireSampling,
        eos_ids: tuple[int, ...],
        requests: Sequence[WireRequest],
        tell: Tell,
    ) -> None:
        """Every request once, as they finish. Cancelling it makes the servers drop what is not finished.

        Raises ServerGone when no server is left, ServerRefused when one will not write.
        """
        waiting = deque(requests)
        while waiting:
            servers = self.alive
            if not servers:
                raise ServerGone("no server is left to write")
            share = -(-len(waiting) // len(servers))
            first = [[waiting.popleft() for _ in range(min(share, self._slots, len(waiting)))] for _ in servers]
            async with asyncio.TaskGroup() as group:
                for client, portion in zip(servers, first, strict=True):
                    hand = _Hand(client, Generate(session, sampling, eos_ids, ()), waiting, tell, self._slots)
                    group.create_task(self._keep_busy(hand, portion))

    async def close(self) -> None:
        await asyncio.gather(*(client.close() for client in self._clients))

    async def _keep_busy(self, hand: _Hand, portion: list[WireRequest]) -> None:
        try:
            await hand.work(portion)
        except* ServerGone as errors:
            self._lost.add(hand.client)
            self.resent += len(hand.open)
            hand.waiting.extendleft(reversed(hand.open.values()))
            log.error("a server is left out, its %d requests go to others: %s", len(hand.open), errors.exceptions[0])


class _Hand:
    """One server's share of a call: its unfinished requests, and how it gets more."""

    def __init__(self, client: Client, form: Generate, waiting: deque[WireRequest], tell: Tell, slots: int) -> None:
        self.client, self.waiting = client, waiting
        self.open: dict[int, WireRequest] = {}
        self._form, self._tell, self._slots = form, tell, slots

    async def work(self, portion: list[WireRequest]) -> None:
        async with asyncio.TaskGroup() as group:
            self._send(portion, group)

    def _send(self, portion: list[WireRequest], group: asyncio.TaskGroup) -> None:
        if portion:
            self.open.update({request.key: request for request in portion})
            group.create_task(self._read(portion, group))

    async def _read(self, portion: list[WireRequest], group: asyncio.TaskGroup) -> None:
        form = self._form
        message = Generate(form.session, form.sampling, form.eos_ids, tuple(portion))
        async for line in self.client.generate(message):
            if self.open.pop(line["key"], None) is not None:
                self._tell(line)
            free = self._slots - len(self.open)
            if self.waiting and free >= max(1, self._slots // _REFILL_SHARE):
                self._send([self.waiting.popleft() for _ in range(min(free, len(self.waiting)))], group)
        missing = [request.key for request in portion if request.key in self.open]
        if missing:
            raise ServerGone(f"{self.client.url}: it left {len(missing)} requests without an answer")
