"""Updated parameters on their way to all replicas, under `optimizer.overlap_param_gather`.

With the distributed optimizer each replica updates a part of the parameters and gets the rest from the others.
Megatron gathers within the update or, told to overlap, once a module of the next forward pass asks. Here all gathering
begins right after the update, bucket by bucket in the order of the forward pass, and whoever reads a parameter waits
for its bucket: modules by Megatron's hooks, anybody else by `finish`. So the gathering has the next rollouts and scores
to hide behind besides the forward pass, a rank's own work is not held up by a neighbour that comes later to its forward
pass, and, as all ranks begin at the same point, none waits for one that reads nothing.
"""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch.nn import Parameter


class ParameterGathering:
    """What is on its way to the parameters of a model's wrapped chunks; nothing ever is where nothing overlaps.

    Outside a training step every bucket is whole or on its way, so that `finish` only waits.
    """

    def __init__(self, wrapped: list[DistributedDataParallel]) -> None:
        self._group_of = {
            parameter: group for wrapper in wrapped for parameter, group in wrapper.param_to_bucket_group.items()
        }
        self._groups = [group for wrapper in wrapped if wrapper.use_forward_hook for group in _in_order(wrapper)]
        for group in self._groups:
            group.param_gather_dispatched = True  # every rank has read all weights

    def start(self) -> None:
        """Begin with what the last update changed. Collective over the replicas, also where it was left out."""
        for group in self._groups:
            group.start_param_sync()

    def finish(self, *parameters: Parameter) -> None:
        """Wait until these parameters are whole, or all (none named)."""
        if self._groups:
            for group in [self._group_of[parameter] for parameter in parameters] or self._groups:
                group.finish_param_sync(skip_next_bucket_dispatch=True)


def _in_order(wrapper: DistributedDataParallel) -> list[Any]:
    """Of the forward pass: Megatron fills buckets from the end of a model, experts apart."""
    return [*reversed(wrapper.bucket_groups), *reversed(wrapper.expert_parallel_bucket_groups)]
