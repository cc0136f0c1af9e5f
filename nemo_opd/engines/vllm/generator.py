"""`nemo_opd.engines.protocols.Generator` on vLLM servers.

Since a request's tokens depend on its seed and the weights alone, it does not matter which server writes it, or writes
it again when another is lost. Weights go through a folder (`nemo_opd.refit.folder`) that all servers can read.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_opd.engines.generation import Finished, check_generate_request, is_over, limit_of, nothing_drawn, rollout_of
from nemo_opd.engines.protocols import Generator, NamedTensor
from nemo_opd.engines.vllm.calls import Calls, Servers
from nemo_opd.engines.vllm.settings import WRITER
from nemo_opd.engines.vllm.transport import transport_of
from nemo_opd.engines.vllm.wire import Attach, BadMessage, Generate, WireRequest, WireSampling, Written, unpacked
from nemo_opd.processes import Processes
from nemo_opd.refit.folder import tensor_shapes
from nemo_opd.refit.manifest import WeightCheck
from nemo_opd.types import BestIds, GenerateRequest, Rollout, Sampling, StopRequested
from nemo_opd.vocab.sampling import check_sampling, tells_its_own

log = logging.getLogger(__name__)

_TIED = "lm_head.weight"


class VLLMGenerator:
    """Several processes may hold one of the same session; the first one alone attaches and moves weights.

    `generate` may be called and its iterators read in other threads than `load_weights`: responses that are being
    written when weights change go on with the new ones.
    """

    def __init__(
        self,
        servers: Servers,
        model: Path,
        *,
        is_first: bool = True,
        rank: int | None = None,
        eos_ids: Sequence[int] = (),
        decode: Callable[[Tensor], str] | None = None,
        read_weights: bool = True,
        end_servers: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            model: the student's folder; its tensors are those that every set of weights must have.
            is_first: of the processes that share the session.
            rank: of this process among them; None: this process's.
            eos_ids, decode: as in the `hf` generator.
            read_weights: the servers write with the weights of their own folder until the first `load_weights`;
                otherwise they refuse until then.
            end_servers: called by `close`; None where the servers go on running.

        Raises: ServerGone or ServerRefused for a server that cannot be had, ValueError for one with another vocabulary.
        """
        sizes = json.loads((model / "config.json").read_text(encoding="utf-8"))
        self.vocab_size, self._positions = int(sizes["vocab_size"]), int(sizes["max_position_embeddings"])
        self._servers, self._is_first, self._expected = servers, is_first, tensor_shapes(model)
        self._eos_ids, self._decode = tuple(eos_ids), decode
        self._end_servers = end_servers
        self._refusal = "" if read_weights else "it has no weights yet"
        self.version = -1
        self._newest = -1
        """Versions up to this one may come back: a server has the next one before all of them do."""
        self._changing = threading.Lock()
        self.refit_bytes, self.refit_seconds = 0, 0.0
        """Of the last set of weights that this process moved."""
        self._calls: Calls | None = Calls(servers)
        self._transport = transport_of(self._calls, servers, Processes.current().rank if rank is None else rank)
        if is_first:
            self._attach(self._calls, Attach(servers.session, reload=read_weights))

    def _attach(self, calls: Calls, attach: Attach) -> None:
        for url, found in calls.attach(attach, WRITER).items():
            self._positions = min(self._positions, found.positions)
            if found.vocab_size != self.vocab_size:
                raise ValueError(
                    f"rollout server {url}: got a vocabulary of {found.vocab_size}; expected the student's "
                    f"{self.vocab_size}; start it with the student's folder"
                )

    @property
    def resent(self) -> int:
        """Requests that were sent again because their server was lost."""
        return self._open("resent").resent

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: Sampling, stop_requested: StopRequested, best: int = 0
    ) -> Iterator[Rollout]:
        """Yield each rollout as it finishes; see `Generator.generate`. With `best` they hold `Rollout.best`: so many of
        the student's most probable ids at every token that it drew.

        Raises, at the call: ValueError for bad sampling values or a request that does not fit the model, RuntimeError
        when the generator is closed or its last set of weights was incomplete. While it runs: ServerGone when no
        server is left, ServerRefused when one will not write, RuntimeError for a request that came to nothing.
        """
        calls = self._open("generate")
        with self._changing:  # a load that another thread is at is waited for
            if self._refusal:
                reason = f"{self._refusal}; load a complete set of weights first"
                raise RuntimeError(f"generator refuses to generate: {reason}")
        check_sampling(sampling)
        if best and not tells_its_own(sampling):
            raise ValueError(f"sampling: got {sampling}; expected temperature 1, no top_p and top_k, for best ids")
        for request in requests:
            check_generate_request(request, sampling, self.vocab_size, self._positions)
        return self._run(calls, requests, sampling, stop_requested, best)

    def _run(
        self, calls: Calls, requests: Sequence[GenerateRequest], sampling: Sampling, stop: StopRequested, best: int
    ) -> Iterator[Rollout]:
        waiting: list[WireRequest] = []
        for position, request in enumerate(requests):
            if is_over(request, sampling, self._eos_ids):
                yield rollout_of(nothing_drawn(request), self._eos_ids, self._decode)
            else:
                waiting.append(_wire_request(position, request, sampling))
        if not waiting or stop():
            return
        form = Generate(
            requests=tuple(waiting),
            session=self._servers.session,
            sampling=WireSampling.of(sampling),
            eos_ids=self._eos_ids,
            best=best,
        )
        for line in calls.ask(form, stop):
            finished, told = self._finished(requests, line, best)
            yield replace(rollout_of(finished, self._eos_ids, self._decode), best=told)

    def _finished(
        self, requests: Sequence[GenerateRequest], line: Mapping[str, Any], best: int
    ) -> tuple[Finished, BestIds | None]:
        request = requests[line["key"]]
        if "error" in line:
            raise RuntimeError(f"generator: prompt {request.prompt.index}, sample {request.sample}: {line['error']}")
        written = Written.read(dict(line))
        prefix, drawn = len(request.prefix_ids), len(written.ids)
        versions = torch.full((prefix + drawn,), -1)
        for version, start in written.versions:
            versions[prefix + start :] = version
        if drawn and not -1 <= int(versions[prefix:].max()) <= self._newest:
            raise BadMessage(f"tokens of policy version {int(versions.max())}; expected at most {self._newest}")
        ids = torch.tensor([*request.prefix_ids, *written.ids], dtype=torch.int64)
        logprobs = torch.tensor([*[float("nan")] * prefix, *written.logprobs])
        return Finished(request, ids, logprobs, versions), _best(written.best, drawn, best)

    def telling(self, k: int) -> Generator:
        """This one as a generator whose rollouts hold the k best ids."""
        return _Telling(self, k)

    def load_weights(self, weights: Iterable[NamedTensor], version: int) -> None:
        """Have every server take `weights`, in the way of `Servers.transport`: the first process does, the others look
        on (ipc: all do).

        Servers hold the old version, or the new one, and write nothing in between. One that does not take the new one
        is left out; when none does, or the stream is wrong, this generator refuses to generate until a complete load.

        Raises: ValueError when the version does not grow (nothing is touched then) or a tensor is missing, unknown,
        doubled or of another shape; ServerGone or ServerRefused when no server took them, or, but for `disk`, when one
        failed on the way; OSError where a folder cannot be written; and whatever `weights` raises.
        """
        self._open("load_weights")
        if version <= self.version:
            raise ValueError(f"policy version: got {version} after {self.version}; expected a larger one")
        with self._changing:
            self._refusal = f"the load of policy version {version} did not complete"
            self._newest = version
            checked = self._checked(weights)
            if self._is_first or self._transport.collective:
                self._move(checked, version)
            else:
                for _ in checked:
                    pass
            self.version, self._refusal = version, ""

    def _move(self, weights: Iterable[NamedTensor], version: int) -> None:
        if self._servers.sleep and torch.cuda.is_available():
            torch.cuda.empty_cache()  # the servers are about to need it
        begin = time.monotonic()
        self.refit_bytes = self._transport.move(weights, version)
        self.refit_seconds = time.monotonic() - begin

    def _checked(self, weights: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        """A tied output layer may come, equal to the embedding; the servers do not need it."""
        check = WeightCheck(self._expected)
        for name, tensor in weights:
            if name == _TIED and _TIED not in self._expected:
                continue
            check.see(name, tensor)
            yield name, tensor
        check.finish()

    def rest(self) -> None:
        """Nothing is asked of the servers for a while: those that share the trainer's GPUs give their memory up, until
        the next call."""
        calls = self._open("rest")
        if self._servers.sleep and self._is_first:
            calls.sleep(self._servers.session)

    def close(self) -> None:
        """Let go of the servers. Idempotent."""
        if self._calls is not None:
            self._transport.close()
            self._calls.close()
            self._calls = None
        if self._end_servers is not None:
            self._end_servers()

    def _open(self, call: str) -> Calls:
        if self._calls is None:
            raise RuntimeError(f"generator: got {call} after close; make a new one")
        return self._calls


@dataclass(frozen=True)
class _Telling:
    """See `VLLMGenerator.telling`."""

    generator: VLLMGenerator
    k: int

    @property
    def version(self) -> int:
        return self.generator.version

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: Sampling, stop_requested: StopRequested
    ) -> Iterator[Rollout]:
        return self.generator.generate(requests, sampling, stop_requested, self.k)

    def load_weights(self, weights: Iterable[NamedTensor], version: int) -> None:
        self.generator.load_weights(weights, version)

    def close(self) -> None:
        self.generator.close()


def _best(text: str, tokens: int, k: int) -> BestIds | None:
    """Raises BadMessage for something else than was asked for."""
    if not k:
        return None
    return BestIds(**unpacked(text, {"ids": (torch.int32, (tokens, k)), "logprobs": (torch.float32, (tokens, k))}))


def _wire_request(position: int, request: GenerateRequest, sampling: Sampling) -> WireRequest:
    tokens = limit_of(request, sampling) - len(request.prefix_ids)
    return WireRequest(position, request.prompt.token_ids, request.prefix_ids, request.seed, tokens)
