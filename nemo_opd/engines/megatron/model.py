"""A Megatron GPT model from a Hugging Face folder: this rank's part of it, with its weights.

The model ends in its last hidden states, after the final norm. Logits are made where the loss is computed, a chunk of
tokens at a time (`nemo_opd.vocab.fused`), or by the scorer; never for a whole row.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_opd.config import LayoutConfig, StudentConfig
from nemo_opd.engines.megatron import cpu, fp8
from nemo_opd.engines.megatron.context import Context
from nemo_opd.engines.megatron.eager import swiglu
from nemo_opd.engines.megatron.families import Architecture, read_architecture
from nemo_opd.engines.megatron.local import AttentionInputs, PackedAttention, RMSNorm, attention_inputs
from nemo_opd.engines.megatron.parallel import Layout
from nemo_opd.engines.megatron.rows import ModelInputs, model_inputs
from nemo_opd.engines.megatron.weights import load_hf_weights
from nemo_opd.errors import ConfigError
from nemo_opd.vocab.shard import VocabShard

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def have_transformer_engine() -> bool:
    """Transformer Engine runs on CUDA only; without it Megatron's local layer spec is used."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def dtype_of(name: str, key: str) -> torch.dtype:
    """The torch dtype of a configured name; ConfigError names `key`."""
    if name not in DTYPES:
        raise ConfigError(key, name, f"one of {', '.join(DTYPES)}", "choose one of them")
    return DTYPES[name]


class HiddenStateModel(GPTModel):
    """`GPTModel` whose forward pass ends in the last hidden states (or a stage's output) of one packed row."""

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Run this pipeline stage on one row, or on what this rank holds of it.

        Returns:
            [row, 1, hidden]; under sequence parallelism [row / TP, 1, hidden]. On the last stage after the final norm.
        """
        embedded = self.embedding(inputs.input_ids, inputs.position_ids) if self.pre_process else None
        if embedded is not None:  # transposed by Megatron: with these strides torch copies a frozen weight per position
            embedded = embedded.flatten(0, 1).unsqueeze(1)
        if inputs.packed is not None:  # Transformer Engine restarts the angles at `cu_seqlens`
            angles = self.rotary_pos_emb(inputs.longest, packed_seq=True)
            return self.decoder(
                hidden_states=embedded, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=inputs.packed
            )
        return self.decoder(hidden_states=embedded, attention_mask=self._attention_inputs(inputs))

    def _attention_inputs(self, inputs: ModelInputs) -> AttentionInputs:
        """For the local attention, which turns query and key itself."""
        assert inputs.runs is not None
        # Megatron caches the table by length: a power of two keeps the number of tables small. `packed_seq`: whole,
        # where it would otherwise give a context-parallel rank its part of one long sequence.
        table = self.rotary_pos_emb(1 << (inputs.longest - 1).bit_length(), packed_seq=True)
        angles = table[inputs.position_ids[0]]
        return attention_inputs(inputs.runs, angles, self.config.params_dtype, self.context_group)

    @property
    def context_group(self) -> dist.ProcessGroup | None:
        """Ranks over which sequences are cut, where they are."""
        group = self.pg_collection.cp
        return group if group.size() > 1 else None

    def last_hidden(self, output: Tensor) -> Tensor:
        """[row, hidden], whole on every tensor-parallel rank, from what `forward` gave on the last stage.

        Under sequence parallelism backward sums the gradients of all tensor-parallel ranks (its reduce-scatter), so
        each rank must hand in its own part of the sum; otherwise each must hand in the complete gradient.
        """
        if self.config.sequence_parallel:
            output = gather_from_sequence_parallel_region(output, group=self.pg_collection.tp)
        return output.squeeze(1)

    @property
    def output_weight(self) -> torch.nn.Parameter:
        """[local rows, hidden] of the output layer; the tied embedding's where the two are one. Last stage only."""
        assert self.post_process
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def vocab_shard(self, vocab_size: int) -> VocabShard:
        """Which rows `output_weight` holds, `vocab_size` of the padded vocabulary being real."""
        group = self.pg_collection.tp
        rows = self.vocab_size // group.size()
        return VocabShard(vocab_size, group.rank() * rows, rows, group if group.size() > 1 else None)

    def inputs(self, input_ids: Tensor, cu_seqlens: Tensor) -> ModelInputs:
        """A row for `forward` (this rank's part of it), from CPU tensors."""
        parts = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        multiple = parts * fp8.row_multiple(self.config)
        context = Context(self.pg_collection.cp.size(), self.pg_collection.cp.rank())
        return model_inputs(input_ids, cu_seqlens, multiple, have_transformer_engine(), cpu.device(), context)


Row = TypeVar("Row")


class ModelChunks(torch.nn.ModuleList):
    """A rank's part of a model: its chunks of layers, in the order that a row passes them.

    One chunk, except under interleaved pipeline stages: there a row comes by once for each. The last stage's last chunk
    ends the model.
    """

    @property
    def chunks(self) -> list[HiddenStateModel]:
        return [*self]

    @property
    def config(self) -> TransformerConfig:
        """All chunks have the same one."""
        return self.chunks[0].config

    @property
    def pg_collection(self) -> ProcessGroupCollection:
        return self.chunks[0].pg_collection

    @property
    def context_group(self) -> dist.ProcessGroup | None:
        """Ranks over which sequences are cut, where they are."""
        return self.chunks[0].context_group

    @property
    def output_weight(self) -> torch.nn.Parameter:
        """See `HiddenStateModel.output_weight`."""
        return self.chunks[-1].output_weight

    def last_hidden(self, output: Tensor) -> Tensor:
        """See `HiddenStateModel.last_hidden`."""
        return self.chunks[-1].last_hidden(output)

    def vocab_shard(self, vocab_size: int) -> VocabShard:
        """See `HiddenStateModel.vocab_shard`."""
        return self.chunks[-1].vocab_shard(vocab_size)

    def inputs(self, input_ids: Tensor, cu_seqlens: Tensor) -> ModelInputs:
        """See `HiddenStateModel.inputs`; the same for every chunk."""
        return self.chunks[0].inputs(input_ids, cu_seqlens)

    def passes(self, rows: Iterable[Row]) -> list[Iterator[Row]]:
        """What Megatron's schedules want of the rows: all of them for each chunk. Each is made when it is asked for
        first, and kept until it has passed the last chunk."""
        return [*itertools.tee(rows, len(self))]

    def sharded_state_dict(self, metadata: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Megatron's, of each chunk. What is sharded in it has names that count layers in the whole model."""
        return {n: chunk.sharded_state_dict(metadata=metadata) for n, chunk in enumerate(self.chunks)}

    def load_sharded(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Take back what `sharded_state_dict` described and a checkpoint filled in."""
        for n, chunk in enumerate(self.chunks):
            chunk.load_state_dict(state[n])


def build_model(
    folder: str | Path,
    config: LayoutConfig,
    layout: Layout,
    groups: ProcessGroupCollection,
    dtype: torch.dtype,
    key: str,
    vocab_padding_multiple: int = 1,
) -> tuple[ModelChunks, Architecture]:
    """Build this rank's pipeline stage and load its weights from the Hugging Face `folder`.

    Args:
        key: "student" or "teacher", for messages.

    Raises:
        ConfigError: an unsupported checkpoint, sizes that the layout does not divide, FP8 that this machine has not.
    """
    fp8.require(config.fp8, key, have_transformer_engine())
    architecture = read_architecture(folder)
    architecture.check_layout(layout.tp, layout.pp, key, layout.ep, layout.vp)
    if architecture.experts is not None and layout.tp > 1 and not config.sequence_parallel:
        expected = "true for a mixture of experts under tensor parallelism, whose ranks would each route every token"
        raise ConfigError(f"{key}.sequence_parallel", False, expected, "set it")
    if architecture.experts is not None and layout.cp > 1:
        raise ConfigError(f"{key}.context_parallel_size", layout.cp, "1 for a mixture of experts", "leave it out")
    with cpu.megatron_device():
        megatron = transformer_config(architecture, config, layout, dtype)
        model = empty_model(architecture, megatron, layout, groups, vocab_padding_multiple)
        load_hf_weights(model, folder)
    return model, architecture


def empty_model(
    architecture: Architecture,
    config: TransformerConfig,
    layout: Layout,
    groups: ProcessGroupCollection,
    vocab_padding_multiple: int = 1,
) -> ModelChunks:
    """This rank's pipeline stage before it has weights."""
    chunks = ModelChunks()
    for number in range(layout.vp):
        stage = number if layout.virtual else None
        chunk = HiddenStateModel(
            config=config,
            transformer_layer_spec=block_spec(architecture, config, layout, stage),
            pre_process=layout.has_embedding(number),
            post_process=layout.has_output(number),
            pg_collection=groups,
            vp_stage=stage,
            **architecture.gpt_model_kwargs(layout.tp, vocab_padding_multiple),
        )
        _reduce_experts_apart(chunk)
        chunks.append(chunk)
    return chunks


_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
"""Megatron's fields for `student.recompute`."""


def _leave(weight: Tensor) -> None:
    """Initialise nothing: every weight is read from the checkpoint. (Megatron marks a parameter as sharded while it
    initialises it, so that switching initialisation off would break the gradient norm.)"""


def _reduce_experts_apart(model: HiddenStateModel) -> None:
    """Have Megatron reduce experts over all ranks that repeat them.

    It does so by itself with expert parallelism only; without, it would leave out the other tensor-parallel ranks, each
    of which saw its own part of the tokens.
    """
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False


def transformer_config(
    architecture: Architecture, config: LayoutConfig, layout: Layout, dtype: torch.dtype
) -> TransformerConfig:
    """What Megatron is told about the model and its layout."""
    engine, interleaved = have_transformer_engine(), layout.vp > 1
    return TransformerConfig(
        **architecture.transformer_config_fields(),
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.virtual,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        sequence_parallel=config.sequence_parallel and layout.tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Rows differ in length. Megatron asks for this dispatcher then, also where there are no experts.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        moe_router_dtype="fp64" if dtype == torch.float64 else "fp32",
        moe_router_load_balancing_type="none",
        moe_grouped_gemm=engine and architecture.experts is not None,
        # Losses come normalised by global token counts: Megatron must not average over micro-batches or replicas.
        calculate_per_token_loss=True,
        use_cpu_initialization=not torch.cuda.is_available(),
        init_method=_leave,
        output_layer_init_method=_leave,
        use_te_activation_func=not engine,  # which means: the spec's, see `use_local_kernels`
        apply_rope_fusion=engine,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        # Between interleaved stages Megatron lets go of an output while it may still be on its way.
        deallocate_pipeline_outputs=not interleaved,
        **_RECOMPUTE[config.recompute if isinstance(config, StudentConfig) else "none"],
        # Of two stages each is the other's next and previous one: what goes both ways must not be in one batch.
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        **fp8.transformer_fields(config.fp8),
    )


def block_spec(
    architecture: Architecture, config: TransformerConfig, layout: Layout, chunk: int | None
) -> TransformerBlockSubmodules:
    """The layers of this stage, or of one of its chunks: Transformer Engine's where it runs, otherwise Megatron's local
    ones with our kernels."""
    norm: Any = RMSNorm
    qk_norm, experts = architecture.family.qk_norm, architecture.experts and architecture.experts.count
    if have_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=experts is not None, qk_layernorm=qk_norm
        )
    else:
        layer = get_gpt_layer_local_spec(num_experts=experts, qk_layernorm=qk_norm, normalization="RMSNorm")
        use_local_kernels(layer.submodules, qk_norm)
        _name_as_transformer_engine(layer.submodules, experts is not None)
    count = get_num_layers_to_build(config, vp_stage=chunk, pp_rank=layout.pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


def use_local_kernels(layer: Any, qk_norm: bool) -> None:
    """Put our norm, activation and attention into a layer of Megatron's local spec."""
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    for mlp in _mlps(layer.mlp.submodules):
        mlp.activation_func = swiglu
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm


def _name_as_transformer_engine(layer: Any, experts: bool) -> None:
    """In checkpoints. Megatron's map says that the second norm belongs to a linear layer, which before experts it does
    not in Transformer Engine's layers: what is saved with one could not be loaded with the other."""
    if experts:
        names = layer.sharded_state_dict_keys_map
        layer.sharded_state_dict_keys_map = {name: names[name] for name in names if name != "pre_mlp_layernorm."}


def _mlps(mlp: Any) -> list[Any]:
    """The parts of a layer's specification that have an activation: its MLP's, or its experts'."""
    if isinstance(mlp, MLPSubmodules):
        return [mlp]
    return [part.submodules for part in (mlp.experts, mlp.shared_experts) if part is not None]
