"""A stock vLLM server as its clients see it: vLLM's own HTTP server (``vllm serve``), named by address.

It speaks to `Pool` as `Client` does. What our own server has and this one has not is made up for where that can be:

    sessions   the server's *weight version* names the session and the policy version; it is read again after each
               answer, so a server that was started again, or given weights by somebody else, is found out
    a beat     ``GET /metrics`` while something is under way: counted tokens are the engine's progress
    weights    vLLM's management routes, which a server has when it is started with VLLM_SERVER_DEV_MODE=1

A server without these routes can be asked for scores, and to write with the weights that it was started with.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx

from nemo_opd.engines.vllm import stock_words as words
from nemo_opd.engines.vllm.client import CONNECT_SECONDS, Progress, ServerGone, ServerRefused
from nemo_opd.engines.vllm.identity import weights_id
from nemo_opd.engines.vllm.settings import WRITER
from nemo_opd.engines.vllm.wire import (
    BEAT_SECONDS,
    Attach,
    Attached,
    Form,
    Generate,
    Refit,
    Score,
    Sleep,
    Transfer,
    WireRequest,
    WireScore,
)
from nemo_opd.types import Need

Line = dict[str, Any]
Result = TypeVar("Result")

_OWN_WEIGHTS = "default"
"""vLLM's name for the weights that a server was started with."""
_NONE_YET, _LOADING = "none", "loading"
_KEEP_SECONDS = 2.0
"""Of an idle connection: vLLM drops one after 5 s, and a request must not meet that."""
_COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")


@dataclass(frozen=True)
class Stock:
    """What is to be known of stock servers besides their addresses, as they do not say it themselves."""

    model: Path
    """The folder that the recipe names; its config.json has the vocabulary."""
    role: str
    """What they are asked to do: writer or teacher."""


@dataclass(frozen=True)
class _About:
    name: str
    root: str
    """What it was started with: a folder, or a name."""
    positions: int
    processed: bool
    """Log-probabilities are of what was drawn from; otherwise of the model's own distribution."""


class StockClient:
    """One server. Its methods belong to one event loop. `Client` says what they raise."""

    def __init__(
        self,
        url: str,
        key: str | None,
        stuck_seconds: float,
        silence_seconds: float,
        stock: Stock,
        weights_dir: Path,
    ) -> None:
        """`weights_dir`: where `refit` finds sets of weights, as the server sees it too."""
        self.url, self._stuck_seconds = url.rstrip("/"), stuck_seconds
        self._stock, self._weights_dir = stock, weights_dir
        sizes = json.loads((stock.model / "config.json").read_text(encoding="utf-8"))
        self._vocab_size = int(sizes["vocab_size"])
        self._silence = silence_seconds
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={} if key is None else {"authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(self._silence, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_SECONDS),
            trust_env=False,
        )
        self._known: _About | None = None
        self._counting = asyncio.Lock()
        self._counted = (-BEAT_SECONDS, 0)
        """When, and what."""

    async def attach(self, message: Attach, seconds: float) -> Attached:
        """Asks the server for a token, so that one which cannot do what it will be asked for is refused now."""
        self._known = None
        if self._stock.role == WRITER and await self._weight_version() is not None:
            await self._call("POST", "/resume")  # a trainer that was killed while weights moved left it paused
        about, vllm = await self._about(), str((await self._call("GET", "/version")).get("version"))
        if self._stock.role == WRITER:
            await self._begin_session(message, about, seconds)
        elif not _are_own(await self._weight_version()):
            reason = "it was given other weights than those it was started with; start it again"
            raise ServerRefused(self.url, httpx.codes.CONFLICT, reason)
        folder = Path(about.root) if Path(about.root).is_dir() else self._stock.model
        return Attached(
            role=self._stock.role,
            weights=weights_id(folder),
            vocab_size=self._vocab_size,
            scored_ids=self._vocab_size,
            at_ids=False,
            positions=about.positions,
            max_running=0,
            vllm=vllm,
        )

    async def _begin_session(self, message: Attach, about: _About, seconds: float) -> None:
        current = await self._weight_version()
        if current is None:
            if not message.reload:
                raise ServerRefused(
                    self.url,
                    httpx.codes.NOT_FOUND,
                    "a stock vLLM server without management routes: it cannot take the weights of a student that is "
                    "trained; start it with VLLM_SERVER_DEV_MODE=1, or a server of nemo_opd (protocol own)",
                )
            return
        if message.reload and not _are_own(current):
            await self._load(message.session, -1, about.root, seconds)
        else:
            await self._set_version(message.session, -1 if message.reload else _NONE_YET)

    async def refit(self, message: Refit, seconds: float) -> None:
        """Nothing must be under way: what is, the server breaks off."""
        version = await self._session_version(message.session, loading=True)
        if version is None:
            reason = "it has no management routes, by which it could take weights"
            raise ServerRefused(self.url, httpx.codes.NOT_FOUND, reason)
        if message.version <= version:
            reason = f"policy version: got {message.version} after {version}; expected a larger one"
            raise ServerRefused(self.url, httpx.codes.CONFLICT, reason)
        await self._load(message.session, message.version, str(self._weights_dir.absolute() / message.name), seconds)

    async def _load(self, session: str, version: int, folder: str, seconds: float) -> None:
        """Between pause and resume; where it fails the weight version says that nobody knows what the server holds."""
        await self._call("POST", "/pause", params={"mode": "abort"}, seconds=seconds)
        await self._set_version(session, _LOADING)
        load = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        await self._call("POST", "/collective_rpc", values=load, seconds=seconds)
        reset = await self._call("POST", "/reset_prefix_cache", params={"reset_running_requests": "true"})
        if reset.get("success") is not True:
            raise ServerGone(f"{self.url}: keys and values of the old weights could not be dropped")
        await self._set_version(session, version)
        await self._call("POST", "/resume")

    async def transfer(self, message: Transfer, seconds: float) -> None:
        """Raises ServerRefused: a stock server takes weights from a folder only."""
        raise ServerRefused(self.url, httpx.codes.NOT_FOUND, f"a stock vLLM server: no transfer ({message.action})")

    async def sleep(self, message: Sleep, seconds: float) -> None:
        """Raises ServerRefused: a stock server is not colocated."""
        raise ServerRefused(self.url, httpx.codes.NOT_FOUND, "a stock vLLM server: it keeps its memory")

    async def ask(self, message: Form) -> AsyncIterator[Line]:
        """A line for each request as it finishes. Leaving early makes the server drop the rest.

        Each request is an HTTP request of its own. Raises ServerGone also for a server that has not the weights which
        it was given, ServerRefused also for an answer without what was asked for.
        """
        ask_one = await self._asking(message)
        open_ = {asyncio.create_task(ask_one(request)) for request in message.requests}
        watch = asyncio.create_task(self._watch())
        try:
            while open_:
                done, _ = await asyncio.wait({*open_, watch}, return_when=asyncio.FIRST_COMPLETED)
                if watch in done:
                    watch.result()
                finished = [task for task in open_ if task in done]
                open_.difference_update(finished)
                for task in finished:
                    yield task.result()
        finally:
            for left in {*open_, watch}:
                left.cancel()
            await asyncio.gather(*open_, watch, return_exceptions=True)

    async def _asking(self, message: Form) -> Callable[[Any], Coroutine[Any, Any, Line]]:
        """How one request of `message` is asked for."""
        if isinstance(message, Generate):
            # First, as a server that was left paused with half a set of weights answers nothing else.
            version = await self._session_version(message.session)
            about = await self._about()
            self._check(message, about)
            return partial(self._write, message, about.name, version)
        assert isinstance(message, Score)
        about = await self._about()
        need = self._understood(lambda: words.need_of(message.need))
        return partial(self._score, need, message.k, about.name)

    def _check(self, message: Generate, about: _About) -> None:
        sampling = message.sampling
        if message.best:
            reason = "a stock vLLM server is not asked for the student's best ids; use a server of nemo_opd"
            raise ServerRefused(self.url, httpx.codes.BAD_REQUEST, reason)
        if not (about.processed or sampling.greedy or sampling == words.PLAIN):
            raise ServerRefused(
                self.url,
                httpx.codes.BAD_REQUEST,
                "it reports log-probabilities of the model's own distribution; expected those of what is drawn from, "
                f"with {sampling}; start it with --logprobs-mode processed_logprobs, or set temperature 1, top_p 1 and "
                "top_k 0",
            )

    async def _write(self, message: Generate, name: str, version: int | None, request: WireRequest) -> Line:
        answer = await self._completed(words.generation(request, message.sampling, message.eos_ids, name))
        if isinstance(answer, str):
            return {"key": request.key, "error": answer}
        if await self._session_version(message.session) != version:
            raise ServerGone(f"{self.url}: it was given other weights meanwhile")
        number = -1 if version is None else version
        written = self._understood(lambda: words.written(request, message.eos_ids, number, answer))
        return {**written.to_dict(), "ids": list(written.ids)}  # as if it had come as JSON

    async def _score(self, need: Need, k: int, name: str, request: WireScore) -> Line:
        answer = await self._completed(words.scoring(request, need, k, name))
        if isinstance(answer, str):
            return {"key": request.key, "error": answer}
        return self._understood(lambda: words.scored(request, need, k, answer)).to_dict()

    async def _completed(self, body: words.Body, seconds: float | None = None) -> Line | str:
        """The answer; or why this request came to nothing, though the server lives. Without `seconds` it may take as
        long as it likes: `_watch` sees whether anything moves."""
        try:
            response = await self._http.post(
                "/v1/completions", json=body, timeout=httpx.Timeout(seconds, connect=CONNECT_SECONDS)
            )
        except httpx.HTTPError as error:
            raise self._gone(error) from error
        if response.status_code == httpx.codes.INTERNAL_SERVER_ERROR and await self._lives():
            return f"{self.url}: {_reason(response)}"
        return self._answer(response)

    async def _lives(self) -> bool:
        try:
            return (await self._http.get("/health")).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _understood(self, read: Callable[[], Result]) -> Result:
        try:
            return read()
        except words.Aborted as error:
            raise ServerGone(f"{self.url}: {error}") from error
        except words.BadAnswer as error:
            raise ServerRefused(self.url, httpx.codes.OK, f"a stock vLLM server: got {error}") from error

    async def _watch(self) -> None:
        """Ends, with ServerGone, when the server says nothing or its engine gets nowhere."""
        progress = Progress(self._stuck_seconds)
        while not progress.stuck(await self._count()):
            await asyncio.sleep(BEAT_SECONDS)
        raise ServerGone(f"{self.url}: its engine made no token for {self._stuck_seconds:g} s")

    async def _count(self) -> int:
        """Tokens that the engine has read and written; 0 where the server does not tell. Once a beat for all calls."""
        time = asyncio.get_running_loop().time
        async with self._counting:
            if time() - self._counted[0] >= BEAT_SECONDS / 2:
                try:
                    text = (await self._http.get("/metrics")).text
                except httpx.HTTPError as error:
                    raise self._gone(error) from error
                lines = (line.rsplit(" ", 1)[-1] for line in text.splitlines() if line.startswith(_COUNTERS))
                self._counted = (time(), int(sum(map(float, lines))))
        return self._counted[1]

    async def _about(self) -> _About:
        """Asked once, and again with each `attach`."""
        if self._known is None:
            listed = (await self._call("GET", "/v1/models")).get("data")
            cards = [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []
            card = next((card for card in cards if card.get("parent") is None), None)
            if card is None or not isinstance(card.get("max_model_len"), int):
                raise ServerRefused(self.url, httpx.codes.OK, f"got models {str(listed)[:80]}; expected vLLM's list")
            answer = await self._completed(words.trial(str(card["id"]), self._vocab_size), self._stuck_seconds)
            if isinstance(answer, str):
                raise ServerRefused(self.url, httpx.codes.INTERNAL_SERVER_ERROR, answer)
            processed = self._understood(lambda: words.reports_processed(answer))
            self._known = _About(str(card["id"]), str(card.get("root")), card["max_model_len"], processed)
        return self._known

    async def _weight_version(self) -> str | None:
        """None where the server has no management routes."""
        try:
            return str((await self._call("GET", "/weight_info"))["weight_version"])
        except ServerRefused as error:
            if error.status == httpx.codes.NOT_FOUND:
                return None
            raise

    async def _set_version(self, session: str, version: int | str) -> None:
        await self._call("POST", "/update_weight_version", values={"new_version": f"{session}:{version}"})

    async def _session_version(self, session: str, loading: bool = False) -> int | None:
        """The policy version that the server holds; None where nobody can change its weights. `loading`: -2 where there
        is no whole set of weights, otherwise that is ServerGone."""
        text = await self._weight_version()
        if text is None:
            return None
        owner, _, version = text.rpartition(":")
        if text == _OWN_WEIGHTS:
            raise ServerGone(f"{self.url}: it was started again, with weights of its own")
        if owner != session:
            raise ServerRefused(self.url, httpx.codes.CONFLICT, "another session has this server; attach first")
        if version not in (_NONE_YET, _LOADING):
            return int(version)
        if not loading:
            raise ServerGone(f"{self.url}: it has no whole set of weights ({version})")
        return -2

    async def _call(
        self,
        method: str,
        path: str,
        *,
        values: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        seconds: float | None = None,
    ) -> Line:
        try:
            response = await self._http.request(
                method, path, json=values, params=params, timeout=self._silence if seconds is None else seconds
            )
        except httpx.HTTPError as error:
            raise self._gone(error) from error
        return self._answer(response)

    def _answer(self, response: httpx.Response) -> Line:
        status = response.status_code
        if status >= httpx.codes.INTERNAL_SERVER_ERROR:
            raise ServerGone(f"{self.url}: {_reason(response)}")
        if status != httpx.codes.OK:
            raise ServerRefused(self.url, status, _reason(response))
        try:
            values = response.json()
        except ValueError as error:
            raise self._gone(error) from error
        return values if isinstance(values, dict) else {}

    def _gone(self, error: Exception) -> ServerGone:
        return ServerGone(f"{self.url}: {type(error).__name__}: {error}")

    async def close(self) -> None:
        """Let go of the server."""
        await self._http.aclose()


def _are_own(weight_version: str | None) -> bool:
    """Are they the weights that the server was started with?"""
    return weight_version in (None, _OWN_WEIGHTS) or str(weight_version).endswith(":-1")


def _reason(response: httpx.Response) -> str:
    try:
        values = response.json()
    except ValueError:
        values = {}
    error = values.get("error", values.get("detail")) if isinstance(values, dict) else None
    text = error.get("message") if isinstance(error, dict) else error
    return f"HTTP {response.status_code}: {str(text or response.text)[:300]}"
