"""FP8 in Megatron's terms, and everything about it but the kernels, which want a GPU."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core.fp8_utils import get_fp8_align_size, is_first_last_bf16_layer
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_opd.config import FP8_MULTIPLES, FP8Config
from nemo_opd.engines.megatron import fp8
from nemo_opd.errors import ConfigError
from tests.helpers.megatron import random_rollouts, recipe, replica_batch
from tests.helpers.objectives import AdvantageCrossEntropy
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import tiny_checkpoint


def _megatron(settings: FP8Config) -> TransformerConfig:
    sizes = {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 2, "bf16": True}
    return TransformerConfig(params_dtype=torch.bfloat16, **sizes, **fp8.transformer_fields(settings))


@pytest.mark.parametrize("name", sorted(FP8_MULTIPLES))
def test_megatron_takes_every_recipe(name: str) -> None:
    config = _megatron(FP8Config(name, format="e4m3"))
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("e4m3", name, False)
    kept = [layer for layer in range(4) if is_first_last_bf16_layer(config, layer)]
    assert kept == ([] if name == "delayed" else [0, 3])
    assert fp8.row_multiple(config) % get_fp8_align_size(config.fp8_recipe) == 0
    with fp8.full_precision(mock.Mock(config=config)):
        assert config.fp8 is None
        assert fp8.row_multiple(config) == 1
    assert config.fp8 == "e4m3"


def test_delayed_scaling_looks_back() -> None:
    config = _megatron(FP8Config("delayed", amax_history=7))
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (7, "max")


def test_without_a_recipe_nothing_is_said() -> None:
    assert fp8.transformer_fields(FP8Config()) == {}
    fp8.require(FP8Config(), "student", transformer_engine=False)


def test_without_transformer_engine_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.fp8\.recipe: got blockwise; expected none without Transformer"):
        fp8.require(FP8Config("blockwise"), "teacher", transformer_engine=False)


@pytest.mark.parametrize(
    ("name", "capability", "known"),
    [
        ("mxfp8", (9, 0), "delayed, tensorwise, blockwise on this chip, as mxfp8 runs from 10.0 on"),
        ("blockwise", (8, 9), "delayed, tensorwise on this chip"),
        ("delayed", (8, 0), "none on this chip"),
    ],
)
def test_what_a_chip_does_not_know_is_refused(name: str, capability: tuple[int, int], known: str) -> None:
    with pytest.raises(ConfigError, match=f"got {name} on a chip .compute capability.*expected {known}"):
        fp8._require_chip(name, "student", capability, "a chip")


@pytest.mark.parametrize(("name", "capability"), [("blockwise", (9, 0)), ("mxfp8", (10, 0)), ("delayed", (8, 9))])
def test_what_a_chip_knows_passes(name: str, capability: tuple[int, int]) -> None:
    fp8._require_chip(name, "student", capability, "a chip")


def _gradient(rank: int, folder: str, name: str) -> tuple[list[torch.Tensor], list[int]]:
    """Of a step whose layers would compute in FP8 if there were Transformer Engine, and the rows' lengths."""
    from nemo_opd.engines.megatron import rows
    from nemo_opd.engines.megatron.parallel import destroy_student_groups
    from nemo_opd.engines.megatron.trainer import MegatronTrainer

    destroy_student_groups()
    config = recipe(Path(folder), student__tensor_model_parallel_size=2, student__sequence_parallel=True)
    config.student.dtype = "float64"
    config.student.fp8 = FP8Config(name)
    lengths = []
    lay_out = rows.model_inputs

    def measured(*arguments: object) -> rows.ModelInputs:
        found = lay_out(*arguments)  # type: ignore[arg-type]
        lengths.append(found.input_ids.shape[1])
        return found

    loss = AdvantageCrossEntropy()
    with (
        mock.patch.object(fp8, "require"),
        mock.patch("nemo_opd.engines.megatron.model.model_inputs", measured),
    ):
        trainer = MegatronTrainer(config, loss, None, 10)
        batch = replica_batch(random_rollouts(0, 6, 91), {}, loss, 0, 1, 64)
        return [tensor.clone() for _, tensor in trainer.gradients(batch)], lengths


@pytest.mark.parametrize("name", ["tensorwise", "blockwise"])
def test_padding_of_rows_changes_no_gradient(ranks2: RankPool, tmp_path: Path, name: str) -> None:
    """Each of two processes holds half of a row under sequence parallelism, and a multiple of what FP8 wants."""
    folder = str(tiny_checkpoint(tmp_path / "model", vocab_size=91))
    (plain, before), _ = ranks2.run(_gradient, folder, "none")
    (padded, after), _ = ranks2.run(_gradient, folder, name)
    assert all(length % (2 * FP8_MULTIPLES[name]) == 0 for length in after)
    assert any(length % (2 * FP8_MULTIPLES[name]) for length in before)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(plain, padded, strict=True))
    assert any(tensor.abs().max() > 1e-3 for tensor in plain)
