"""`nemo_opd.engines.protocols.Scorer` on vLLM servers: a teacher that is asked, not held.

A server reports a few log-probabilities per token: of the written token, of the teacher's k best, or of given ids. It
has no hidden states to give, so losses over whole distributions need a teacher in the run's own processes.

Each response is scored once: by the rank that has begun to (`VLLMScorer.begin`) while others were still being written,
otherwise by the first of its consumers. Whoever has the answer passes it on to the consumers. What comes to nothing
(every server lost, a response that a server failed at) comes back without a valid row, never with a number.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from nemo_opd.engines.exchange import Message, exchange
from nemo_opd.engines.requests import check_needs, check_request
from nemo_opd.engines.vllm.calls import Calls, Line, Servers
from nemo_opd.engines.vllm.client import ServerGone
from nemo_opd.engines.vllm.identity import weights_id
from nemo_opd.engines.vllm.pool import Return
from nemo_opd.engines.vllm.settings import TEACHER
from nemo_opd.engines.vllm.wire import NEEDS, Attach, Score, Scored, WireScore, packed, unpacked
from nemo_opd.processes import Processes
from nemo_opd.types import Need, ScoreRequest, TeacherNeeds, TeacherScores

log = logging.getLogger(__name__)

Payload = tuple[Tensor, ...]
"""(log-probs float32 [response, k],), with TOP_K and (ids int64 [response, k]) besides; NaN where no score came."""

Content = tuple[tuple[int, ...], bytes, TeacherNeeds]
"""What an answer depends on: context ids, response ids, needs."""

_WORDS = {need: word for word, need in NEEDS.items()}


class VLLMScorer:
    """A teacher on servers that several processes, and several runs, may ask."""

    def __init__(
        self,
        servers: Servers,
        vocab_size: int,
        *,
        model: Path | None = None,
        rank: int | None = None,
        patience: float = 60.0,
        end_servers: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            vocab_size: the student's ids, over which the servers must normalise.
            model: folder of the teacher; where it holds weights, the servers must hold the same. None: whatever is
                served.
            rank: of a process that asks for itself alone; None: this one, among those of the run.
            patience: seconds that are spent on lost servers before their scores are given up.
            end_servers: called by `close`; None where the servers go on running.

        Raises: ServerGone or ServerRefused for a server that cannot be had, ValueError for one that scores other ids or
        is another model.
        """
        attach = Attach(servers.session, reload=False)
        self._vocab_size, self._end_servers = vocab_size, end_servers
        self._processes = Processes.current() if rank is None else Processes(rank)
        self._early: dict[Content, deque[Future[list[Line]]]] = {}
        """Begun and not asked for yet."""
        self._changing = threading.Lock()
        self._calls: Calls | None = Calls(servers, Return(attach, patience=patience))
        found, weights = self._calls.attach(attach, TEACHER), "" if model is None else weights_id(model)
        for url, server in found.items():
            if server.scored_ids != vocab_size:
                raise ValueError(
                    f"teacher server {url}: got probabilities over {server.scored_ids} ids; expected the student's "
                    f"{vocab_size}; start it with scored_ids={vocab_size} (nemo_opd's own) and a teacher that knows "
                    "all of them"
                )
            if weights not in ("", server.weights):
                raise ValueError(
                    f"teacher server {url}: got other weights than those in {model}; expected the same teacher; "
                    "correct the address, or name the folder that is served there"
                )
        self._known_ids = min(server.vocab_size for server in found.values())
        self._room = min(server.positions for server in found.values()) - 1
        """Longest context with its response: vLLM keeps a position for the token that it has to write."""
        self._at_ids = all(server.at_ids for server in found.values())

    @property
    def resent(self) -> int:
        """Requests that were sent again because their server was lost."""
        return self._open().resent

    def begin(self, request: ScoreRequest, needs: TeacherNeeds) -> None:
        """See `EarlyScorer.begin`. Where it comes to nothing because no server is left, `score` asks again."""
        wire = _wire_score(0, request, self._room, needs)
        if wire is not None:
            begun = self._open().begin(_form([wire], needs))
            with self._changing:
                self._early.setdefault(_content(request, needs), deque()).append(begun)

    def score(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        """See `Scorer.score`: answers as they finish, those that come from other ranks last.

        Raises, at the call and on every rank alike: ValueError for a need that the servers do not serve and for what
        every scorer refuses (`nemo_opd.engines.requests`), RuntimeError after close. While it runs: ServerRefused when
        a server will not do it.
        """
        self._open()
        self._check(needs)
        for request in requests:
            check_request(request, needs, self._vocab_size, self._known_ids)
        return iter(()) if needs.need is Need.NOTHING else self._answers(requests, needs)

    def _check(self, needs: TeacherNeeds) -> None:
        if needs.need is Need.FULL:
            raise ValueError(
                "a teacher on vLLM servers: got FULL; expected SAMPLED, TOP_K or AT_IDS, as servers report a few "
                "log-probabilities and no hidden states; choose such a loss, or teacher.engine=megatron"
            )
        if needs.need is Need.AT_IDS and not self._at_ids:
            raise ValueError(
                "a teacher on vLLM servers: got AT_IDS; expected SAMPLED or TOP_K, as servers without a GPU score ids "
                "that are given for small vocabularies only, and stock vLLM servers none; let the teacher choose the "
                "ids, or serve it on a GPU with nemo_opd's own server"
            )
        check_needs(needs, self._vocab_size)

    def _answers(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        begun = self._begun(requests, needs)
        askers = self._askers(requests, begun)
        moved = {n for n, request in enumerate(requests) if request.consumers != (askers[n],)}
        mine = [number for number, asker in enumerate(askers) if asker == self._processes.rank]
        for number in begun.keys() - set(mine):
            begun[number].cancel()
        held: dict[int, Payload] = {}
        for number, payload in self._payloads(requests, mine, begun, needs):
            if number in moved:
                held[number] = payload
            else:
                yield _answer(requests[number], payload, needs)
        plan = [
            Message(number, askers[number], consumer, len(requests[number].response_ids))
            for number in sorted(moved)
            for consumer in requests[number].consumers
        ]
        if plan:
            for number, payload in exchange(plan, held, _nothing(0, needs), torch.device("cpu")):
                yield _answer(requests[number], payload, needs)

    def _begun(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> dict[int, Future[list[Line]]]:
        """What this rank has begun, by position; each is handed out once."""
        found: dict[int, Future[list[Line]]] = {}
        with self._changing:
            for number, request in enumerate(requests if self._early else ()):
                content = _content(request, needs)
                if content in self._early:
                    found[number] = self._early[content].popleft()
                    if not self._early[content]:
                        del self._early[content]
        return found

    def _askers(self, requests: Sequence[ScoreRequest], begun: Mapping[int, object]) -> list[int]:
        """Who asks for each: the first rank that has begun to, otherwise the first consumer; -1 where none wants it.
        One gather."""
        askers = [request.consumers[0] if request.consumers else -1 for request in requests]
        parts = self._processes.gather(torch.tensor(sorted(begun), dtype=torch.int64))
        first = 0 if len(parts) > 1 else self._processes.rank
        for rank, part in reversed(list(enumerate(parts, first))):
            for number in part.tolist():
                askers[number] = rank if requests[number].consumers else -1
        return askers

    def _payloads(
        self,
        requests: Sequence[ScoreRequest],
        mine: Sequence[int],
        begun: Mapping[int, Future[list[Line]]],
        needs: TeacherNeeds,
    ) -> Iterator[tuple[int, Payload]]:
        """Of each of `mine`, as they finish."""
        waiting: dict[int, WireScore] = {}
        for number in sorted(mine, key=lambda n: -len(requests[n].response_ids)):
            wire = _wire_score(number, requests[number], self._room, needs)
            if wire is None:
                yield number, _nothing(len(requests[number].response_ids), needs)
            else:
                waiting[number] = wire
        asked, failures = len(waiting), []
        try:
            for number, line in self._lines(waiting, begun, needs):
                if "error" in line:
                    failures.append(line["error"])
                    continue
                rows = len(waiting.pop(number).response)
                yield number, _payload(line, rows, len(requests[number].response_ids), needs)
        except ServerGone as error:
            failures.append(str(error))
        if waiting:
            log.error("%d of %d responses have no score: %s", len(waiting), asked, failures[0])
        for number in waiting:
            yield number, _nothing(len(requests[number].response_ids), needs)

    def _lines(
        self, waiting: Mapping[int, WireScore], begun: Mapping[int, Future[list[Line]]], needs: TeacherNeeds
    ) -> Iterator[tuple[int, Line]]:
        """(position, line) of all that are `waiting`: first what was begun, then the rest, which is asked for now."""
        rest = dict(waiting)
        for number in begun.keys() & waiting.keys():
            try:
                (line,) = begun[number].result()
            except ServerGone:
                continue
            del rest[number]
            yield number, line
        if rest:
            yield from ((line["key"], line) for line in self._open().ask(_form(rest.values(), needs)))

    def close(self) -> None:
        """Let go of the servers. Idempotent."""
        if self._calls is not None:
            for begun in itertools.chain.from_iterable(self._early.values()):
                begun.cancel()
            self._calls.close()
            self._calls = None
        if self._end_servers is not None:
            self._end_servers()

    def _open(self) -> Calls:
        if self._calls is None:
            raise RuntimeError("scorer: got a call after close; make a new one")
        return self._calls


def _form(requests: Iterable[WireScore], needs: TeacherNeeds) -> Score:
    return Score(requests=tuple(requests), need=_WORDS[needs.need], k=needs.k)


def _content(request: ScoreRequest, needs: TeacherNeeds) -> Content:
    return request.context_ids, request.response_ids.cpu().numpy().tobytes(), needs


def _wire_score(number: int, request: ScoreRequest, room: int, needs: TeacherNeeds) -> WireScore | None:
    """As much of the response as the model has room for; None where that is nothing."""
    rows = max(0, min(len(request.response_ids), room - len(request.context_ids)))
    if not rows:
        return None
    at_ids = ""
    if needs.need is Need.AT_IDS:
        assert request.at_ids is not None
        at_ids = packed({"ids": request.at_ids[:rows].cpu()})
    return WireScore(number, request.context_ids, tuple(request.response_ids[:rows].tolist()), at_ids)


def _payload(line: Line, rows: int, response: int, needs: TeacherNeeds) -> Payload:
    """The first `rows` come from the line, those up to `response` have no score."""
    empty = _nothing(response, needs)
    names = ("logprobs", "ids")[: len(empty)]
    expected = {name: (part.dtype, (rows, part.shape[1])) for name, part in zip(names, empty, strict=True)}
    found = unpacked(Scored.read(dict(line)).numbers, expected)
    return tuple(torch.cat([found[name], part[rows:]]) for name, part in zip(names, empty, strict=True))


def _nothing(rows: int, needs: TeacherNeeds) -> Payload:
    """The payload of rows without a score."""
    k = 1 if needs.need is Need.SAMPLED else needs.k
    missing = torch.full((rows, k), float("nan"))
    return (missing, torch.zeros(rows, k, dtype=torch.int64)) if needs.need is Need.TOP_K else (missing,)


def _answer(request: ScoreRequest, payload: Payload, needs: TeacherNeeds) -> TeacherScores:
    """A row with a number that is not finite is no score."""
    logprobs = payload[0]
    valid = logprobs.isfinite().all(dim=1)
    if needs.need is Need.SAMPLED:
        return TeacherScores(request.key, valid, sampled_logprobs=logprobs.squeeze(1))
    ids = payload[1] if needs.need is Need.TOP_K else request.at_ids
    return TeacherScores(request.key, valid, ids=ids, id_logprobs=logprobs)
