"""`benchmarks.gpu` runs at toy size without NeMo and what else need not be there, and what fails in it is a row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import FP8, in_own_process, table

ROOT = Path(__file__).parents[2]
ABSENT = """
import sys
sys.modules.update(dict.fromkeys(("nemo", "transformers", "datasets", "omegaconf", "yaml")))
from benchmarks.gpu import main
main(sys.argv[1:])
"""
MEASURED = {
    ("fused loss", "limit"),
    ("fused loss", "ours reverse_kl"),
    ("fused loss", "ours jsd"),
    ("scoring, hidden states", "bf16"),
    ("scoring, written token", "bf16"),
    ("training step", "bf16"),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    out = tmp_path_factory.mktemp("gpu") / "gpu.md"
    command = [sys.executable, "-c", ABSENT, "--toy", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert out.read_text() in done.stdout
    return json.loads(out.with_suffix(".json").read_text()), out.read_text()


def test_everything_that_this_machine_can_is_measured(toy: tuple[dict[str, Any], str]) -> None:
    found, text = toy
    measured = {(row["what"], row["case"]): row for row in found["rows"] if "seconds" in row}
    assert set(measured) >= MEASURED
    step = measured["training step", "bf16"]
    # 2 layers of 37,024 numbers; 4 sequences of 16 positions; 48 trained tokens; vocabulary 512, both hidden sizes 64
    layers = 4 * 16 * (2 * 2 * 37_024 + 2 * 2 * 64 * 16)
    assert step["tflops"] * 1e12 * step["seconds"] == pytest.approx(3 * layers + 48 * 512 * (6 + 2) * 64)
    assert step["tokens_per_second"] == pytest.approx(64 / step["seconds"])
    parameters = 2 * 37_024 + 512 * 64 + 64
    assert step["planned"] > (2 + 4 + 12) * parameters, "weights, gradients, optimizer"
    assert found["machine"]["torch"] in text and "| training step | bf16 |" in text


def test_what_this_machine_cannot_is_a_row_with_the_reason(toy: tuple[dict[str, Any], str]) -> None:
    without = [
        row for row in toy[0]["rows"] if "seconds" not in row and "training" not in row and row["note"] != "built"
    ]
    for row in without:
        assert row["case"] in (*FP8, "liger jsd"), row
        assert row["note"].startswith(("ConfigError: ", "ModuleNotFoundError: No module named 'liger_kernel")), row
    assert {row["case"] for row in toy[0]["rows"]} >= {*FP8, "liger jsd"}


def test_a_part_that_hangs_is_a_row() -> None:
    (row,) = in_own_process("loss", [], limit=0.01)
    assert row["part"] == "loss" and "not through after 0 s" in row["note"]
    assert "not through" in table([row])


def test_a_part_in_a_process_of_its_own_hands_back_its_rows() -> None:
    rows = in_own_process("delayed", ["--toy"], limit=200.0)
    assert [row["what"] for row in rows[:2]] == ["student with optimizer", "teacher"]


def test_a_part_that_ends_is_a_row() -> None:
    (row,) = in_own_process("loss", ["--no-such-word"], limit=60.0)
    assert "ended with 2" in row["note"] and "--no-such-word" in row["note"]


def test_fp8_stands_beside_bf16() -> None:
    base = {"part": "bf16", "what": "training step", "case": "bf16", "seconds": 2.0}
    text = table([base, base | {"part": "delayed", "case": "delayed", "seconds": 1.5}])
    assert text.splitlines()[-1].startswith("| training step | delayed | 1500.00 | 0.750 |")


def test_peaks_are_those_of_the_forms_whose_data_sheet_is_known() -> None:
    from benchmarks.gpu_parts import peak_rate

    assert peak_rate("NVIDIA H100 80GB HBM3") == peak_rate("NVIDIA H200") == 989e12
    assert peak_rate("NVIDIA H100 PCIe") is None and peak_rate("NVIDIA A100-SXM4-80GB") is None


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_the_bare_divergence_is_the_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import losses
    from benchmarks.bare_loss import BareDivergence

    case = losses.Case("ours", name, 12, 40, 8, 16, 5)

    def run() -> list[Any]:
        inputs = losses.Inputs(case)
        losses.runner(case, inputs, 0, None)()
        return [inputs.hidden.grad, inputs.weight.grad]

    whole = run()
    monkeypatch.setattr(losses, "_loss_named", BareDivergence)
    assert all(one.abs().sum() > 0 and one.equal(other) for one, other in zip(whole, run(), strict=True))
