"""Who works with whom: the default process group, the student's groups and the teacher's.

The student lives in Megatron's global state (`megatron.core.parallel_state`), as a Megatron user expects. The teacher
has its own layout over the same processes and therefore its own `ProcessGroupCollection`, which never touches that
state. Both number their ranks alike, tensor parallel fastest, then context parallel, data parallel, pipeline parallel:

    rank = tp + TP * (cp + CP * (dp + DP * pp))

so that a teacher with the student's layout holds its answers where the student's loss wants them.

Expert parallelism spreads the experts of a layer over ranks that attention counts as tensor or data parallel: the ranks
of a stage in their order, expert parallel fastest. Experts are not cut by tensor parallelism (Megatron's
``expert_tensor_parallel_size`` is 1), so they are spread over EP consecutive ranks and repeated TP x DP / EP times.
"""

from __future__ import annotations

import gc
import os
import weakref
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed.rendezvous import rendezvous

from nemo_opd.config import LayoutConfig
from nemo_opd.engines.megatron import cpu
from nemo_opd.engines.protocols import Place
from nemo_opd.errors import ConfigError

_timeout = timedelta(minutes=30)
"""Of the collectives of every group that is made here."""


def init_distributed(timeout: timedelta | None = None) -> None:
    """Join the default process group from the variables that torchrun sets; alone where some are missing.

    The group carries CPU tensors over gloo, and CUDA tensors over NCCL where there is CUDA. Does nothing when the
    group exists. `timeout` is that of all collectives from now on, also of groups made later.
    """
    global _timeout
    cpu.install()
    _timeout = timeout or _timeout
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        store, rank, size = _launcher_store()
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=_timeout)
    if torch.cuda.is_available():
        # NCCL connects at the first call, in which all ranks must take part; later point-to-point calls involve a few.
        dist.all_reduce(torch.zeros(1, device=cpu.device()))


def _launcher_store() -> tuple[dist.Store, int, int]:
    """The launcher's store, this process's rank and the number of processes.

    torchrun keeps its store when it starts the processes again, and with it the addresses of those that are gone, which
    the new ones would try to reach: so each start has names of its own in it.
    """
    store, rank, size = next(rendezvous("env://", timeout=_timeout))
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), rank, size


@dataclass(frozen=True)
class Layout:
    """Sizes of a model's layout over `world_size` processes and this process's coordinates in it."""

    tp: int
    pp: int
    dp: int
    rank: int
    ep: int = 1
    cp: int = 1
    vp: int = 1
    """Chunks of layers on each pipeline stage."""

    @classmethod
    def of(cls, config: LayoutConfig, key: str) -> Layout:
        """From the configuration under `key` (student, teacher) and the default process group.

        Raises ConfigError when the world is no multiple of TP x CP x PP, or a stage's ranks none of EP.
        """
        tp, pp, world = config.tensor_model_parallel_size, config.pipeline_model_parallel_size, dist.get_world_size()
        cp = config.context_parallel_size
        if world % (tp * cp * pp):
            sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
            if cp > 1:
                sizes["context_parallel_size"] = cp
            raise ConfigError(
                " x ".join(f"{key}.{name}" for name in sizes),
                f"{' x '.join(map(str, sizes.values()))} over {world} processes",
                "a product that divides the number of processes",
                "start another number of processes or change the layout",
            )
        ep = config.expert_model_parallel_size
        if world // pp % ep:
            raise ConfigError(
                f"{key}.expert_model_parallel_size",
                f"{ep} over {world // pp} processes of a pipeline stage",
                "a divisor of their number",
                "start another number of processes or change the layout",
            )
        return cls(tp, pp, world // (tp * cp * pp), dist.get_rank(), ep, cp, config.chunks)

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def cp_rank(self) -> int:
        return self.rank // self.tp % self.cp

    @property
    def dp_rank(self) -> int:
        return self.rank // (self.tp * self.cp) % self.dp

    @property
    def pp_rank(self) -> int:
        return self.rank // self.stage_size

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage, of all replicas together."""
        return self.tp * self.cp * self.dp

    @property
    def ep_rank(self) -> int:
        return self.rank % self.stage_size % self.ep

    @property
    def expert_replica(self) -> int:
        """Which copy of the experts this rank holds a part of."""
        return self.rank % self.stage_size // self.ep

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def virtual(self) -> int | None:
        """Chunks of a stage as Megatron is told of them: None for one, without interleaving."""
        return self.vp if self.vp > 1 else None

    def has_embedding(self, chunk: int) -> bool:
        """Does this chunk of the rank's layers begin the model?"""
        return self.is_first_stage and chunk == 0

    def has_output(self, chunk: int) -> bool:
        """Does this chunk of the rank's layers end the model?"""
        return self.is_last_stage and chunk == self.vp - 1

    def whole_rounds(self, rows: int) -> int:
        """So many rows Megatron's schedule takes where there are `rows`. Interleaved stages pass them on in rounds of
        as many as there are stages."""
        return rows if self.vp == 1 else max(1, -(-rows // self.pp)) * self.pp

    def last_stage_ranks(self, replica: int) -> tuple[int, ...]:
        """Global ranks of a replica's last pipeline stage, by context, then tensor parallel rank."""
        each = self.tp * self.cp
        first = each * (replica + self.dp * (self.pp - 1))
        return tuple(range(first, first + each))

    def place(self) -> Place:
        """This process as the loop sees it."""
        return Place(
            rank=self.rank,
            world_size=self.stage_size * self.pp,
            data_parallel_rank=self.dp_rank,
            data_parallel_size=self.dp,
            loss_ranks=tuple(self.last_stage_ranks(replica) for replica in range(self.dp)),
        )


def student_groups(layout: Layout, seed: int) -> ProcessGroupCollection:
    """Set Megatron's global parallel state to the student's layout and return its groups.

    Collective the first time; trainer and scorer may both call it, in any order.
    Raises RuntimeError when the state holds another layout: `destroy_student_groups` first.
    """
    with cpu.megatron_device():
        if not parallel_state.model_parallel_is_initialized():
            before = set(_existing_groups())
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=layout.tp,
                pipeline_model_parallel_size=layout.pp,
                virtual_pipeline_model_parallel_size=layout.virtual,
                context_parallel_size=layout.cp,
                expert_model_parallel_size=layout.ep,
                expert_tensor_parallel_size=1,
                create_gloo_process_groups=torch.cuda.is_available(),
                distributed_timeout_minutes=int(_timeout.total_seconds() // 60),
            )
            _ours.extend(group for group in _existing_groups() if group not in before)
            # Without dropout nothing is drawn from Megatron's random states, but its modules look them up.
            with torch.random.fork_rng(devices=[]):
                model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        sizes = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_expert_model_parallel_world_size(),
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        )
        if sizes != (expected := (layout.tp, layout.pp, layout.ep, layout.cp, layout.vp)):
            raise RuntimeError(f"Megatron's parallel state is TP, PP, EP, CP, VP = {sizes}; expected {expected}")
        assert parallel_state.get_tensor_model_parallel_rank() == layout.tp_rank
        assert parallel_state.get_pipeline_model_parallel_rank() == layout.pp_rank
        assert parallel_state.get_context_parallel_rank() == layout.cp_rank
        assert parallel_state.get_data_parallel_rank() == layout.dp_rank
        assert parallel_state.get_expert_model_parallel_rank() == layout.ep_rank
        return ProcessGroupCollection.use_mpu_process_groups()


def destroy_student_groups() -> None:
    """Forget the groups of student and teacher, so that another layout can be set up (tests, a tool that loads two).

    Megatron forgets its groups without ending them. A gloo group keeps three threads that wake up now and then, and a
    layout has dozens of groups: a process that sets up a hundred layouts would do little else. Collective.
    """
    parallel_state.destroy_model_parallel()
    for name, value in vars(parallel_state).items():
        if isinstance(value, dist.ProcessGroup):  # some are not forgotten
            setattr(parallel_state, name, None)
    for method in vars(RotaryEmbedding).values():
        if hasattr(method, "cache_clear"):  # remembers results by module, and so modules with their groups
            method.cache_clear()
    for wrapper in list(_wrappers):
        vars(wrapper).clear()
    while _ours:
        dist.destroy_process_group(_ours.pop())
    gc.collect()  # models and optimizers hold groups in cycles, and a group's threads end with its last reference


_wrappers: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
"""Of models that are trained. Such a wrapper hooks itself into autograd's nodes. Where its model still holds a tensor
of the last step (the router's probabilities), nodes, wrapper and groups hold one another out of sight of Python's
collector."""


def remember(wrapper: DistributedDataParallel) -> None:
    """`destroy_student_groups` empties it."""
    _wrappers.add(wrapper)


_ours: list[dist.ProcessGroup] = []
"""Groups that this module made, in order of making."""


def _existing_groups() -> list[dist.ProcessGroup]:
    return list(dist.distributed_c10d._world.pg_map)


def teacher_groups(layout: Layout) -> ProcessGroupCollection:
    """The teacher's groups, apart from Megatron's global state. Collective: every rank calls it at the same point."""
    groups = ProcessGroupCollection()
    groups.tp = _group(layout, "tp")
    groups.dp = _group(layout, "dp")
    groups.pp = _group(layout, "pp")
    groups.mp = _group(layout, "tp", "pp")
    groups.embd = _group(layout, "pp", only=(0, layout.pp - 1))
    groups.pos_embd = None
    # Experts are not cut, and mostly sequences neither: these groups are others or this rank alone.
    groups.expt_tp = _group(layout)
    groups.cp = _group(layout, "cp") if layout.cp > 1 else groups.expt_tp
    groups.tp_cp = _group(layout, "tp", "cp") if layout.cp > 1 else groups.tp
    groups.dp_cp = _group(layout, "dp", "cp") if layout.cp > 1 else groups.dp
    groups.tp_dp_cp = _group(layout, "tp", "dp", "cp")
    groups.ep = groups.tp_ep = _group(layout, "ep") if layout.ep > 1 else groups.expt_tp
    groups.expt_dp = _group(layout, "expert_replica") if layout.ep > 1 else groups.tp_dp_cp
    groups.tp_ep_pp = _group(layout, "ep", "pp") if layout.ep > 1 else groups.pp
    return groups


def _group(layout: Layout, *varying: str, only: tuple[int, ...] | None = None) -> dist.ProcessGroup | None:
    """This rank's group of ranks that differ in the `varying` coordinates alone; with `only`, of these stages alone.

    Coordinates are those of attention (tp, cp, dp, pp) or, where `varying` names one of them, of experts (ep,
    expert_replica, pp).
    """
    of_experts = {"ep", "expert_replica"} & {*varying}
    by_coordinates: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.stage_size * layout.pp):
        other = replace(layout, rank=rank)
        if only is None or other.pp_rank in only:
            fixed = {"ep": other.ep_rank, "expert_replica": other.expert_replica, "pp": other.pp_rank}
            if not of_experts:
                fixed = {"tp": other.tp_rank, "cp": other.cp_rank, "dp": other.dp_rank, "pp": other.pp_rank}
            key = tuple(value for name, value in fixed.items() if name not in varying)
            by_coordinates.setdefault(key, []).append(rank)
    mine, _ = dist.new_subgroups_by_enumeration(list(by_coordinates.values()), timeout=_timeout)
    if isinstance(mine, dist.ProcessGroup):
        _ours.append(mine)
    return mine
