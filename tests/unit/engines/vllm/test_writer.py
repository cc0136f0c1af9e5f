"""A writer's requests while its weights change: on a stand-in for vLLM's engine, which fails when it is told to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_opd.engines.vllm.settings import ServerSettings
from nemo_opd.engines.vllm.wire import Attach, Generate, Refit, WireRequest, WireSampling
from nemo_opd.refit.folder import write_folder
from tests.helpers.servers import need_vllm
from tests.helpers.tiny import tiny_checkpoint

pytestmark = pytest.mark.slow  # importing vLLM takes ten seconds


class Engine:
    """Writes for ever. `loading` is waited for in the middle of a load; `fails` ends it."""

    model_config = SimpleNamespace(get_vocab_size=lambda: 40)
    vllm_config = SimpleNamespace(use_v2_model_runner=False)

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.versions: list[str] = []
        self.loading = threading.Event()
        self.loading.set()
        self.fails = False

    def add_request(self, id: str, prompt: Any, params: Any) -> None:
        self.running.add(id)

    def abort_request(self, ids: list[str]) -> None:
        self.running -= set(ids)

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def step(self) -> list[Any]:
        return []

    def collective_rpc(self, name: str, kwargs: Mapping[str, Any]) -> None:
        assert self.loading.wait(20)
        if self.fails:
            raise OSError("the disk is gone")

    def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        return True

    def set_weight_version(self, version: str) -> None:
        self.versions.append(version)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_vllm()
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def writer(model: Path, tmp_path: Path, engine: Engine) -> Iterator[Any]:
    from safetensors.torch import load_file

    from nemo_opd.engines.vllm.engine import EngineThread
    from nemo_opd.engines.vllm.writer import Writer

    weights: dict[str, torch.Tensor] = load_file(model / "model.safetensors")
    for version in (1, 2):
        write_folder(weights.items(), tmp_path / f"version-{version}", version)
    thread = EngineThread(engine)  # type: ignore[arg-type]
    thread.start()
    settings = ServerSettings(model=str(model), role="writer", ready_file="", weights_dir=str(tmp_path))
    yield Writer(settings, thread)
    engine.loading.set()
    thread.stop()


def message(session: str = "a") -> Generate:
    request = WireRequest(0, (1, 2), (), 1, 8)
    return Generate((request,), session, WireSampling(1.0, 1.0, 0, False), eos_ids=())


def refit(version: int) -> Refit:
    return Refit("a", version, f"version-{version}")


async def everything(lines: AsyncGenerator[Mapping[str, Any], None]) -> list[Mapping[str, Any]]:
    return [line async for line in lines]


async def running(engine: Engine, count: int) -> None:
    async with asyncio.timeout(20):
        while len(engine.running) != count:
            await asyncio.sleep(0.01)


def ended(lines: list[Mapping[str, Any]]) -> bool:
    """Did the stream end as it should, rather than break off?"""
    return any("end" in line for line in lines)


def test_requests_go_on_when_weights_change(writer: Any, engine: Engine) -> None:
    async def play() -> None:
        await writer.attach(Attach("a", reload=True))
        writing = asyncio.create_task(everything(writer.generate(message())))
        await running(engine, 1)
        await writer.refit(refit(1))
        await asyncio.sleep(0.1)
        assert not writing.done() and len(engine.running) == 1 and engine.versions == ["1"]
        writing.cancel()

    asyncio.run(play())


def test_a_load_that_fails_half_way_drops_them_and_their_streams_break_off(writer: Any, engine: Engine) -> None:
    """Whoever waits can ask another server; nothing is written with half of the new weights."""

    async def play() -> None:
        await writer.attach(Attach("a", reload=True))
        writing = asyncio.create_task(everything(writer.generate(message())))
        await running(engine, 1)
        engine.fails = True
        with pytest.raises(OSError):
            await writer.refit(refit(1))
        lines = await asyncio.wait_for(writing, 20)
        assert lines and not ended(lines) and not engine.running
        assert writer.refusal and writer.health()["status"] == "refusing"
        engine.fails = False
        await writer.refit(refit(1))
        assert not writer.refusal

    asyncio.run(play())


def test_requests_that_come_while_weights_are_loaded_wait_for_them(writer: Any, engine: Engine) -> None:
    async def play() -> None:
        await writer.attach(Attach("a", reload=True))
        engine.loading.clear()
        load = asyncio.create_task(writer.refit(refit(1)))
        async with asyncio.timeout(20):
            while not writer.refusal:
                await asyncio.sleep(0.01)
        lines = writer.generate(message())
        assert list(await anext(lines)) == ["steps"], "the client hears that the server is alive"
        writing = asyncio.create_task(everything(lines))
        await asyncio.sleep(0.1)
        assert not engine.running
        engine.loading.set()
        await load
        await running(engine, 1)
        writing.cancel()

        engine.loading.clear()
        engine.fails = True
        load = asyncio.create_task(writer.refit(refit(2)))
        async with asyncio.timeout(20):
            while not writer.refusal:
                await asyncio.sleep(0.01)
        writing = asyncio.create_task(everything(writer.generate(message())))
        await asyncio.sleep(0.05)
        engine.loading.set()
        with pytest.raises(OSError):
            await load
        lines_of_failed = await asyncio.wait_for(writing, 20)
        assert lines_of_failed and not ended(lines_of_failed) and not engine.running

    asyncio.run(play())


def test_a_new_session_ends_the_streams_of_the_old_one(writer: Any, engine: Engine) -> None:
    async def play() -> None:
        await writer.attach(Attach("a", reload=True))
        writing = asyncio.create_task(everything(writer.generate(message())))
        await running(engine, 1)
        await writer.attach(Attach("b", reload=True))
        assert not ended(await asyncio.wait_for(writing, 20)) and not engine.running
        assert writer.engine.running == 0

    asyncio.run(play())
