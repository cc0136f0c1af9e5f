"""Weights over gloo: a weight-transfer engine of vLLM's kind for machines without a GPU.

vLLM's own engines, `nccl` and `ipc`, need GPUs. This one goes through the same interface on both sides (vLLM lets more
of them be registered): what surrounds the copy is the same, so it is tested where there is no GPU, and weights can
reach servers on other CPU nodes without a shared file system. Worker and trainer import this module to register it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from threading import Thread
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
from torch.distributed.distributed_c10d import BroadcastOptions
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

NAME = "gloo"


@dataclass
class GlooWorkerInfo(WeightTransferInitInfo):
    """What a server's worker must know to join."""

    master_address: str
    master_port: int
    rank_offset: int
    """Rank of the server's first worker; the trainer's is 0."""
    world_size: int
    seconds: float
    """In which anything that is waited for must happen."""


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The tensors of a set of weights, in the order in which they come."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


@dataclass
class GlooTrainerInfo(TrainerInitInfo):
    """What the trainer's side starts with."""

    backend: ClassVar[str] = NAME

    master_address: str
    master_port: int
    world_size: int
    seconds: float


def _join(info: GlooWorkerInfo | GlooTrainerInfo, rank: int) -> ProcessGroupGloo:
    wait = timedelta(seconds=info.seconds)
    store = TCPStore(info.master_address, info.master_port, info.world_size, rank == 0, wait)
    return ProcessGroupGloo(PrefixStore("weights", store), rank, info.world_size, wait)


def _broadcast(group: ProcessGroupGloo, tensor: Tensor) -> None:
    """From rank 0, as bytes: gloo does not know every dtype."""
    options = BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([tensor.view(-1).view(torch.uint8)], options).wait()  # type: ignore[attr-defined]  # torch's stubs


class GlooWorker(WeightTransferEngine[GlooWorkerInfo, GlooUpdateInfo]):
    """A server's side. See `vllm.distributed.weight_transfer.base.WeightTransferEngine`."""

    init_info_cls = GlooWorkerInfo
    update_info_cls = GlooUpdateInfo
    _group: ProcessGroupGloo | None = None

    def init_transfer_engine(self, init_info: GlooWorkerInfo) -> None:
        self._group = _join(init_info, init_info.rank_offset + self.parallel_config.rank)

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # the base class waits for an accelerator besides

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        self.model.load_weights(self._arriving(update_info))

    def _arriving(self, info: GlooUpdateInfo) -> Iterator[tuple[str, Tensor]]:
        if self._group is None:
            raise RuntimeError("weight transfer: got an update before the trainer connected")
        for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            _broadcast(self._group, tensor)
            yield name, tensor

    def shutdown(self) -> None:
        self._group = None


class GlooTrainer(TrainerWeightTransferEngine[GlooTrainerInfo]):
    """The trainer's side. See `vllm.distributed.weight_transfer.base.TrainerWeightTransferEngine`."""

    init_info_cls = GlooTrainerInfo
    _group: ProcessGroupGloo | None = None

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        values = {name: value for name, value in asdict(init_info).items() if name != "rank"}
        with _Beside(client.init_weight_transfer_engine, {**values, "rank_offset": 1}):
            engine._group = _join(init_info, 0)
        return engine

    def send_weights(self) -> None:
        assert self.source is not None
        tensors = self.source.metadata()
        info = GlooUpdateInfo(
            names=[tensor.name for tensor in tensors],
            dtype_names=[str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
            shapes=[list(tensor.shape) for tensor in tensors],
        )
        self.client.start_weight_update()
        with _Beside(self.client.update_weights, asdict(info)):
            self._send()
        self.client.finish_weight_update()

    def _send(self) -> None:
        assert self.source is not None and self._group is not None
        try:
            for _, tensor in self.source:
                _broadcast(self._group, tensor.detach().contiguous())
        except BaseException:
            self.shutdown()  # which the workers notice: they would wait for the next tensor until their time is up
            raise

    def shutdown(self) -> None:
        self._group = None


class _Beside:
    """A call to the servers in a thread, while this one does its part. What it raises is raised at the end, unless this
    thread's part failed: then the servers' failures follow from that."""

    def __init__(self, call: Any, argument: Any) -> None:
        self._failure: BaseException | None = None
        self._thread = Thread(target=self._body, args=(call, argument), name="weight transfer", daemon=True)

    def _body(self, call: Any, argument: Any) -> None:
        try:
            call(argument)
        except BaseException as error:  # noqa: BLE001 - belongs to the thread that waits
            self._failure = error

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._thread.join()
        if self._failure is not None and error is None:
            raise self._failure


WeightTransferEngineFactory.register_engine(NAME, GlooWorker)
WeightTransferTrainerFactory.register_engine(NAME, GlooTrainer)
