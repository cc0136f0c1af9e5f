"""vLLM's engine in a thread of its own: requests come in between two steps, outputs go out after each.

The engine runs in the server's process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``): what is added together starts together,
so the same requests make the same batches; weights change between two steps and never within one; and a server that is
killed leaves nothing behind.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from vllm import SamplingParams
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMClientError
from vllm.outputs import RequestOutput
from vllm.v1.engine import output_processor
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from nemo_opd.engines.vllm.sampler import SeededSampler
from nemo_opd.engines.vllm.settings import DISK, WRITER, ServerSettings
from nemo_opd.engines.vllm.wire import EngineFailed

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Dropped(Exception):
    """The request came to nothing through no fault of its own: another server may write it."""


Emit = Callable[[str, RequestOutput | Exception], None]
"""Told of each finished request, by its id, from the engine's thread."""

_IDLE_SECONDS = 0.2


def make_engine(settings: ServerSettings) -> LLMEngine:
    """Loads the model. No code of a model folder is run, and only safetensors are read."""
    output_processor.LogprobsProcessor = _NumbersAsTheyAre
    role = _writer_arguments(settings) if settings.role == WRITER else _teacher_arguments(settings)
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=settings.model,
            skip_tokenizer_init=True,
            trust_remote_code=False,
            load_format="safetensors",
            dtype=settings.dtype,
            enforce_eager=not _has_gpu(),
            max_num_seqs=settings.max_running,
            tensor_parallel_size=settings.tensor_parallel_size,
            distributed_executor_backend="uni" if settings.tensor_parallel_size == 1 else "mp",
            gpu_memory_utilization=settings.memory_share,
            quantization=None if settings.quantization == "none" else settings.quantization,
            max_logprobs=-1,
            disable_log_stats=True,
            seed=0,
            **role,
        )
    )
    if settings.scored_ids is not None and settings.scored_ids < engine.model_config.get_vocab_size():
        engine.collective_rpc("keep_ids", args=(settings.scored_ids,))
    return engine


def _writer_arguments(settings: ServerSettings) -> dict[str, Any]:
    arguments: dict[str, Any] = {"worker_extension_cls": "nemo_opd.engines.vllm.receiver.ReceivingWorker"}
    if settings.transport != DISK:
        arguments["weight_transfer_config"] = WeightTransferConfig(backend=settings.transport)
    return arguments | {
        "enable_sleep_mode": settings.sleeps and _has_gpu(),
        "max_model_len": settings.max_positions,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logits",
        "logits_processors": [SeededSampler],
    }


def _teacher_arguments(settings: ServerSettings) -> dict[str, Any]:
    return {
        "max_model_len": -1 if settings.max_positions is None else settings.max_positions,  # -1: what memory holds
        "max_num_batched_tokens": settings.batch_tokens,
        "enable_prefix_caching": False,  # vLLM computes every position whose log-probability it reports
        "logprobs_mode": "raw_logprobs",
        "hf_overrides": {"head_dtype": "float32"},
        "worker_extension_cls": "nemo_opd.engines.vllm.student_ids.StudentIds",
    }


class _NumbersAsTheyAre(LogprobsProcessor):
    """vLLM would make Python's objects, thirty times as large, of what is going to be tensors again."""

    def _update_prompt_logprobs(self, prompt_logprobs_tensors: LogprobsTensors) -> None:
        self.prompt_logprobs = prompt_logprobs_tensors

    def _update_sample_logprobs(self, logprobs_lists: LogprobsLists) -> None:
        """A pair of rows (ids, numbers) for each token, copied out of the arrays of the whole batch."""
        count = 1 + self.num_logprobs
        ids, numbers = logprobs_lists.logprob_token_ids, logprobs_lists.logprobs
        self.logprobs.extend((i[:count].copy(), n[:count].copy()) for i, n in zip(ids, numbers, strict=True))


def _has_gpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


@dataclass(frozen=True)
class Job:
    """One request for the engine."""

    id: str
    token_ids: Sequence[int]
    params: SamplingParams
    emit: Emit


class EngineThread:
    """Owns the engine: every call of it is made by `run`, the thread's body."""

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self.config = engine.model_config
        self.takes_ids = bool(engine.vllm_config.use_v2_model_runner)
        """Does it score ids that are given?"""
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: dict[str, Job] = {}
        self.steps = 0
        """Turns of the loop so far: a server whose turns stop while it has work hangs."""
        self.failure: BaseException | None = None
        self.held = False
        """No step is made: weights are on their way, and those of the model are neither old nor new. Set in the
        engine's thread (`between_steps`)."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self._jobs)

    def add(self, jobs: Sequence[Job]) -> None:
        """Start `jobs` together, at the next step. From any thread."""
        self._inbox.put(lambda: self._add(jobs))

    def cancel(self, ids: Sequence[str]) -> None:
        """Drop requests, at the next step; unknown and finished ones are passed over. From any thread."""
        self._inbox.put(lambda: self._cancel(ids))

    def between_steps(self, function: Callable[[LLMEngine], Result]) -> Future[Result]:
        """Call `function` with the engine in its thread, while no step is running. From any thread."""
        future: Future[Result] = Future()

        def call() -> None:
            try:
                future.set_result(function(self._engine))
            except BaseException as error:  # noqa: BLE001 - belongs to whoever waits for the future
                future.set_exception(error)

        self._inbox.put(call)
        return future

    def drop_all(self) -> None:
        """Give every request up and tell those who wait. From the engine's thread alone (`between_steps`)."""
        dropped, self._jobs = self._jobs, {}
        self._engine.abort_request(list(dropped))
        for job in dropped.values():
            job.emit(job.id, Dropped())

    def stop(self) -> None:
        self._inbox.put(None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        try:
            while self._turn():
                self.steps += 1
        except BaseException as error:  # whatever it is, those who wait must hear of it
            log.exception("the engine failed")
            self.failure = error
            for job in self._jobs.values():
                job.emit(job.id, EngineFailed(f"the engine failed: {type(error).__name__}: {error}"))

    def _turn(self) -> bool:
        """Do what was asked for, then one step; False when the thread shall end."""
        wait = self.held or not self._jobs
        while True:
            try:
                action = self._inbox.get(block=wait, timeout=_IDLE_SECONDS if wait else None)
            except queue.Empty:
                break
            if action is None:
                return False
            action()
            wait = False
        if self._engine.has_unfinished_requests() and not self.held:
            for output in self._engine.step():
                assert isinstance(output, RequestOutput)
                if output.finished and (job := self._jobs.pop(output.request_id, None)) is not None:
                    job.emit(job.id, output)
        return True

    def _add(self, jobs: Sequence[Job]) -> None:
        known = self.config.get_vocab_size()
        for job in jobs:
            try:
                if not 0 <= min(job.token_ids, default=0) <= max(job.token_ids, default=0) < known:
                    raise ValueError(f"token ids: got some beyond the model's {known}")  # vLLM would die of them
                self._engine.add_request(job.id, {"prompt_token_ids": list(job.token_ids)}, job.params)
            except (ValueError, VLLMClientError) as error:  # vLLM's refusal of this one
                job.emit(job.id, error)
            else:
                self._jobs[job.id] = job

    def _cancel(self, ids: Sequence[str]) -> None:
        mine = [id for id in ids if self._jobs.pop(id, None) is not None]
        if mine:
            self._engine.abort_request(mine)
