"""Weights between Hugging Face folders and a Megatron model spread over ranks, both ways, one parameter at a time.

`load_hf_weights` reads on every rank only the slices that the rank holds. `export_hf_weights` hands every rank every
whole tensor under its Hugging Face name, one after the other. Neither holds the model twice. Writing a folder from the
stream is `nemo_opd.engines.megatron.hf_files.save_hf_checkpoint`.

Process groups come from the model (`model.pg_collection`), so that a teacher with its own layout works as a student
does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_opd.engines.megatron.families import Architecture, read_architecture
from nemo_opd.engines.megatron.hf_files import HFTensors, check_tensors, save_hf_checkpoint
from nemo_opd.engines.megatron.sharding import local_shape, pieces_of
from nemo_opd.engines.megatron.tables import OUTPUT, Shard, Weight
from nemo_opd.engines.protocols import NamedTensor
from nemo_opd.errors import ConfigError

__all__ = ["export_hf_weights", "load_hf_weights", "load_output_weight", "save_hf_checkpoint"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NOT_HERE = -1
_EXPERT = re.compile(r"mlp\.experts\.(local_experts\.|linear_fc[12]\.weight)(?P<expert>\d+)")
"""Names of an expert's weights in a layer, in the local spec and in Transformer Engine's."""

Model = Any
"""A Megatron GPTModel, wrapped (DistributedDataParallel, Float16Module) or not, or the list of a rank's chunks."""


def load_hf_weights(model: Model, folder: str | Path) -> Architecture:
    """Fill this rank's parameters from a Hugging Face folder, converting to each parameter's dtype. Not collective.

    Padding rows of embedding and output layer become zero. All ranks check all names and shapes, so that a bad
    checkpoint fails on every rank alike.

    Returns:
        The folder's architecture, which `export_hf_weights` wants back.

    Raises:
        ConfigError: unsupported architecture, a tensor missing, unknown or of another shape, a damaged file.
    """
    architecture = read_architecture(folder)
    tensors = HFTensors(folder)
    check_tensors(tensors, architecture)
    parts = _Parts(model, architecture)
    for weight in architecture.weights():
        parameter = parts.find(weight)
        if parameter is not None:
            _fill(parameter, weight, architecture, parts, tensors)
    if architecture.tied and OUTPUT.name in tensors.names:
        _check_tied_copy(tensors, architecture)
    return architecture


def export_hf_weights(
    model: Model,
    architecture: Architecture,
    *,
    tensor_of: Callable[[torch.nn.Parameter], Tensor] = lambda parameter: parameter,
    dtype: torch.dtype | None = None,
) -> Iterator[NamedTensor]:
    """Every weight under its Hugging Face name, whole, on every rank, in the order of the layers.

    Collective over the model's tensor-, expert- and pipeline-parallel groups: every rank must exhaust the iterator. For
    each Megatron parameter one all-gather over tensor ranks (of an expert: a broadcast over expert-parallel ranks), on
    the stage that holds it, and one broadcast over stages; one small all-gather over stages at the start, with experts
    an all-reduce more. Data-parallel replicas that share no experts each do it for themselves.

    Args:
        model: the model, all of its ranks calling.
        architecture: as `load_hf_weights` returned it.
        tensor_of: what to export for a parameter, of the parameter's shape: itself, or for instance its gradient.
            Gradients of query and key norms are complete only after Megatron's `finalize_model_grads`.
        dtype: convert to this; None: as it is.

    Yields:
        Name and tensor on the model's device. A tensor may share memory with the parameter: copy it to keep it.
    """
    parts = _Parts(model, architecture)
    weights = [weight for weight in architecture.weights() if not weight.copy]
    stages = _stages_of(weights, parts, tensor_of)
    for weight, (stage, held_dtype) in zip(weights, stages, strict=True):
        parameter = parts.find(weight)
        local = None if parameter is None else tensor_of(parameter).detach()
        shards = _gather(local, weight, architecture, parts, stage, held_dtype)
        for tensor, whole in zip(weight.hf, _join(shards, weight, architecture, parts), strict=True):
            yield tensor.name, whole if dtype is None else whole.to(dtype)


def load_output_weight(
    folder: str | Path, start: int, length: int, vocab_size: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows ``start : start + length`` of a checkpoint's output layer (its embedding where the two are tied).

    Holds the teacher's output layer sharded as the student's, whatever the teacher's own layout. Not collective.

    Args:
        folder: Hugging Face folder of the teacher.
        start: first row.
        length: number of rows.
        vocab_size: rows from this one on are zero; None: the checkpoint's vocabulary.
        dtype: of the answer.

    Returns:
        [length, hidden] on the CPU.

    Raises:
        ConfigError: unsupported checkpoint, a wrong shape, or `vocab_size` larger than the checkpoint's.
    """
    architecture = read_architecture(folder)
    tensors = HFTensors(folder)
    check_tensors(tensors, architecture)
    vocab_size = architecture.vocab_size if vocab_size is None else vocab_size
    if vocab_size > architecture.vocab_size:
        way_out = "use models with the same token ids"
        raise ConfigError(f"{folder}: vocab_size", architecture.vocab_size, f"at least {vocab_size}", way_out)
    rows = torch.zeros(length, architecture.hidden_size, dtype=dtype)
    held = max(0, min(length, vocab_size - start))
    if held:
        rows[:held].copy_(tensors.read(architecture.output.name, start, held))
    return rows


class _Parts:
    """A rank's parameters by their name in the whole model, and its place in the model's groups."""

    def __init__(self, model: Model, architecture: Architecture) -> None:
        chunks = [_unwrap(chunk) for chunk in (model if isinstance(model, Sequence | torch.nn.ModuleList) else [model])]
        self.tp_group, self.pp_group = chunks[0].pg_collection.tp, chunks[0].pg_collection.pp
        self.tp_rank, self.tp_size = self.tp_group.rank(), self.tp_group.size()
        self.pp_rank, self.pp_size = self.pp_group.rank(), self.pp_group.size()
        self.ep_group, self.ep_size, self.experts = None, 1, 0
        if architecture.experts is not None:
            self.ep_group = chunks[0].pg_collection.ep
            self.ep_size = self.ep_group.size()
            self.experts = architecture.experts.count // self.ep_size
        self.padded_vocab = int(chunks[0].vocab_size)
        self._parameters: dict[str, torch.nn.Parameter] = {}
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                self._parameters[self._whole_model_name(name, chunk)] = parameter
        self._check(architecture)

    @property
    def device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    def find(self, weight: Weight) -> torch.nn.Parameter | None:
        """The parameter, or None where another pipeline stage holds it."""
        return next((self._parameters[name] for name in weight.names if name in self._parameters), None)

    def owner(self, weight: Weight) -> int:
        """The expert-parallel rank that holds an expert's weight."""
        assert weight.expert is not None
        return weight.expert // self.experts

    def _whole_model_name(self, name: str, chunk: Any) -> str:
        """A stage numbers its layers, and a rank its experts, from 0. `layer_number` counts in the whole model, from
        1."""
        prefix = "decoder.layers."
        if not name.startswith(prefix):
            return name
        number, rest = name.removeprefix(prefix).split(".", 1)
        if (found := _EXPERT.match(rest)) and self.ep_group is not None:
            expert = int(found["expert"]) + self.experts * self.ep_group.rank()
            rest = f"{rest[: found.start('expert')]}{expert}{rest[found.end('expert') :]}"
        return f"{prefix}{chunk.decoder.layers[int(number)].layer_number - 1}.{rest}"

    def _check(self, architecture: Architecture) -> None:
        unknown = set(self._parameters)
        for weight in architecture.weights():
            unknown.difference_update(weight.names)
            parameter, shape = self.find(weight), local_shape(weight, architecture, self.padded_vocab, self.tp_size)
            if parameter is not None and tuple(parameter.shape) != shape:
                raise ValueError(
                    f"{weight.megatron}: got shape {tuple(parameter.shape)} in the model; expected {shape} from "
                    "config.json; build the model from the same config.json"
                )
        if unknown:
            name = min(unknown)
            raise ValueError(
                f"{name}: got a parameter of the model that no {architecture.family.architecture} weight fills; "
                "expected only those of the family's table; build the model from the same config.json"
            )


def _unwrap(module: Any) -> Any:
    while hasattr(module, "module"):
        module = module.module
    return module


@torch.no_grad()
def _fill(
    parameter: torch.nn.Parameter, weight: Weight, architecture: Architecture, parts: _Parts, tensors: HFTensors
) -> None:
    pieces = pieces_of(weight, architecture, parts.padded_vocab, parts.tp_rank, parts.tp_size)
    if sum(piece.length for piece in pieces) < parameter.shape[pieces[0].dim if pieces else 0]:
        parameter.zero_()  # rows of the padded vocabulary
    for piece in pieces:
        values = tensors.read(weight.hf[piece.tensor].name, piece.start, piece.length, piece.dim)
        parameter.narrow(piece.dim, piece.offset, piece.length).copy_(values)


def _check_tied_copy(tensors: HFTensors, architecture: Architecture, rows: int = 4096) -> None:
    """A tied checkpoint that stores its output layer too must mean the same by it."""
    for start in range(0, architecture.vocab_size, rows):
        length = min(rows, architecture.vocab_size - start)
        embedding = tensors.read(architecture.output.name, start, length)
        if not torch.equal(embedding, tensors.read(OUTPUT.name, start, length)):
            key = f"{tensors.path(OUTPUT.name)}: {OUTPUT.name}"
            got = f"a tensor that differs from {architecture.output.name}"
            way_out = "set tie_word_embeddings to false in config.json, or remove the tensor"
            raise ConfigError(key, got, "an equal one, since config.json ties them", way_out)


def _stages_of(
    weights: list[Weight], parts: _Parts, tensor_of: Callable[[torch.nn.Parameter], Tensor]
) -> list[tuple[int, torch.dtype]]:
    """For every weight the pipeline stage that holds it, and its dtype there."""
    found = [parts.find(weight) for weight in weights]
    codes = [_NOT_HERE if p is None else _DTYPES.index(tensor_of(p).dtype) for p in found]
    mine = torch.tensor(codes, dtype=torch.int64, device=parts.device)
    if parts.ep_size > 1:  # of an expert that another rank holds it is known then that this stage has it
        dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=parts.ep_group)
    everyone = [mine]
    if parts.pp_size > 1:
        everyone = [torch.empty_like(mine) for _ in range(parts.pp_size)]
        dist.all_gather(everyone, mine, group=parts.pp_group)
    answer = []
    for weight, codes_by_stage in zip(weights, torch.stack(everyone, 1).tolist(), strict=True):
        holders = [stage for stage, code in enumerate(codes_by_stage) if code != _NOT_HERE]
        if not holders:
            raise ValueError(
                f"{' or '.join(weight.names)}: got a model in which no pipeline stage has it; expected one stage; "
                "build the model from the same config.json"
            )
        answer.append((holders[0], _DTYPES[codes_by_stage[holders[0]]]))
    return answer


def _gather(
    local: Tensor | None, weight: Weight, architecture: Architecture, parts: _Parts, stage: int, dtype: torch.dtype
) -> Tensor:
    """[tensor ranks, *local shape] on every rank of the model; of an expert [1, *shape].

    Travels as bytes: nothing is rounded, and every backend can carry every dtype.
    """
    shape = local_shape(weight, architecture, parts.padded_vocab, parts.tp_size)
    expert = weight.expert is not None
    if parts.pp_size == 1 and (parts.ep_size == 1 if expert else parts.tp_size == 1):
        assert local is not None
        return local.unsqueeze(0)
    shards = torch.empty((1 if expert else parts.tp_size, *shape), dtype=dtype, device=parts.device)
    if parts.pp_rank == stage:
        if local is not None and expert:
            shards[0].copy_(local)
        if expert and parts.ep_size > 1:
            dist.broadcast(_bytes(shards), group=parts.ep_group, group_src=parts.owner(weight))
        elif not expert:
            assert local is not None
            dist.all_gather_into_tensor(_bytes(shards), _bytes(local.contiguous()), group=parts.tp_group)
    if parts.pp_size > 1:
        dist.broadcast(_bytes(shards), group=parts.pp_group, group_src=stage)
    return shards


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _join(shards: Tensor, weight: Weight, architecture: Architecture, parts: _Parts) -> list[Tensor]:
    """The whole Hugging Face tensors out of all tensor ranks' shards, without padding."""
    shapes = [architecture.shape(tensor) for tensor in weight.hf]
    size = len(shards)
    pieces = [pieces_of(weight, architecture, parts.padded_vocab, rank, size) for rank in range(size)]
    if len(shapes) == 1 and (size == 1 or weight.shard is not Shard.ROW):
        rows = shapes[0][0]  # already in order, one shard behind the other (replicated: the first is all of it)
        return [shards.flatten(0, 1)[:rows]]
    wholes = [torch.empty(shape, dtype=shards.dtype, device=shards.device) for shape in shapes]
    for rank, held in enumerate(pieces):
        for piece in held:
            target = wholes[piece.tensor].narrow(piece.dim, piece.start, piece.length)
            target.copy_(shards[rank].narrow(piece.dim, piece.offset, piece.length))
    return wholes
