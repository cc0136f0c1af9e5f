"""A writer: whose it is, which weights it holds, and whether it may write."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from nemo_opd.engines.vllm.engine import EngineThread
from nemo_opd.engines.vllm.receiver import Receiver
from nemo_opd.engines.vllm.sampler import draw_arguments, reported_ids, told
from nemo_opd.engines.vllm.served import Line, Served
from nemo_opd.engines.vllm.settings import DISK, ServerSettings
from nemo_opd.engines.vllm.wire import (
    BEAT_SECONDS,
    CONNECT,
    FINISH,
    START,
    Attach,
    Generate,
    Refit,
    Refused,
    Sleep,
    Transfer,
    WireRequest,
    Written,
    packed,
)
from nemo_opd.refit.folder import check_folder, tensor_shapes
from nemo_opd.types import Sampling
from nemo_opd.vocab.sampling import tells_its_own

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")


class Writer(Served):
    """Draws tokens with weights that a trainer gives it."""

    def __init__(self, settings: ServerSettings, engine: EngineThread) -> None:
        super().__init__(settings, engine)
        self.session, self.version, self.refusal = "", -1, ""
        self._expected = tensor_shapes(Path(settings.model))
        self._own_weights = True
        self._changing = asyncio.Lock()
        self._tokens = dict.fromkeys(("written", "read", "cached"), 0)
        self._settled = asyncio.Event()
        self._settled.set()
        self._receiver = Receiver(engine)
        self._asleep = False

    def health(self) -> dict[str, Any]:
        health = super().health()
        status = "refusing" if self.refusal and health["status"] == "ready" else health["status"]
        return {**health, "status": status, "version": self.version, "tokens": dict(self._tokens)}

    async def attach(self, message: Attach) -> None:
        """Give the server to a new session: what the one before asked for is dropped, versions begin again."""
        async with self._changing:
            self.session, self.version = message.session, -1
            await self._between_steps(lambda engine: self.engine.drop_all())
            if self.settings.transport != DISK:
                await self._between_steps(self._receiver.forget)
                self._settled.set()
            await self._wake()
            if self._own_weights:
                self.refusal = ""
            elif message.reload:
                await self._load(Path(self.settings.model), -1)
                self._own_weights = True
            else:
                self.refusal = "it has no weights of this session yet"

    def check_session(self, session: str) -> None:
        if session != self.session:
            raise Refused(409, "another session has this server; attach first")

    async def refit(self, message: Refit) -> None:
        """Take a set of weights. It is checked before the old one is touched: a folder that is refused changes nothing.

        Raises Refused: 409 for a version that does not grow, 400 for a folder that is not what it should be. When the
        engine fails half-way the server refuses to write until a complete refit.
        """
        async with self._changing:
            self.check_session(message.session)
            if message.version <= self.version:
                raise Refused(409, f"policy version: got {message.version} after {self.version}; expected a larger one")
            if not _NAME.fullmatch(message.name):
                raise Refused(400, f"name: got {message.name[:100]!r}; expected the name of a folder")
            folder = Path(self.settings.weights_dir) / message.name
            if self.settings.transport != DISK:
                raise Refused(409, f"it takes weights by {self.settings.transport}, not from a folder")
            if folder.is_symlink():
                raise Refused(400, f"{message.name}: got a link; expected a folder")
            try:
                manifest = await asyncio.to_thread(check_folder, folder, self._expected)
            except (ValueError, OSError) as error:
                raise Refused(400, str(error)) from error
            if manifest.version != message.version:
                raise Refused(400, f"{message.name}: got version {manifest.version}; expected {message.version}")
            await self._load(folder, message.version)
            self._own_weights = False

    async def transfer(self, message: Transfer) -> None:
        """A step of a transfer from the trainer. Raises Refused: 409 for another session or a version that does not
        grow, BadMessage for a step that is not the next. When one fails the server refuses to write until a complete
        set."""
        async with self._changing:
            self.check_session(message.session)
            if self.settings.transport == DISK:
                raise Refused(409, "it takes weights from a folder")
            self._receiver.check(message.action)
            if message.action == START:
                if message.version <= self.version:
                    raise Refused(409, f"policy version: got {message.version} after {self.version}; expected a larger")
                await self._wake()
            if message.action != CONNECT:
                self.refusal = f"the load of policy version {message.version} did not complete"
                self._settled.clear()

            def step(engine: LLMEngine) -> None:
                with self._whole_or_nothing():
                    self._receiver.do(engine, message.action, message.info)
                    if message.action == FINISH:
                        _begin_version(engine, message.version)
                        self.engine.held = False

            try:
                await self._between_steps(step)
            except BaseException:
                self._settled.set()
                raise
            if message.action == FINISH:
                self.version, self.refusal, self._own_weights = message.version, "", False
                self._settled.set()

    @contextmanager
    def _whole_or_nothing(self) -> Iterator[None]:
        """What fails in here leaves weights of which nobody knows what they are: nothing more is written with them. In
        the engine's thread."""
        try:
            yield
        except BaseException:
            self.engine.drop_all()
            self.engine.held = False
            raise

    async def sleep(self, message: Sleep) -> None:
        """Give up the GPU's memory; weights wait in the CPU's. The next request or set of weights wakes the server."""
        async with self._changing:
            self.check_session(message.session)
            if self.settings.sleeps and not self._asleep:
                await self._between_steps(lambda engine: engine.sleep(level=1))
                self._asleep = True

    async def _wake(self) -> None:
        if self._asleep:
            self._asleep = False
            await self._between_steps(lambda engine: engine.wake_up())  # before whatever is asked of the engine next

    async def _load(self, folder: Path, version: int) -> None:
        """Replace the weights between two steps. Requests that are being written are computed again with the new ones
        (their tokens stay), so that no key or value of the old weights is used for a token of the new. When it fails
        they are dropped: nothing is written with weights of which nobody knows what they are."""
        self.refusal = f"the load of policy version {version} did not complete"

        def load(engine: LLMEngine) -> None:
            with self._whole_or_nothing():
                engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
                _begin_version(engine, version)

        self._settled.clear()
        try:
            await self._between_steps(load)
            self.version, self.refusal = version, ""
        finally:
            self._settled.set()

    async def _between_steps(self, function: Callable[[LLMEngine], None]) -> None:
        await asyncio.wrap_future(self.engine.between_steps(function))

    async def generate(self, message: Generate) -> AsyncGenerator[Line, None]:
        """A line for each response as it finishes; leaving early drops what is not finished. Weights that are being
        loaded are waited for. It breaks off, without an ``end``, when its requests were dropped."""
        self.check_session(message.session)
        sampling, reported = self._sampling(message)
        waited = False
        while not self._settled.is_set():
            waited = True
            yield {"steps": self.engine.steps}
            with suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), BEAT_SECONDS)
        if waited and (self.refusal or message.session != self.session):
            return  # too late to refuse
        if self.refusal:
            raise Refused(503, f"refuses to write: {self.refusal}")
        await self._wake()
        asked = [
            (r.key, [*r.prompt, *r.prefix], _parameters(r, sampling, message.eos_ids, reported))
            for r in message.requests
        ]
        async with aclosing(self._stream(asked, partial(self._written, message.best))) as lines:
            async for line in lines:
                yield line

    def _sampling(self, message: Generate) -> tuple[Sampling, int]:
        """How it is drawn, and how many ids vLLM reports. Raises Refused for best ids that cannot be said."""
        drawn, vocab_size = message.sampling, self.engine.config.get_vocab_size()
        sampling = Sampling(1, drawn.temperature, drawn.top_p, drawn.top_k, drawn.greedy)
        if not 0 <= message.best <= vocab_size:
            raise Refused(400, f"best: got {message.best}; expected 0 to {vocab_size}")
        if message.best and not tells_its_own(sampling):
            raise Refused(400, f"best: got {message.best} with {drawn}; expected temperature 1 without top_p and top_k")
        return sampling, reported_ids(message.best, vocab_size)

    def _written(self, best: int, key: int, answer: RequestOutput) -> Written:
        output = answer.outputs[0]
        assert output.logprobs is not None
        pairs = zip(*output.logprobs, strict=True)  # rows, as `engine` keeps them
        ids, logits = (torch.from_numpy(np.stack(rows)) for rows in pairs)
        logprobs, said = told(ids, logits, best)
        spans = [[_number(span.version), span.start] for span in output.weight_versions or ()]
        self._tokens["written"] += len(output.token_ids)
        self._tokens["read"] += len(answer.prompt_token_ids or ())
        self._tokens["cached"] += answer.num_cached_tokens or 0
        numbers = "" if said is None else packed({"ids": said.ids, "logprobs": said.logprobs})
        return Written(key, tuple(output.token_ids), logprobs.tolist(), spans, numbers)


def _parameters(request: WireRequest, sampling: Sampling, eos_ids: Sequence[int], reported: int) -> SamplingParams:
    return SamplingParams(
        temperature=0.0,  # the logits processor draws
        max_tokens=request.tokens,
        stop_token_ids=list(eos_ids),
        ignore_eos=True,
        logprobs=reported,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=draw_arguments(sampling, request.seed, len(request.prefix), tells_best=reported > 0),
    )


def _begin_version(engine: LLMEngine, version: int) -> None:
    if not engine.reset_prefix_cache(reset_running_requests=True):
        raise RuntimeError("keys and values of the old weights could not be dropped")
    engine.set_weight_version(str(version))


def _number(version: str) -> int:
    return -1 if version == "default" else int(version)
