"""Servers for callers that are not asynchronous themselves."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nemo_opd.engines.vllm.client import SILENCE_SECONDS, Client
from nemo_opd.engines.vllm.pool import Pool, Return
from nemo_opd.engines.vllm.settings import DISK
from nemo_opd.engines.vllm.stock import Stock, StockClient
from nemo_opd.engines.vllm.wire import Attach, Attached, Form, Refit, Sleep
from nemo_opd.types import StopRequested

Result = TypeVar("Result")
Line = Mapping[str, Any]

EARLY_CALLS = 16
"""Calls of `Calls.begin` that are under way at a time, for each server: each holds a connection."""
_LOOK_SECONDS = 0.1
"""How often a stop request is looked for while nothing finishes."""


@dataclass(frozen=True)
class Servers:
    """Which servers are asked, and how they are spoken to."""

    urls: Sequence[str]
    session: str
    """Names this attempt of the run; the same in all its processes."""
    weights_dir: Path
    """Where sets of weights are written: the writers' own `weights_dir`, as this process sees it."""
    key: str | None = None
    slots: int = 64
    """Requests that one server is given at a time."""
    stuck_seconds: float = 300.0
    """A server whose engine makes no step for so long, while it has work, is given up."""
    load_seconds: float = 600.0
    """In which a server must have taken a set of weights."""
    silence_seconds: float = SILENCE_SECONDS
    """A server that says nothing for so long, not even that it is alive, is given up."""
    transport: str = DISK
    """How weights reach them; see `transport`."""
    sleep: bool = False
    """They share the trainer's GPUs, and give the memory up while it trains."""
    stock: Stock | None = None
    """They are stock vLLM servers; None: nemo_opd's own."""

    def client(self, url: str) -> Client | StockClient:
        """Of one of them, for the event loop that is running."""
        limits = (self.stuck_seconds, self.silence_seconds)
        if self.stock is None:
            return Client(url, self.key, *limits)
        return StockClient(url, self.key, *limits, self.stock, self.weights_dir)


class Calls:
    """A pool of servers in an event loop of its own, in a thread of its own."""

    def __init__(self, servers: Servers, comeback: Return | None = None) -> None:
        """Raises ValueError where there is no server. `comeback`: see `Pool`."""
        if not servers.urls:
            raise ValueError("servers: got none; expected at least one address")
        self._servers, self._comeback = servers, comeback
        self._early = asyncio.Semaphore(EARLY_CALLS * len(servers.urls))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-clients", daemon=True)
        self._thread.start()
        self._pool = self._run(self._make_pool())

    async def _make_pool(self) -> Pool:
        servers = self._servers
        return Pool([servers.client(url) for url in servers.urls], servers.slots, self._comeback)

    @property
    def resent(self) -> int:
        """Requests that were sent again because their server was lost."""
        return self._pool.resent

    def attach(self, message: Attach, role: str) -> dict[str, Attached]:
        """What each server says of itself. Raises ServerGone, ServerRefused, and ValueError for one of another role."""
        found = self._run(self._pool.attach(message, self._servers.load_seconds))
        for url, server in zip(self._servers.urls, found, strict=True):
            if server.role != role:
                raise ValueError(f"server {url}: got a {server.role}; expected a {role}; name another, or start one")
            if server.transport != self._servers.transport:
                raise ValueError(
                    f"server {url}: got one that takes weights by {server.transport}; expected "
                    f"{self._servers.transport}; set rollout.servers.transport={server.transport}, or start another"
                )
        return dict(zip(self._servers.urls, found, strict=True))

    def take(self, message: Refit, attach: Attach) -> None:
        """See `Pool.take`."""
        self._run(self._pool.take(message, attach, self._servers.load_seconds))

    def recover(self, attach: Attach) -> None:
        """See `Pool.recover`."""
        self._run(self._pool.recover(attach, self._servers.load_seconds))

    def alive(self) -> tuple[str, ...]:
        """Addresses of the servers that are not lost."""
        return tuple(client.url for client in self._pool.alive)

    def workers(self) -> list[int]:
        """Workers of each server that is not lost, in the order of `alive`."""
        return [self._pool.known(client).workers for client in self._pool.alive]

    def transfer(self, session: str, version: int, action: str, infos: Sequence[Mapping[str, Any]] | None) -> None:
        """See `Pool.transfer`."""
        self._run(self._pool.transfer(session, version, action, infos, self._servers.load_seconds))

    def sleep(self, session: str) -> None:
        """See `Pool.sleep`."""
        self._run(self._pool.sleep(Sleep(session), self._servers.load_seconds))

    def ask(self, form: Form, stop: StopRequested = lambda: False) -> Iterator[Line]:
        """See `Pool.ask`: the lines until all is answered or a stop is requested; leaving early drops the rest."""
        lines: queue.SimpleQueue[Line | Future[None]] = queue.SimpleQueue()
        work = asyncio.run_coroutine_threadsafe(self._pool.ask(form, lines.put), self._loop)
        work.add_done_callback(lines.put)  # comes after the last line, or with what went wrong
        try:
            yield from _until_done(lines, stop)
        finally:
            work.cancel()

    def begin(self, form: Form) -> Future[list[Line]]:
        """Ask without waiting: the future gets the lines, or what `ask` would raise, ServerGone at once when no server
        is left. Cancelling it drops the rest. From any thread."""
        return asyncio.run_coroutine_threadsafe(self._begun(form), self._loop)

    async def _begun(self, form: Form) -> list[Line]:
        lines: list[Line] = []
        async with self._early:
            try:
                await self._pool.ask(form, lines.append, patient=False)
            except ExceptionGroup as errors:
                raise _first(errors) from errors
        return lines

    def close(self) -> None:
        """Let go of the servers. Not to be called twice."""
        self._run(self._pool.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _until_done(lines: queue.SimpleQueue[Line | Future[None]], stop: StopRequested) -> Iterator[Line]:
    """Lines until the work is done or a stop is requested. Raises what the work raised."""
    while not stop():
        try:
            line = lines.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            continue
        if isinstance(line, Future):
            error = line.exception()
            if error is not None:
                raise _first(error)
            return
        yield line


def _first(error: BaseException) -> BaseException:
    """What went wrong in the first of several tasks."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
