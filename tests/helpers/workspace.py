"""A small world for tests of whole runs: arithmetic data, tokenizer, two untrained models."""

from __future__ import annotations

from pathlib import Path

from nemo_opd.config import Config
from nemo_opd.configuration.load import load
from nemo_opd.tasks.arithmetic import ArithmeticTask, write
from nemo_opd.tasks.models import ModelShape, write_random_model
from nemo_opd.tasks.tokenizer import write_tokenizer


def make_workspace(folder: Path, problems: int = 64, head_dim: int | None = None) -> Path:
    """`train.jsonl`, `heldout.jsonl`, `tokenizer/`, `student/` (2 layers) and `teacher/` (4 layers, wider).

    Their heads may be wider than the hidden size asks for.
    """
    write(folder, ArithmeticTask(terms=3), problems, 16, noise=0.0, seed=0)
    write_tokenizer(folder / "tokenizer")
    for name, hidden, layers, seed in (("student", 32, 2, 1), ("teacher", 48, 4, 2)):
        shape = ModelShape(hidden_size=hidden, layers=layers, heads=4, kv_heads=2, ffn=64, head_dim=head_dim)
        write_random_model(folder / name, folder / "tokenizer", shape=shape, seed=seed)
    return folder


def workspace_config(folder: Path, *overrides: str, run_dir: Path | None = None) -> Config:
    """A short fp32 recipe over the workspace: OPD, 4 prompts a step, 2 samples each."""
    settings = [
        f"run.dir={run_dir or folder / 'run'}",
        f"student.model={folder / 'student'}",
        f"teacher.model={folder / 'teacher'}",
        f"data.path={folder / 'train.jsonl'}",
        "student.dtype=float32",
        "teacher.dtype=float32",
        "data.max_prompt_tokens=32",
        "rollout.max_new_tokens=12",
        "rollout.samples_per_prompt=2",
        "train.prompts_per_step=4",
        "train.micro_batch_tokens=64",
        "train.steps=4",
        "optimizer.lr=1e-3",
        "observe.progress=false",
    ]
    return load(None, [*settings, *overrides])
