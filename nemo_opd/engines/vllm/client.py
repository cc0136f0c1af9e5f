"""A server as its clients see it: an address, a key, and how it is doing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from nemo_opd.engines.vllm.wire import BEAT_SECONDS, Attach, Attached, Form, Refit, Sleep, Transfer

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 30 * BEAT_SECONDS
"""A server that says nothing for so long is given up: one that works says something every second."""


class ServerGone(RuntimeError):
    """The server died, hangs, or cannot be reached: what was asked of it can be asked of another."""


class ServerRefused(RuntimeError):
    """The server answered that it will not do this; `status` is HTTP's."""

    def __init__(self, url: str, status: int, reason: str) -> None:
        super().__init__(f"{url}: {reason}")
        self.status = status


class Client:
    """One server. Its methods belong to one event loop."""

    def __init__(
        self, url: str, key: str | None, stuck_seconds: float, silence_seconds: float = SILENCE_SECONDS
    ) -> None:
        """`stuck_seconds`: a server whose engine makes no step for so long, while it has work, is given up."""
        self.url, self._stuck_seconds = url.rstrip("/"), stuck_seconds
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        timeout = httpx.Timeout(silence_seconds, connect=CONNECT_SECONDS)
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=timeout, limits=limits, trust_env=False
        )

    async def attach(self, message: Attach, seconds: float) -> Attached:
        """Waits as long as `seconds`: the server may load weights. Raises ServerGone, ServerRefused."""
        return Attached.read(await self._ask("/attach", message.to_dict(), seconds))

    async def refit(self, message: Refit, seconds: float) -> None:
        await self._ask("/refit", message.to_dict(), seconds)

    async def transfer(self, message: Transfer, seconds: float) -> None:
        await self._ask("/transfer", message.to_dict(), seconds)

    async def sleep(self, message: Sleep, seconds: float) -> None:
        await self._ask("/sleep", message.to_dict(), seconds)

    async def health(self) -> dict[str, Any]:
        try:
            return self._answer(await self._http.get("/health"))
        except httpx.HTTPError as error:
            raise ServerGone(f"{self.url}: {type(error).__name__}: {error}") from error

    async def _ask(self, path: str, values: dict[str, Any], seconds: float) -> dict[str, Any]:
        try:
            return self._answer(await self._http.post(path, json=values, timeout=seconds))
        except httpx.HTTPError as error:
            raise ServerGone(f"{self.url}: {type(error).__name__}: {error}") from error

    def _answer(self, response: httpx.Response) -> dict[str, Any]:
        try:
            values = response.json()
        except ValueError:
            values = {"error": response.text[:200]}
        if response.status_code == httpx.codes.INTERNAL_SERVER_ERROR:
            raise ServerGone(f"{self.url}: {values.get('error')}")
        if response.status_code != httpx.codes.OK:
            raise ServerRefused(self.url, response.status_code, str(values.get("error")))
        return dict(values)

    async def ask(self, message: Form) -> AsyncIterator[dict[str, Any]]:
        """The stream's lines that are about a request. Leaving early makes the server drop the rest.

        Raises ServerGone when the stream breaks off, nothing moves any more, or the server has no whole set of weights
        (503); ServerRefused for another answer.
        """
        progress = Progress(self._stuck_seconds)
        try:
            async with self._http.stream("POST", message.path, json=message.to_dict()) as response:
                if response.status_code != httpx.codes.OK:
                    await response.aread()
                    self._answer_or_gone(response)
                async for text in response.aiter_lines():
                    line = json.loads(text)
                    if "end" in line:
                        return
                    if "key" in line:
                        progress.moved()
                        yield line
                    elif progress.stuck(line["steps"]):
                        raise ServerGone(f"{self.url}: its engine made no step for {self._stuck_seconds:g} s")
        except (httpx.HTTPError, ValueError) as error:
            raise ServerGone(f"{self.url}: {type(error).__name__}: {error}") from error
        raise ServerGone(f"{self.url}: the answer broke off")

    def _answer_or_gone(self, response: httpx.Response) -> None:
        try:
            self._answer(response)
        except ServerRefused as error:
            if error.status == httpx.codes.SERVICE_UNAVAILABLE:
                raise ServerGone(str(error)) from error
            raise

    async def close(self) -> None:
        await self._http.aclose()


class Progress:
    """Of an engine that counts something: is it stuck?"""

    def __init__(self, stuck_seconds: float) -> None:
        self._limit, self._steps = stuck_seconds, -1
        self.moved()

    def moved(self) -> None:
        self._since = asyncio.get_running_loop().time()

    def stuck(self, steps: int) -> bool:
        if steps != self._steps:
            self._steps = steps
            self.moved()
        return asyncio.get_running_loop().time() - self._since > self._limit
