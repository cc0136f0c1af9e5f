"""What every server does, whatever its role: it hands requests to its engine and tells of each as it finishes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from vllm import SamplingParams
from vllm.outputs import RequestOutput

from nemo_opd.engines.vllm.engine import Dropped, EngineThread, Job
from nemo_opd.engines.vllm.identity import weights_id
from nemo_opd.engines.vllm.settings import ServerSettings
from nemo_opd.engines.vllm.wire import BEAT_SECONDS, Attach, Attached, EngineFailed, Message

Line = Mapping[str, Any]
Asked = tuple[int, Sequence[int], SamplingParams]
"""Key, token ids, parameters of a request."""
Answer = Callable[[int, RequestOutput], Message]
"""Makes a message of a key's output."""


class Served:
    """The state behind the routes. Its methods run in the event loop; the engine runs in its own thread."""

    def __init__(self, settings: ServerSettings, engine: EngineThread) -> None:
        self.settings, self.engine = settings, engine
        self._numbers = itertools.count()
        self._weights = weights_id(settings.model)

    def health(self) -> dict[str, Any]:
        status = "failed" if self.engine.failure is not None else "ready"
        return {"status": status, "steps": self.engine.steps, "running": self.engine.running}

    async def attach(self, message: Attach) -> None:
        """A session begins."""

    def description(self, vllm: str) -> Attached:
        """What clients are told when they attach."""
        config = self.engine.config
        return Attached(
            role=self.settings.role,
            weights=self._weights,
            vocab_size=config.get_vocab_size(),
            scored_ids=self.settings.scored_ids or config.get_vocab_size(),
            at_ids=False,
            positions=config.max_model_len,
            max_running=self.settings.max_running,
            vllm=vllm,
            transport=self.settings.transport,
            workers=self.settings.tensor_parallel_size,
        )

    async def _stream(
        self,
        asked: Sequence[tuple[int, Sequence[int], SamplingParams]],
        answer: Callable[[int, RequestOutput], Message],
    ) -> AsyncGenerator[Line, None]:
        """A line for each of `asked` as it finishes; leaving early drops the rest. It breaks off, without an ``end``,
        when they were dropped.

        `answer` is called in the engine's thread; what it raises is that key's failure.
        Raises EngineFailed: whoever asked is better off with another server.
        """
        loop, lines = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Line | EngineFailed | Dropped]]()
        keys: dict[str, int] = {}

        def emit(job: str, output: RequestOutput | Exception) -> None:
            loop.call_soon_threadsafe(lines.put_nowait, (keys[job], _line(keys[job], output, answer)))

        jobs = [Job(str(next(self._numbers)), ids, params, emit) for _, ids, params in asked]
        keys.update({job.id: key for job, (key, _, _) in zip(jobs, asked, strict=True)})
        self.engine.add(jobs)
        open_keys = set(keys.values())
        try:
            while open_keys:
                try:
                    key, line = await asyncio.wait_for(lines.get(), BEAT_SECONDS)
                except TimeoutError:
                    yield {"steps": self.engine.steps}
                    continue
                if isinstance(line, EngineFailed):
                    raise line
                if isinstance(line, Dropped):
                    yield {"steps": self.engine.steps}  # the first line may not have been sent yet
                    return
                open_keys.discard(key)
                yield line
            yield {"end": len(keys)}
        finally:
            self.engine.cancel(list(keys))


def _line(key: int, output: RequestOutput | Exception, answer: Answer) -> Line | EngineFailed | Dropped:
    if isinstance(output, EngineFailed | Dropped):
        return output
    try:
        if isinstance(output, Exception):
            raise output
        return answer(key, output).to_dict()
    except Exception as error:  # noqa: BLE001 - belongs to whoever asked
        return {"key": key, "error": f"{type(error).__name__}: {error}"}
