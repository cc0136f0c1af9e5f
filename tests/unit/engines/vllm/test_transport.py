"""The trainer's side of transports, without a server; and the engine `gloo`, both sides of it, without vLLM's model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from threading import Thread
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from nemo_opd.engines.vllm.calls import Calls, Servers
from nemo_opd.engines.vllm.client import ServerGone
from nemo_opd.engines.vllm.transport import DirectTransport, StreamSource, SyncClient, meeting_point
from nemo_opd.engines.vllm.wire import CONNECT, FINISH, START, UPDATE, Attach

pytest.importorskip("vllm")

Weights = list[tuple[str, Tensor]]


def weights(seed: int) -> Weights:
    draws = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (3, 5), "b.weight": (7,), "c.weight": (2, 2, 2)}
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return [(n, torch.randn(s, generator=draws).to(d)) for (n, s), d in zip(shapes.items(), dtypes, strict=True)]


def same(one: Weights, other: Weights) -> bool:
    pairs = zip(one, other, strict=True)
    return all(n == m and torch.equal(a, b) for (n, a), (m, b) in pairs)


def test_a_source_gives_every_stream_once_in_the_first_ones_order() -> None:
    source = StreamSource()
    for seed in (1, 2):
        source.give(iter(weights(seed)))
        assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == [
            (n, t.dtype, tuple(t.shape)) for n, t in weights(seed)
        ]
        assert not source.begun
        assert same(list(source), weights(seed))
        assert source.begun and source.size == sum(t.nbytes for _, t in weights(seed))


@pytest.mark.parametrize("wrong", ["order", "shape", "missing", "dtype"])
def test_a_stream_with_other_tensors_is_refused(wrong: str) -> None:
    source, other = StreamSource(), weights(2)
    source.give(weights(1))
    other = {
        "order": other[::-1],
        "shape": [("a.weight", torch.zeros(5, 3)), *other[1:]],
        "missing": other[:2],
        "dtype": [("a.weight", other[0][1].double()), *other[1:]],
    }[wrong]
    source.give(iter(other))
    with pytest.raises(ValueError, match=r"weights: got|argument"):
        list(source)


class Worker:
    """A server's part: vLLM's worker with the engine `gloo` and a model that remembers what it was given."""

    def __init__(self, fails_at: str = "") -> None:
        from nemo_opd.engines.vllm.gloo_transfer import GlooWorker

        self.taken: list[Weights] = []
        self.fails_at = fails_at
        model = SimpleNamespace(load_weights=self._load, modules=lambda: ())
        config = SimpleNamespace(parallel_config=SimpleNamespace(rank=0), model_config=None)
        self.engine = GlooWorker(cast(Any, None), cast(Any, config), torch.device("cpu"), cast(Any, model))

    def _load(self, arriving: Iterable[tuple[str, Tensor]]) -> None:
        self.taken.append([(name, tensor.clone()) for name, tensor in arriving])

    def do(self, action: str, info: Mapping[str, Any]) -> None:
        if action == self.fails_at:
            self.fails_at = ""
            raise ServerGone("a: dead")
        if action == CONNECT:
            self.engine.init_transfer_engine(self.engine.parse_init_info(dict(info)))
        if action == UPDATE:
            self.engine.update_weights(dict(info))


class Fleet:
    """`Calls` of some workers, each step in threads of their own as servers would take it."""

    def __init__(self, *workers: Worker) -> None:
        self.all = {f"http://127.0.0.1:{number}": worker for number, worker in enumerate(workers)}
        self.lost: set[str] = set()
        self.actions: list[str] = []

    def alive(self) -> tuple[str, ...]:
        return tuple(url for url in self.all if url not in self.lost)

    def workers(self) -> list[int]:
        return [1] * len(self.alive())

    def recover(self, attach: Attach) -> None: ...

    def transfer(self, session: str, version: int, action: str, infos: Sequence[Mapping[str, Any]] | None) -> None:
        self.actions.append(action)
        urls, failures = self.alive(), []
        every = list(infos or [{}])

        def one(url: str, info: Mapping[str, Any]) -> None:
            try:
                self.all[url].do(action, info)
            except (ServerGone, RuntimeError) as error:
                if isinstance(error, ServerGone):
                    self.lost.add(url)
                failures.append(error)

        every = every if len(every) == len(urls) else every * len(urls)
        threads = [Thread(target=one, args=pair) for pair in zip(urls, every, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


@pytest.fixture(autouse=True)
def no_layerwise_reload(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from vllm.model_executor.model_loader import reload

    monkeypatch.setattr(reload, "initialize_layerwise_reload", lambda model: None)
    monkeypatch.setattr(reload, "finalize_layerwise_reload", lambda model, config: None)
    yield


def transport(fleet: Fleet) -> DirectTransport:
    servers = Servers(["unused"], "s", cast(Any, None), transport="gloo", load_seconds=20.0)
    return DirectTransport(cast(Calls, fleet), servers, rank=0)


def test_every_tensor_arrives_bit_for_bit_on_every_worker() -> None:
    fleet = Fleet(Worker(), Worker())
    moving = transport(fleet)
    for version, seed in enumerate((1, 2, 3)):
        size = moving.move(iter(weights(seed)), version)
        assert size == sum(tensor.nbytes for _, tensor in weights(seed))
        assert all(same(worker.taken[-1], weights(seed)) for worker in fleet.all.values())
    assert fleet.actions == [CONNECT] + [START, UPDATE, FINISH] * 3
    moving.close()


def test_a_server_that_is_found_lost_before_a_tensor_was_sent_costs_itself_alone() -> None:
    fleet = Fleet(Worker(), Worker())
    moving = transport(fleet)
    moving.move(iter(weights(1)), 0)
    first, second = fleet.all.values()
    first.fails_at = START
    moving.move(iter(weights(2)), 1)
    assert same(second.taken[-1], weights(2)) and len(first.taken) == 1
    assert fleet.actions[-5:] == [START, CONNECT, START, UPDATE, FINISH]
    fleet.lost.clear()  # it is back: all of them connect again
    moving.move(iter(weights(3)), 2)
    assert same(first.taken[-1], weights(3)) and same(second.taken[-1], weights(3))
    moving.close()


def test_workers_of_several_servers_have_ranks_of_their_own() -> None:
    told: list[Any] = []
    calls = SimpleNamespace(workers=lambda: [2, 4, 1], transfer=lambda *arguments: told.append(arguments))
    client = SyncClient(cast(Calls, calls), "s")
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 8})
    assert [info["rank_offset"] for info in told[0][3]] == [1, 3, 7]
    client.init_weight_transfer_engine({"packed": True})
    assert told[1][3] == [{"packed": True}] * 3


def test_where_trainer_and_server_meet() -> None:
    address, port = meeting_point("http://localhost:8000")
    assert address == "127.0.0.1" and 1024 < port < 65536


def test_a_trainer_that_fails_on_the_way_keeps_no_worker_waiting() -> None:
    """The error is the trainer's own; the next set of weights connects again."""
    fleet = Fleet(Worker(), Worker())
    moving = transport(fleet)
    moving.move(iter(weights(1)), 0)

    def breaks_off() -> Iterator[tuple[str, Tensor]]:
        yield weights(2)[0]
        raise OSError("the trainer's own")

    with pytest.raises(OSError, match="the trainer's own"):
        moving.move(breaks_off(), 1)
    moving.move(iter(weights(3)), 2)
    assert all(same(worker.taken[-1], weights(3)) for worker in fleet.all.values())
    moving.close()
