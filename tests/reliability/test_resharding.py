"""A checkpoint of one layout is read under another, and nothing of it changes: weights, moments, master weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_opd.config import Config
from tests.contract.trainers import VOCAB, batch_for, build
from tests.helpers.checkpoints import different_bits, save_now, stored
from tests.helpers.figures import record
from tests.helpers.megatron import recipe
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import tiny_checkpoint

STEPS = 3
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"student__tensor_model_parallel_size": 2}),
    "dp2": (2, {}),
    "cp2": (2, {"student__context_parallel_size": 2}),
    "tp4": (4, {"student__tensor_model_parallel_size": 4}),
    "tp2 pp2": (4, {"student__tensor_model_parallel_size": 2, "student__pipeline_model_parallel_size": 2}),
    "pp2, 2 chunks": (
        2,
        {"student__pipeline_model_parallel_size": 2, "student__virtual_pipeline_model_parallel_size": 2},
    ),
    "tp2, padded": (2, {"student__tensor_model_parallel_size": 2, "student__vocab_padding_multiple": 16}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """91 ids: no layout but that of one process divides them."""
    return tiny_checkpoint(
        tmp_path_factory.mktemp("reshard") / "model", vocab_size=VOCAB, num_hidden_layers=4, num_key_value_heads=4
    )


def _trained(rank: int, config: Config, folder: Path) -> None:
    trainer = build(config)
    for step in range(STEPS):
        trainer.train_step(batch_for(trainer.place, step))
    _save(rank, trainer, folder)


def _read_and_saved(rank: int, config: Config, source: Path, folder: Path) -> None:
    trainer = build(config)
    trainer.load(source)
    _save(rank, trainer, folder)


def _save(rank: int, trainer: Any, folder: Path) -> None:
    import torch.distributed as dist

    if rank == 0:
        folder.mkdir()
    dist.barrier()
    save_now(trainer, folder)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "way",
    [
        ("tp2", "one", "tp2"),
        ("one", "tp2 pp2", "tp4", "one"),
        ("dp2", "tp2, padded", "dp2"),
        ("cp2", "one", "cp2"),
        ("pp2, 2 chunks", "tp2 pp2", "one", "pp2, 2 chunks"),
    ],
    ids=lambda way: " -> ".join(way),
)
def test_no_bit_changes_on_the_way_through_other_layouts(
    ranks1: RankPool, ranks2: RankPool, ranks4: RankPool, model: Path, tmp_path: Path, way: tuple[str, ...], dtype: str
) -> None:
    pools = {1: ranks1, 2: ranks2, 4: ranks4}
    checkpoints = []
    for number, layout in enumerate(way):
        size, settings = LAYOUTS[layout]
        config = recipe(model, student__dtype=dtype, **settings)
        folder = tmp_path / str(number)
        if checkpoints:
            pools[size].run(_read_and_saved, config, tmp_path / str(number - 1), folder)
        else:
            pools[size].run(_trained, config, folder)
        checkpoints.append(ranks1.run(stored, str(folder))[0])
    tensors, rest = checkpoints[0]
    kinds = {
        dtype: sum(tensor.dtype == dtype for tensor in tensors.values()) for dtype in (torch.float32, torch.bfloat16)
    }
    assert any("exp_avg_sq" in name for name in tensors), "blind without the optimizer's moments"
    assert all(float(t.float().abs().max()) > 0 for name, t in tensors.items() if "exp_avg" in name and t.numel() > 1)
    if dtype == "bfloat16":
        assert kinds[torch.bfloat16] > 0 and kinds[torch.float32] >= 3 * kinds[torch.bfloat16], "master weights too"
    different = count = 0
    for other, other_rest in checkpoints[1:]:
        found, total = different_bits(tensors, other, VOCAB)
        different, count = different + found, count + total
        assert {k: v for k, v in rest.items() if "step" in k} == {k: v for k, v in other_rest.items() if "step" in k}
    assert different == 0
    record("R3", f"tensors with a different bit, {' -> '.join(way)}, {dtype}", f"{different} / {count}")
