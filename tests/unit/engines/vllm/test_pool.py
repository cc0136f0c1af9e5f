"""How requests are dealt out: with stand-ins for servers, since real ones die when they like (tests/reliability)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from nemo_opd.engines.vllm.client import ServerGone, ServerRefused
from nemo_opd.engines.vllm.pool import Pool, Return
from nemo_opd.engines.vllm.wire import Attach, Attached, Generate, Refit, WireRequest, WireSampling

SAMPLING = WireSampling(1.0, 1.0, 0, False)


class Server:
    """Answers a request after `delay` turns of the event loop; dies after `lives` answers."""

    def __init__(self, url: str, delay: int = 1, lives: float = float("inf")) -> None:
        self.url, self.delay, self.lives = url, delay, lives
        self.portions: list[list[int]] = []
        self.attached = self.version = -1
        self.running = self.most = 0

    async def attach(self, message: Attach, seconds: float) -> Any:
        self._alive()
        self.attached = int(message.session)

    async def refit(self, message: Refit, seconds: float) -> None:
        self._alive()
        self.version = message.version

    async def ask(self, message: Generate) -> AsyncIterator[dict[str, Any]]:
        self.portions.append([request.key for request in message.requests])
        self.running += len(message.requests)
        self.most = max(self.most, self.running)
        for request in message.requests:
            for _ in range(self.delay):
                await asyncio.sleep(0)
            self._alive()
            self.lives -= 1
            self.running -= 1
            yield {"key": request.key, "by": self.url}

    async def close(self) -> None:
        pass

    def _alive(self) -> None:
        if self.lives <= 0:
            raise ServerGone(f"{self.url}: dead")


def requests(count: int) -> list[WireRequest]:
    return [WireRequest(key, (1, 2), (), key, 4) for key in range(count)]


def write(pool: Pool, count: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    asyncio.run(pool.ask(Generate(tuple(requests(count)), "0", SAMPLING, ()), lines.append))
    return lines


def pool_of(*servers: Server, slots: int = 8) -> Pool:
    return Pool(servers, slots)  # type: ignore[arg-type]


def test_every_request_once_and_no_server_beyond_its_slots() -> None:
    fast, slow = Server("fast"), Server("slow", delay=5)
    lines = write(pool_of(fast, slow), 60)
    assert sorted(line["key"] for line in lines) == list(range(60))
    assert max(fast.most, slow.most) <= 8
    by = [line["by"] for line in lines]
    assert by.count("fast") > 2 * by.count("slow"), "whoever has least to do gets more"


def test_few_requests_are_spread_and_neighbours_stay_together() -> None:
    """Samples of one prompt are neighbours: one server then has the prompt's keys and values already."""
    one, other = Server("one"), Server("other")
    write(pool_of(one, other, slots=64), 10)
    assert (one.portions, other.portions) == ([[0, 1, 2, 3, 4]], [[5, 6, 7, 8, 9]])


def test_calls_of_one_request_each_go_to_whoever_has_least_to_do() -> None:
    servers = [Server(name, delay=3) for name in ("a", "b", "c")]
    pool, lines = pool_of(*servers), []  # type: Pool, list[dict[str, Any]]

    async def play() -> None:
        forms = [Generate((request,), "0", SAMPLING, ()) for request in requests(9)]
        await asyncio.gather(*(pool.ask(form, lines.append) for form in forms))

    asyncio.run(play())
    assert sorted(line["key"] for line in lines) == list(range(9))
    assert [sorted(server.portions) for server in servers] == [[[0], [3], [6]], [[1], [4], [7]], [[2], [5], [8]]]


def test_what_a_lost_server_did_not_answer_goes_to_the_others() -> None:
    pool = pool_of(Server("dying", lives=3), Server("other"))
    lines = write(pool, 40)
    assert sorted(line["key"] for line in lines) == list(range(40))
    assert [line["by"] for line in lines].count("dying") == 3
    assert pool.resent > 0
    assert [server.url for server in pool.alive] == ["other"]
    write(pool, 4)  # and goes on without it


def test_no_server_left() -> None:
    with pytest.raises(ServerGone, match="no server is left"):
        write(pool_of(Server("a", lives=3), Server("b", lives=2)), 40)


def test_a_lost_server_returns_with_the_next_weights() -> None:
    dying, other = Server("dying", lives=1), Server("other")
    pool = pool_of(dying, other)
    write(pool, 10)

    def take(version: int) -> None:
        asyncio.run(pool.take(Refit("7", version, "folder"), Attach("7", False), 1.0))

    take(1)
    assert (dying.version, other.version) == (-1, 1)
    dying.lives = float("inf")
    take(2)
    assert (dying.version, dying.attached, other.version, other.attached) == (2, 7, 2, -1)
    assert len(pool.alive) == 2
    dying.lives = other.lives = 0
    with pytest.raises(ServerGone):
        take(3)


def test_what_a_server_that_missed_the_weights_goes_on_writing_is_written_again() -> None:
    """It refuses the new weights in the middle of a call, and answers as before."""

    class Deaf(Server):
        async def refit(self, message: Refit, seconds: float) -> None:
            raise ServerRefused(self.url, 400, "damaged")

    deaf, other = Deaf("deaf"), Server("other")
    pool, lines = pool_of(deaf, other), []  # type: Pool, list[dict[str, Any]]

    async def play() -> None:
        async def refit_after(count: int) -> None:
            while len(lines) < count:
                await asyncio.sleep(0)
            await pool.take(Refit("0", 1, "folder"), Attach("0", False), 1.0)
            lines.append({"by": "the refit"})

        call = pool.ask(Generate(tuple(requests(40)), "0", SAMPLING, ()), lines.append)
        await asyncio.gather(call, refit_after(10))

    asyncio.run(play())
    by = [line["by"] for line in lines]
    at = by.index("the refit")
    assert "deaf" in by[:at] and "deaf" not in by[at:]
    assert sorted(line["key"] for line in lines if "key" in line) == list(range(40))
    assert pool.resent > 0 and [server.url for server in pool.alive] == ["other"]


def test_a_refusal_is_not_a_loss() -> None:
    class Refusing(Server):
        async def ask(self, message: Generate) -> AsyncIterator[dict[str, Any]]:
            raise ServerRefused(self.url, 409, "another session")
            yield {}

    with pytest.raises(BaseExceptionGroup) as caught:
        write(pool_of(Refusing("a")), 4)
    assert caught.group_contains(ServerRefused)


class Returning(Server):
    """Lives again once it was asked `deaf` times whether it does."""

    def __init__(self, url: str, lives: float, deaf: int, then: str = "as it was") -> None:
        super().__init__(url, lives=lives)
        self.deaf, self.tries, self.then = deaf, 0, then

    async def attach(self, message: Attach, seconds: float) -> Attached:
        self.tries += self.lives <= 0
        if self.tries > self.deaf:
            self.lives = float("inf")
        self._alive()
        return Attached("teacher", self.then if self.tries else "as it was", 9, 9, True, 99, 8, "")


ATTACH = Attach("0", False)


def answered_after(*servers: Server, patience: float, longest: float = 0.04) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []

    async def call() -> None:
        pool = Pool(servers, 8, Return(ATTACH, first=0.01, longest=longest, patience=patience))  # type: ignore[arg-type]
        await pool.attach(ATTACH, 1.0)
        try:
            await pool.ask(Generate(tuple(requests(20)), "0", SAMPLING, ()), lines.append)
        finally:
            await pool.close()

    asyncio.run(call())
    return lines


def test_the_last_server_is_waited_for() -> None:
    returning = Returning("a", lives=3, deaf=4)
    assert sorted(line["key"] for line in answered_after(returning, patience=10.0)) == list(range(20))
    assert returning.tries == 5
    lines: list[dict[str, Any]] = []
    with pytest.raises(ServerGone, match="no server is left of 1"):
        lines = answered_after(Returning("a", lives=3, deaf=10**6), patience=0.2)
    assert lines == []


def test_calls_that_lose_a_server_together_have_lost_it_once() -> None:
    """It is tried again after the first wait, not after one that doubled with each call."""
    returning, lines = Returning("a", lives=3, deaf=0), []  # type: Returning, list[dict[str, Any]]

    async def play() -> None:
        rule = Return(ATTACH, first=0.01, longest=1000.0, patience=20.0)
        pool = Pool((returning,), 8, rule)  # type: ignore[arg-type]
        await pool.attach(ATTACH, 1.0)
        forms = [Generate((request,), "0", SAMPLING, ()) for request in requests(40)]
        await asyncio.gather(*(pool.ask(form, lines.append) for form in forms))
        await pool.close()

    asyncio.run(play())
    assert sorted(line["key"] for line in lines) == list(range(40))


def test_a_server_that_returns_as_another_is_not_asked() -> None:
    with pytest.raises(ServerGone, match="no server is left of 1"):
        answered_after(Returning("a", lives=3, deaf=1, then="another"), patience=0.2)


def test_nobody_waits_for_a_lost_server_while_others_live() -> None:
    class Hanging(Returning):
        async def attach(self, message: Attach, seconds: float) -> Attached:
            if self.lives <= 0:
                await asyncio.sleep(60)
            return await super().attach(message, seconds)

    lines = answered_after(Hanging("hanging", lives=3, deaf=0), Server("other"), patience=60.0)
    assert [line["by"] for line in lines].count("other") == 17
