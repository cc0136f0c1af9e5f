"""Several servers as one: requests are dealt out to whichever has least to do, and survive the loss of a server."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_opd.engines.vllm.client import CONNECT_SECONDS, ServerGone, ServerRefused
from nemo_opd.engines.vllm.client import Client as OwnClient
from nemo_opd.engines.vllm.stock import StockClient
from nemo_opd.engines.vllm.wire import Attach, Attached, Form, Refit, Sleep, Transfer

log = logging.getLogger(__name__)

Client = OwnClient | StockClient

Tell = Callable[[dict[str, Any]], None]
"""Told of each line about a request, from the event loop's thread."""

SENDINGS = 3
"""A request that was lost with so many servers is not sent again: it may be what they die of."""
_REFILL_SHARE = 8
"""A server gets more once 1/8 of its slots is free: each portion is an HTTP request of its own."""


@dataclass(frozen=True)
class Return:
    """How lost servers come back: they are attached again, at first after `first` seconds, then after ever twice as
    many, at most `longest`. Where none is left, `patience` seconds are spent on it."""

    attach: Attach
    first: float = 1.0
    longest: float = 60.0
    patience: float = 60.0


@dataclass(frozen=True)
class _Loss:
    again: float
    """The loop's time at which it is tried again."""
    wait: float


class Pool:
    """Belongs to one event loop. A server that was lost is asked for nothing until it is back."""

    def __init__(self, clients: Sequence[Client], slots: int, comeback: Return | None = None) -> None:
        """
        Args:
            slots: requests that one server is given at a time.
            comeback: of lost servers; None: only `take` brings them back, since they lack the weights.
        """
        self._clients, self._slots, self._return = tuple(clients), slots, comeback
        self._known: dict[Client, Attached] = {}
        self._lost: dict[Client, _Loss] = {}
        self._tries: dict[Client, asyncio.Task[None]] = {}
        """Of lost servers that are being attached again."""
        self._hands: set[_Hand] = set()
        """Of all calls that are under way."""
        self.resent = 0
        """Requests that were sent again because their server was lost."""

    @property
    def alive(self) -> list[Client]:
        return [client for client in self._clients if client not in self._lost]

    async def attach(self, message: Attach, seconds: float) -> list[Attached]:
        """All servers. Raises ServerGone, ServerRefused for the first that cannot be had."""
        found = await asyncio.gather(*(client.attach(message, seconds) for client in self._clients))
        self._known = dict(zip(self._clients, found, strict=True))
        return list(found)

    async def take(self, message: Refit, attach: Attach, seconds: float) -> None:
        """Give every server the same weights; those that were lost are attached first. A server that does not take
        them is left out, so that all which go on hold the same version: what it is writing, others write again.

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
            self._lose(client)
            return error
        if client in self._lost:
            del self._lost[client]
            log.info("%s is back, with policy version %d", client.url, message.version)
        return None

    async def recover(self, attach: Attach, seconds: float) -> None:
        """Attach those that were lost and are there again; they have no weights of the session yet."""
        lost = list(self._lost)
        found = await asyncio.gather(*(self._attached(client, attach, seconds) for client in lost))
        for client, answer in zip(lost, found, strict=True):
            if answer is not None:
                del self._lost[client]
                self._known[client] = answer
                log.info("%s is back", client.url)

    async def _attached(self, client: Client, attach: Attach, seconds: float) -> Attached | None:
        try:
            return await client.attach(attach, seconds)
        except (ServerGone, ServerRefused):
            return None

    def known(self, client: Client) -> Attached:
        """What it said when it was attached."""
        return self._known[client]

    async def transfer(
        self, session: str, version: int, action: str, infos: Sequence[Mapping[str, Any]] | None, seconds: float
    ) -> None:
        """A step of a transfer on every server that is alive. `infos`: one of each of them, or one for all.

        Raises ServerGone, ServerRefused for the first that did not take it; those are lost.
        """
        alive = self.alive
        every = infos if infos is not None and len(infos) == len(alive) else list(infos or [{}]) * len(alive)
        messages = [Transfer(session, version, action, info) for info in every]
        calls = (client.transfer(message, seconds) for client, message in zip(alive, messages, strict=True))
        found = await asyncio.gather(*calls, return_exceptions=True)
        self._lose_failed(alive, found)

    async def sleep(self, message: Sleep, seconds: float) -> None:
        """Every server that is alive gives its memory up. Raises as `transfer`."""
        alive = self.alive
        found = await asyncio.gather(*(client.sleep(message, seconds) for client in alive), return_exceptions=True)
        self._lose_failed(alive, found)

    def _lose_failed(self, clients: Sequence[Client], found: Sequence[BaseException | None]) -> None:
        failed = [(client, error) for client, error in zip(clients, found, strict=True) if error is not None]
        for client, error in failed:
            log.error("a server is left out: %s", error)
            self._lose(client)
        if failed:
            raise failed[0][1]

    async def ask(self, form: Form, tell: Tell, patient: bool = True) -> None:
        """Every request of `form` is answered once, in the order in which they finish. Cancelling it makes the servers
        drop what is not finished.

        Raises ServerGone when no server is left (and, if `patient`, none has come back), ServerRefused when one will
        not do it.
        """
        waiting, sendings = deque(form.requests), Counter[int]()
        while waiting:
            servers = sorted(await self._to_ask(patient), key=self._load)
            share = -(-len(waiting) // len(servers))
            async with asyncio.TaskGroup() as group:
                for client in servers:
                    first = [waiting.popleft() for _ in range(min(share, self._slots, len(waiting)))]
                    hand = _Hand(client, form, first, waiting, tell, self._slots, self._lost)
                    self._hands.add(hand)
                    group.create_task(self._keep_busy(hand, sendings))

    def _load(self, client: Client) -> int:
        return sum(len(hand.open) for hand in self._hands if hand.client is client)

    async def _to_ask(self, patient: bool) -> list[Client]:
        """The servers that are alive; lost ones are tried again meanwhile. Raises ServerGone when none comes back."""
        time = asyncio.get_running_loop().time
        end = time() + (self._return.patience if self._return and patient else 0.0)
        while True:
            if self._return is not None:
                for client, loss in self._lost.items():
                    if loss.again <= time() and client not in self._tries:
                        self._tries[client] = asyncio.create_task(self._try_again(client, self._return.attach))
            if self.alive:
                return self.alive
            if self._return is None or time() >= end:
                raise ServerGone(f"no server is left of {len(self._clients)}")
            if self._tries:
                await asyncio.wait(self._tries.values(), return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(max(0.0, min(end, *(loss.again for loss in self._lost.values())) - time()))

    async def _try_again(self, client: Client, attach: Attach) -> None:
        try:
            found = await client.attach(attach, CONNECT_SECONDS)
        except (ServerGone, ServerRefused):
            self._lose(client)
        else:
            if found == self._known.get(client, found):
                del self._lost[client]
                log.info("%s is back", client.url)
            else:
                log.error("%s is another server than it was: %s", client.url, found)
                self._lose(client)
        finally:
            del self._tries[client]

    def _lose(self, client: Client) -> None:
        loss, rule = self._lost.get(client), self._return
        wait = 0.0 if rule is None else rule.first if loss is None else min(2 * loss.wait, rule.longest)
        self._lost[client] = _Loss(asyncio.get_running_loop().time() + wait, wait)

    async def close(self) -> None:
        for attempt in self._tries.values():
            attempt.cancel()
        await asyncio.gather(*(client.close() for client in self._clients))

    async def _keep_busy(self, hand: _Hand, sendings: Counter[int]) -> None:
        try:
            await hand.work()
        except* ServerGone as errors:
            reason = errors.exceptions[0]
            log.error("a server is left out, its %d requests go to others: %s", len(hand.open), reason)
            if hand.client not in self._lost:  # one loss, however many calls notice it
                self._lose(hand.client)
            sendings.update(list(hand.open))
            for request in reversed(hand.open.values()):
                if sendings[request.key] < SENDINGS:
                    hand.waiting.appendleft(request)
                    self.resent += 1
                else:
                    hand.tell({"key": request.key, "error": f"{SENDINGS} servers were lost with it: {reason}"})
        finally:
            self._hands.discard(hand)


class _Hand:
    """One server's share of a call: its unfinished requests, and how it gets more."""

    def __init__(
        self,
        client: Client,
        form: Form,
        first: Sequence[Any],
        waiting: deque[Any],
        tell: Tell,
        slots: int,
        lost: Container[Client],
    ) -> None:
        """`first`: the requests that it begins with; more come from `waiting`."""
        self.client, self.waiting, self.tell = client, waiting, tell
        self.open: dict[int, Any] = {request.key: request for request in first}
        self._form, self._slots, self._lost = form, slots, lost

    async def work(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._send(list(self.open.values()), group)

    def _send(self, portion: list[Any], group: asyncio.TaskGroup) -> None:
        if portion:
            self.open.update({request.key: request for request in portion})
            group.create_task(self._read(portion, group))

    async def _read(self, portion: list[Any], group: asyncio.TaskGroup) -> None:
        async for line in self.client.ask(replace(self._form, requests=tuple(portion))):
            if self.client in self._lost:  # left out meanwhile: it may lack the weights that the others have
                raise ServerGone(f"{self.client.url}: it answers, but was left out")
            if self.open.pop(line["key"], None) is not None:
                self.tell(line)
            free = self._slots - len(self.open)
            if self.waiting and free >= max(1, self._slots // _REFILL_SHARE):
                self._send([self.waiting.popleft() for _ in range(min(free, len(self.waiting)))], group)
        missing = [request.key for request in portion if request.key in self.open]
        if missing:
            raise ServerGone(f"{self.client.url}: it left {len(missing)} requests without an answer")
