"""Megatron's optimizer and learning-rate schedule, from the recipe."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nemo_opd.config import FP8Config, OptimizerConfig
from nemo_opd.engines.megatron import cpu
from nemo_opd.engines.megatron.model import have_transformer_engine
from nemo_opd.errors import ConfigError


def use_distributed(config: OptimizerConfig) -> bool:
    """Whether optimizer states are spread over data-parallel replicas.

    Raises ConfigError where that could not be resumed: without Transformer Engine's fused Adam, Megatron's distributed
    optimizer saves a state that it cannot load again. And where parameters that are not spread are to be gathered.
    """
    distributed = have_transformer_engine() if config.distributed is None else config.distributed
    if config.overlap_param_gather and not distributed:
        expected = "false without the distributed optimizer, as each replica updates all of its parameters"
        way_out = "leave it out, or run it with CUDA and Transformer Engine"
        raise ConfigError("optimizer.overlap_param_gather", True, expected, way_out)
    if config.distributed and not have_transformer_engine():
        raise ConfigError(
            "optimizer.distributed",
            "true without Transformer Engine",
            "false, or a machine with CUDA and Transformer Engine",
            "leave it unset: its checkpoints could not be resumed here",
        )
    return distributed


def build_optimizer(
    config: OptimizerConfig, model: list[DistributedDataParallel], dtype: torch.dtype, fp8: FP8Config
) -> MegatronOptimizer:
    """Adam with fp32 master weights (float64 for a float64 model, in tests), one for all chunks of `model`."""
    distributed = use_distributed(config)
    megatron = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
        fp8_recipe=None if fp8.recipe == "none" else fp8.recipe,
    )
    return get_megatron_optimizer(megatron, model, use_gloo_process_groups=distributed and torch.cuda.is_available())


def build_schedule(config: OptimizerConfig, optimizer: MegatronOptimizer, total_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up, then the configured decay to `min_lr` at step `total_steps`.

    The schedule is stepped *before* each update, so that the first update of a warm-up over W steps has lr / W and the
    last update of a decay has `min_lr`.
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=min(config.min_lr, config.lr),
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(total_steps, config.warmup_steps + 1),
        lr_decay_style=config.decay,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
        # A resumed run follows its recipe (which may have been given more steps), not the stored numbers.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def _clip(optimizer: MegatronOptimizer, norm: float) -> None:
    """Scale all gradients alike. Experts have an optimizer of their own, reduced over other ranks."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = part.get_parameters()
        if part.config.clip_grad > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm)


def update(optimizer: MegatronOptimizer, accepts: Callable[[float], bool] = math.isfinite) -> tuple[float, bool]:
    """Clip and update with the gradients in the model's buffers.

    Megatron checks for non-finite gradients in fp16 only; here `accepts` is asked with the norm of the whole model's
    gradient before anything is changed, whatever the precision. It must decide alike on every rank.

    Returns:
        The global gradient norm before clipping, and whether the update was left out.
    """
    with cpu.megatron_device():
        found_inf = optimizer.prepare_grads()
        norm = math.inf if found_inf else float(optimizer.get_grad_norm())
        accepted = accepts(norm)
        if accepted:
            _clip(optimizer, norm)
            optimizer.step_with_ready_grads()
    return norm, not accepted
