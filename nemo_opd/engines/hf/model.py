"""Loading of a decoder in Hugging Face format, for the generator and the reference scorer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nemo_opd.foreign import refuse_code

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
"""Values of `model_type` whose logits are the output layer times the last hidden state, with nothing in between."""


def check_dense(config: PreTrainedConfig, source: object = "model") -> None:
    """Refuse what the decode loop does not compute rightly: other families, and layers with a sliding window."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config.model_type not in SUPPORTED or kinds != {"full_attention"}:
        raise ValueError(
            f"{source}: got model_type {config.model_type} with layers {sorted(kinds)}; expected a decoder with "
            f"full attention in every layer, model_type one of {', '.join(SUPPORTED)}; choose such a model"
        )


def longest_sequence(config: PreTrainedConfig) -> int:
    """Positions of the longest sequence: a Mistral's sliding window where it is shorter, for within it the decode
    loop's full attention is the same."""
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    positions: int = config.max_position_embeddings
    return positions if window is None else min(positions, window)


def named_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every weight under the name that it has in a folder; a tied one under both of its names.

    In memory transformers keeps the experts of a layer in two tensors; a folder has three for each expert.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        prefix, _, last = name.rpartition(".")
        if not prefix.endswith(".experts"):
            weights[name] = parameter
            continue
        parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
        for number, expert in enumerate(parameter.detach()):
            for part, piece in zip(parts, expert.chunk(len(parts)), strict=True):
                weights[f"{prefix}.{number}.{part}.weight"] = piece
    return weights


def default_device() -> torch.device:
    """The GPU that this process has selected, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def load_model(
    folder: str | Path,
    dtype: str | torch.dtype = "float32",
    device: torch.device | str | None = None,
    weights: bool = True,
) -> PreTrainedModel:
    """A frozen causal language model in evaluation mode. Reads local files only and never runs code from the folder.

    Args:
        folder: holds `config.json` and, with `weights`, safetensors.
        device: None is this process's current GPU, or the CPU where there is none.
        weights: False makes the model from its configuration alone; its values are arbitrary until weights arrive.

    Raises: ConfigError for a folder that names code, ValueError for a missing one, an unknown dtype or an architecture
        that the decode loop does not know.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {folder}: got no config.json there; expected a folder in Hugging Face format")
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype}; expected one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    refuse_code(folder, str(folder))
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    check_dense(config, folder)
    device = default_device() if device is None else torch.device(device)
    if weights:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        torch.nn.Module.to(model, device)
    else:
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if dtype == torch.float64 and config.model_type == "qwen3_moe":
        model.set_experts_implementation("eager")  # the faster one knows no float64
    return model.eval().requires_grad_(False)


def eos_ids_of(model: PreTrainedModel) -> tuple[int, ...]:
    """The ids that end a response, as the folder's generation configuration (or else its configuration) names them."""
    for config in (model.generation_config, model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)
    return ()
