"""How a set of weights gets from the trainer to the servers: through a folder, or straight through vLLM's
weight-transfer engines.

    disk   a folder in shared memory or on a shared file system, checked before it is taken; the loss of a server while
           weights move costs that server alone
    nccl   broadcast from the first process's GPU to all workers of all servers (vLLM's)
    ipc    the servers read the trainer's GPUs, on the same GPUs; every process takes part (vLLM's)
    gloo   what nccl does, on CPUs (`gloo_transfer`)

With the last three a failure on the way ends the refit: the servers that were being given the weights refuse to write.
"""

from __future__ import annotations

import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor

from nemo_opd.engines.protocols import NamedTensor
from nemo_opd.engines.vllm import handles
from nemo_opd.engines.vllm.calls import Calls, Servers
from nemo_opd.engines.vllm.client import ServerGone
from nemo_opd.engines.vllm.settings import DISK, LOOPBACK
from nemo_opd.engines.vllm.wire import CONNECT, FINISH, START, UPDATE, Attach, Refit
from nemo_opd.refit.folder import write_folder
from nemo_opd.refit.manifest import Manifest, TensorSpec

_SENDINGS = 3
"""A set of weights is begun so often, each time without the servers that were found lost before a tensor was sent."""


class Transport(Protocol):
    """Moves one set of weights after the other."""

    collective: bool
    """Every process calls `move`; otherwise the first alone."""

    def move(self, weights: Iterable[NamedTensor], version: int) -> int:
        """Have the servers take `weights`; returns their bytes. Raises what made it fail."""

    def close(self) -> None: ...


class FolderTransport:
    """See the module: `disk`."""

    collective = False

    def __init__(self, calls: Calls, servers: Servers) -> None:
        self._calls, self._servers = calls, servers
        self._folder: Path | None = None

    def move(self, weights: Iterable[NamedTensor], version: int) -> int:
        servers = self._servers
        folder = servers.weights_dir / f"version-{version}-{secrets.token_hex(4)}"
        try:
            size = write_folder(weights, folder, version)
            self._calls.take(Refit(servers.session, version, folder.name), Attach(servers.session, reload=False))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.close()
        self._folder = folder  # kept: a server that comes back takes these
        return size

    def close(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


class StreamSource:
    """A vLLM `WeightSource` of streams that can be read once, all with the same tensors in the same order.

    What they are is not known before the first one has gone by: that one is kept in the CPU's memory until it is sent.
    """

    def __init__(self) -> None:
        self._manifest: Manifest | None = None
        self._weights: Iterator[NamedTensor] = iter(())
        self.begun = False
        self.size = 0

    def give(self, weights: Iterable[NamedTensor]) -> None:
        """The next stream."""
        if self._manifest is None:
            kept = [(name, tensor.device, tensor.detach().cpu().clone()) for name, tensor in weights]
            self._manifest = Manifest.of(0, ((name, tensor) for name, _, tensor in kept))
            self._weights = ((name, tensor.to(device)) for name, device, tensor in kept)
        else:
            self._weights = iter(self._manifest.check(weights))
        self.begun, self.size = False, 0

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        assert self._manifest is not None, "give comes first"
        return [ParamMeta(spec.name, getattr(torch, spec.dtype), spec.shape) for spec in self._specs()]

    def _specs(self) -> Sequence[TensorSpec]:
        assert self._manifest is not None
        return self._manifest.tensors

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.begun = True
        for spec, (name, tensor) in zip(self._specs(), self._weights, strict=True):
            if name != spec.name:
                raise ValueError(f"weights: got {name}; expected {spec.name}, in the order of the first set")
            self.size += tensor.nbytes
            yield name, tensor


class SyncClient:
    """The servers as vLLM's trainer-side engines want them: one object with four calls."""

    def __init__(self, calls: Calls, session: str) -> None:
        self._calls, self._session = calls, session
        self.version = -1

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        first = init_info.get("rank_offset", 0)
        infos = []
        for workers in self._calls.workers():
            infos.append({**init_info, "rank_offset": first} if "rank_offset" in init_info else init_info)
            first += workers
        self._calls.transfer(self._session, self.version, CONNECT, infos)

    def start_weight_update(self) -> None:
        self._calls.transfer(self._session, self.version, START, None)

    def update_weights(self, update_info: Any) -> None:
        self._calls.transfer(self._session, self.version, UPDATE, [handles.to_json(update_info)])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._calls.transfer(self._session, self.version, FINISH, None)


class DirectTransport:
    """See the module: `nccl`, `ipc` and `gloo`."""

    def __init__(self, calls: Calls, servers: Servers, rank: int) -> None:
        """`rank` of this process; 0 sends."""
        self.collective = servers.transport == "ipc"
        self._calls, self._servers, self._rank = calls, servers, rank
        self._source, self._client = StreamSource(), SyncClient(calls, servers.session)
        self._engine: Any = None
        self._connected: tuple[str, ...] = ()

    def move(self, weights: Iterable[NamedTensor], version: int) -> int:
        self._source.give(weights)
        self._client.version = version
        for attempt in range(_SENDINGS):
            try:
                self._send()
                return self._source.size
            except ServerGone:
                self.close()
                if self._source.begun or attempt + 1 == _SENDINGS:
                    raise
            except BaseException:
                self.close()
                raise
        raise AssertionError("unreachable")

    def _send(self) -> None:
        if self._rank == 0:
            self._calls.recover(Attach(self._servers.session, reload=False))
            members = self._calls.alive()
            if members != self._connected:
                self.close()
                self._engine, self._connected = self._connect(members), members
        elif self._engine is None:
            self._engine = self._connect(())
        self._engine.send_weights()

    def _connect(self, members: Sequence[str]) -> Any:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        info = self._info(members)
        return WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=self._source)

    def _info(self, members: Sequence[str]) -> Any:
        if self._servers.transport == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            return IPCTrainerInitInfo(packed=True, rank=self._rank)
        address, port = meeting_point(members[0])
        size = 1 + sum(self._calls.workers())
        if self._servers.transport == "nccl":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            return NCCLTrainerInitInfo(address, port, size, rank=self._rank)
        from nemo_opd.engines.vllm.gloo_transfer import GlooTrainerInfo

        return GlooTrainerInfo(address, port, size, self._servers.load_seconds, rank=self._rank)

    def close(self) -> None:
        """Let go of the servers' workers; the next set of weights connects again."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine, self._connected = None, ()


def meeting_point(url: str) -> tuple[str, int]:
    """This machine's address as the server sees it, and a free port there."""
    host = urlsplit(url).hostname or ""
    if host in LOOPBACK:
        address = "127.0.0.1"
    else:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing: it only chooses the interface
            address = probe.getsockname()[0]
    with socket.create_server((address, 0)) as listener:
        return address, listener.getsockname()[1]


def transport_of(calls: Calls, servers: Servers, rank: int) -> Transport:
    """What `servers` say."""
    return FolderTransport(calls, servers) if servers.transport == DISK else DirectTransport(calls, servers, rank)
