"""What GPUs can do, and what is assumed about how much of it a run gets: every number that a plan rests on, named.

Nothing here was measured on a GPU. Peaks are those of public data sheets; efficiencies are assumptions, each of which
``nemo-opd plan --assume NAME=NUMBER`` replaces.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from nemo_opd.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One GPU of an 8-GPU node. Rates are per second and GPU; of links, bytes in one direction."""

    name: str
    memory: float
    """Bytes that processes can have."""
    bf16: float
    """Dense matrix products, floating-point operations."""
    fp8: float
    """The same in FP8."""
    bandwidth: float
    """Bytes of memory."""
    nvlink: float
    capability: tuple[int, int]
    """Compute capability."""
    source: str

    @property
    def blackwell(self) -> bool:
        """May products in FP8 read a matrix along columns?"""
        return self.capability >= (10, 0)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "h100", 81_559 * 2**20, 989e12, 1979e12, 3.35e12, 450e9, (9, 0),
            "NVIDIA H100 SXM data sheet: 80 GB (81,559 MiB in nvidia-smi), 3.35 TB/s, 1,979 TFLOP/s bf16 "
            "and 3,958 FP8 with sparsity, half of it dense, NVLink 900 GB/s both ways",
        ),
        Gpu(
            "h200", 143_771 * 2**20, 989e12, 1979e12, 4.8e12, 450e9, (9, 0),
            "NVIDIA H200 SXM data sheet: 141 GB (143,771 MiB in nvidia-smi), 4.8 TB/s, arithmetic and NVLink of H100",
        ),
        Gpu(
            "b200", 180e9, 2250e12, 4500e12, 8e12, 900e9, (10, 0),
            "NVIDIA DGX B200 data sheet, an eighth of it: 1,440 GB, 64 TB/s, NVLink 14.4 TB/s both ways; 4.5 PFLOP/s "
            "bf16 and 9 FP8 with sparsity, half of it dense",
        ),
    )
}  # fmt: skip
"""By the name that ``--gpu`` takes."""


@dataclass(frozen=True)
class Assumptions:
    """What is taken for granted. Shares are of the peaks above unless something else is said."""

    train_efficiency: float = 0.5
    """Of the peak, in matrix products of the student's layers, forward and backward."""
    expert_efficiency: float = 0.3
    """The same of a mixture of experts."""
    score_efficiency: float = 0.55
    """The same of a teacher's forward."""
    loss_efficiency: float = 0.55
    """The same of output layers and their gradients."""
    prefill_efficiency: float = 0.4
    """The same where a writer reads prompts."""
    fp8_efficiency: float = 0.7
    """Of any of these, what is left in FP8: casts, scales and transposed copies come beside its matrix products."""
    decode_bandwidth: float = 0.6
    """Of the memory's bandwidth, where a writer writes tokens."""
    memory_bandwidth: float = 0.75
    """Of it, in element-wise work: optimizer, softmax."""
    nvlink_efficiency: float = 0.75
    network_efficiency: float = 0.8
    network: float = 50e9
    """Bytes per second and GPU, one direction: a 400 Gb/s port for each GPU (DGX H100, H200, B200)."""
    pcie: float = 50e9
    """Bytes per second between a GPU and its host."""
    disk: float = 2e9
    """Bytes per second of a shared file system, for one writer or for all readers of the same file together."""
    host_network: float = 1e9
    """Bytes per second that a process receives through gloo."""
    text_tokens: float = 3e6
    """Tokens per second that a process turns into text. (3.8e6 on one core of a 2-core x86_64 machine, for a byte-level
    BPE of 20,000 entries.)"""
    call_seconds: float = 20e-6
    """Of one collective call between GPUs of a node, whatever its size."""
    hop_seconds: float = 5e-6
    """More for each further node in a ring."""
    decode_seconds: float = 3e-3
    """Of one step of a vLLM server besides the arithmetic: scheduler, sampler, launches."""
    hf_decode_seconds: float = 30e-3
    """The same of the embedded generator."""
    step_seconds: float = 2.0
    """Of a step besides all parts: prompts, verifier, packing, records."""
    response_share: float = 1.0
    """Mean response over `rollout.max_new_tokens`: 1 plans for responses that are all as long as allowed."""
    reserved_gib: float = 4.0
    """Of a GPU that no tensor gets: CUDA context, NCCL's and cuBLAS's workspaces."""
    asleep_gib: float = 1.5
    """What a colocated server keeps while it sleeps."""
    slack: float = 1.08
    """Factor on what comes and goes (activations, buffers), for memory that the allocator cannot use."""

    def with_words(self, words: Iterable[str]) -> Assumptions:
        """The same with ``NAME=NUMBER`` words of a command line. Raises ConfigError for another name or no number."""
        changed = {}
        names = [field.name for field in fields(self)]
        for word in words:
            name, _, text = word.partition("=")
            try:
                value = float(text)
            except ValueError:
                value = float("nan")
            if name not in names or not value > 0:
                expected = f"NAME=NUMBER, the number above 0 and the name one of {', '.join(names)}"
                raise ConfigError("--assume", word, expected, "see nemo_opd/planning/gpus.py")
            changed[name] = value
        return replace(self, **changed)


@dataclass(frozen=True)
class Cluster:
    """The machine that is planned for."""

    gpu: Gpu
    nodes: int
    """Of the trainer's processes; servers that stand elsewhere have nodes of their own."""
    gpus_per_node: int
    assumptions: Assumptions

    def seconds_of(self, size: int, stride: int, moved: float, calls: int, rounds: float) -> tuple[str, float]:
        """(link, seconds) of collectives over groups of `size` ranks that are `stride` apart.

        Args:
            moved: bytes that a rank sends in all calls together.
            rounds: how often a call goes round the ring: 1 for a gather or scatter, 2 for a reduction to all.

        A ring through several nodes uses the ports of all its ranks on a node; the slower of port and NVLink counts.
        """
        assumed = self.assumptions
        inside = max(1, min(size, self.gpus_per_node // stride))
        nvlink = self.gpu.nvlink * assumed.nvlink_efficiency
        if inside >= size:
            return "NVLink", moved / nvlink + calls * assumed.call_seconds
        rate = min(nvlink, assumed.network * assumed.network_efficiency * inside)
        hops = rounds * (size / inside - 1) * assumed.hop_seconds
        return "network", moved / rate + calls * (assumed.call_seconds + hops)
