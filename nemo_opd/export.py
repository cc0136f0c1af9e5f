"""`nemo-opd export`: a checkpoint of a run, whatever its layout, as a folder in Hugging Face format or in Megatron's
`torch_dist` format; `nemo-opd import`: such a folder of Megatron's as one in Hugging Face format.

Done by one process. A run's checkpoint is read back without any parallelism, weights alone.
"""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Iterator
from pathlib import Path

from nemo_opd.checkpoint.store import CONFIG_FILE, MODEL_FOLDER, newest_checkpoint, read_state, require_whole
from nemo_opd.config import Config, LayoutConfig
from nemo_opd.configuration.load import load
from nemo_opd.engines.megatron.checkpoint import load_model, save_model
from nemo_opd.engines.megatron.families import Architecture, read_architecture
from nemo_opd.engines.megatron.hf_files import save_hf_checkpoint, whole_folder
from nemo_opd.engines.megatron.model import ModelChunks, build_model, dtype_of
from nemo_opd.engines.megatron.parallel import Layout, init_distributed, student_groups
from nemo_opd.engines.megatron.torch_dist import TorchDistWeights, weights_folder
from nemo_opd.engines.megatron.weights import export_hf_weights
from nemo_opd.engines.protocols import NamedTensor
from nemo_opd.errors import ConfigError
from nemo_opd.foreign import refuse_code

log = logging.getLogger(__name__)


def main(args: argparse.Namespace) -> int:
    """Write the checkpoint (the newest one of a run) that `args.path` names to `args.out`."""
    checkpoint = find_checkpoint(args.path)
    config = load(checkpoint / CONFIG_FILE, args.overrides, checked=False)
    if args.format == "torch_dist":
        model, _ = _read_model(checkpoint, config)
        with whole_folder(args.out) as unfinished:
            save_model(unfinished, model)
    else:
        save_hf_checkpoint(read_weights(checkpoint, config), args.out, Path(config.student.model))
    log.info("wrote step %d of %s to %s", read_state(checkpoint).step, args.path, args.out)
    return 0


def import_main(args: argparse.Namespace) -> int:
    """Write the weights of the `torch_dist` checkpoint `args.path` to `args.out`, beside what else `args.like` has."""
    refuse_code(args.like, "--like")
    dtype = dtype_of(args.dtype, "--dtype") if args.dtype else None
    folder = weights_folder(args.path)
    save_hf_checkpoint(TorchDistWeights(folder, read_architecture(args.like), dtype), args.out, args.like)
    log.info("wrote the weights of %s to %s", folder, args.out)
    return 0


@functools.cache  # reading every byte once is enough
def find_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the newest one of a run folder; every byte of it was compared with its manifest.

    Raises:
        ConfigError: a run without a checkpoint, or one that does not hold.
    """
    if (path / MODEL_FOLDER).is_dir() and (path / CONFIG_FILE).exists() and not (path / "checkpoints").exists():
        require_whole(path)
        return path
    newest = newest_checkpoint(path / "checkpoints")
    if newest is None:
        raise ConfigError(str(path), "a run without a checkpoint", "at least one step-* folder", "train it first")
    return newest


def read_weights(checkpoint: Path, config: Config) -> Iterator[NamedTensor]:
    """The student's weights of a checkpoint under their Hugging Face names."""
    return export_hf_weights(*_read_model(checkpoint, config))


def _read_model(checkpoint: Path, config: Config) -> tuple[ModelChunks, Architecture]:
    init_distributed()
    layout = Layout(tp=1, pp=1, dp=1, rank=0)
    groups = student_groups(layout, config.run.seed)
    student = config.student
    model, architecture = build_model(
        student.model, LayoutConfig(), layout, groups, dtype_of(student.dtype, "student.dtype"), "student", 1
    )
    load_model(checkpoint / MODEL_FOLDER, model)
    return model, architecture
