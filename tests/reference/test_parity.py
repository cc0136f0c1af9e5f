"""The same weights give the same logits in Megatron as in transformers, in every layout, and come back unchanged."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import RankPool
from tests.helpers.tiny import tiny_checkpoint, tiny_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES: dict[str, dict[str, Any]] = {
    "qwen3-tied": {"family": "qwen3", "tie_word_embeddings": True},
    "qwen3-untied": {"family": "qwen3"},
    "qwen2-bias": {"family": "qwen2"},
    "qwen2-bias-tied": {"family": "qwen2", "tie_word_embeddings": True},
    "llama3": {"family": "llama", "rope_parameters": LLAMA3_ROPE},
    "mistral": {"family": "mistral", "sliding_window": 192},
    "llama3-tied": {"family": "llama", "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3-moe": {"family": "qwen3_moe"},
    "qwen3-moe, part of a softmax": {
        **{"family": "qwen3_moe", "norm_topk_prob": False, "num_experts": 8, "num_experts_per_tok": 3},
        "tie_word_embeddings": True,
    },
}
VOCAB = 97  # padded to 100 for every tensor-parallel size below, by a padding multiple of 4, 2 and 1
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
"""(tensor, pipeline) parallel sizes"""
MIXTURE_LAYOUTS = [(1, 1, 1, 1), (2, 1, 1, 1), (2, 1, 1, 2), (1, 1, 2, 2), (1, 2, 2, 2), (2, 2, 1, 2)]
"""(tensor, pipeline, data, expert) parallel sizes; experts are shared out among tensor and data parallel ranks."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One float32 checkpoint per case, sharded into several files for every second one, with transformers' logits."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("checkpoints")
    for number, (name, case) in enumerate({**CASES, **MIXTURES}.items()):
        folder = tiny_checkpoint(root / name, vocab_size=VOCAB, seed=number, **case)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        if number % 2:
            (folder / "model.safetensors").unlink()
            model.save_pretrained(folder, max_shard_size="30KB")
        with torch.no_grad():
            torch.save(model(input_ids=_input_ids()).logits, root / f"{name}.logits.pt")
    return root


def _input_ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 192), generator=torch.Generator().manual_seed(7))


def _pool(request: pytest.FixtureRequest, tp: int, pp: int) -> RankPool:
    pool: RankPool = request.getfixturevalue(f"ranks{tp * pp}")
    return pool


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_logits_equal_transformers_and_the_export_equals_the_source(
    request: pytest.FixtureRequest, checkpoints: Path, tmp_path: Path, case: str, tp: int, pp: int
) -> None:
    source, exported = checkpoints / case, tmp_path / "exported"
    answers = _pool(request, tp, pp).run(_parity, str(source), str(exported), tp, pp)
    expected = torch.load(checkpoints / f"{case}.logits.pt")
    logits = [answer for answer in answers if answer is not None]
    assert len(logits) == tp, "every tensor rank of the last stage answers"
    for answer in logits:
        assert expected.std() > 0.2, "logits so flat that anything would agree"
        torch.testing.assert_close(torch.from_numpy(answer), expected, atol=1e-4, rtol=1e-4)
    _assert_same_folder(source, exported)


@pytest.mark.parametrize(
    ("case", "layout", "own"),
    [
        *(("qwen3-moe", layout, False) for layout in MIXTURE_LAYOUTS),
        *(("qwen3-moe", layout, True) for layout in MIXTURE_LAYOUTS if layout[3] > 1),
        *(("qwen3-moe, part of a softmax", layout, False) for layout in MIXTURE_LAYOUTS[:4:3]),
    ],
)
def test_a_mixture_of_experts_on_every_layout(
    request: pytest.FixtureRequest,
    checkpoints: Path,
    tmp_path: Path,
    case: str,
    layout: tuple[int, int, int, int],
    own: bool,
) -> None:
    """With groups of the student's, and with a teacher's own beside a student without expert parallelism."""
    tp, pp, dp, ep = layout
    source, exported = checkpoints / case, tmp_path / "exported"
    answers = _pool(request, tp * dp, pp).run(_parity, str(source), str(exported), tp, pp, "float32", own, dp, ep)
    expected = torch.load(checkpoints / f"{case}.logits.pt")
    logits = [answer for answer in answers if answer is not None]
    assert len(logits) == tp * dp
    for answer in logits:
        assert expected.std() > 0.2, "logits so flat that anything would agree"
        torch.testing.assert_close(torch.from_numpy(answer), expected, atol=1e-4, rtol=1e-4)
    _assert_same_folder(source, exported)


def test_the_tolerance_is_fine_enough_to_see_which_experts_count_how_much() -> None:
    """Another number of experts for a token, or weights that do not sum to 1, move logits by more than that."""
    logits = []
    for change in ({}, {"num_experts_per_tok": 3}, {"norm_topk_prob": False}):
        with torch.no_grad():
            logits.append(tiny_model("qwen3_moe", vocab_size=VOCAB, **change)(input_ids=_input_ids()).logits)
    for other in logits[1:]:
        assert (logits[0] - other).abs().max() > 1e-3


def test_the_tolerance_is_fine_enough_to_see_rope_scaling() -> None:
    """Without it, or with another factor, logits move by more than the tolerance above."""
    logits = []
    for rope in (LLAMA3_ROPE, {**LLAMA3_ROPE, "factor": 32.0}, {"rope_type": "default", "rope_theta": 500000.0}):
        with torch.no_grad():
            logits.append(tiny_model("llama", vocab_size=VOCAB, rope_parameters=rope)(input_ids=_input_ids()).logits)
    for other in logits[1:]:
        assert (logits[0] - other).abs().max() > 1e-3


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_bfloat16_comes_back_bit_for_bit(request: pytest.FixtureRequest, tmp_path: Path, tp: int, pp: int) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3", dtype=torch.bfloat16, vocab_size=VOCAB)
    _pool(request, tp, pp).run(_parity, str(source), str(tmp_path / "exported"), tp, pp, "bfloat16")
    _assert_same_folder(source, tmp_path / "exported")


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 1)])
def test_a_teacher_with_its_own_layout(
    request: pytest.FixtureRequest, checkpoints: Path, tmp_path: Path, tp: int, pp: int
) -> None:
    case = "qwen3-tied"
    answers = _pool(request, tp, pp).run(
        _parity, str(checkpoints / case), str(tmp_path / "exported"), tp, pp, "float32", True
    )
    expected = torch.load(checkpoints / f"{case}.logits.pt")
    for answer in answers:
        if answer is not None:
            torch.testing.assert_close(torch.from_numpy(answer), expected, atol=1e-4, rtol=1e-4)
    _assert_same_folder(checkpoints / case, tmp_path / "exported")


def test_fewer_key_value_heads_than_tensor_ranks(ranks4: RankPool, tmp_path: Path) -> None:
    """TP 4 with 2 query groups: Megatron cuts through a group."""
    from transformers import AutoModelForCausalLM

    source = tiny_checkpoint(tmp_path / "source", "qwen2", vocab_size=VOCAB)
    answers = ranks4.run(_parity, str(source), str(tmp_path / "exported"), 4, 1)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = model.eval()(input_ids=_input_ids()).logits
    for answer in answers:
        torch.testing.assert_close(torch.from_numpy(answer), expected, atol=1e-4, rtol=1e-4)
    _assert_same_folder(source, tmp_path / "exported")


def _assert_same_folder(source: Path, exported: Path) -> None:
    """Same files with the same bytes: names, shapes, dtypes, values, shard assignment, index, configuration."""
    names = sorted(path.name for path in source.iterdir())
    assert sorted(path.name for path in exported.iterdir()) == names
    for name in names:
        if name.endswith(".index.json"):
            assert json.loads((exported / name).read_text()) == json.loads((source / name).read_text())
        else:
            assert filecmp.cmp(source / name, exported / name, shallow=False), name


def _parity(
    rank: int,
    source: str,
    exported: str,
    tp: int,
    pp: int,
    dtype: str = "float32",
    own: bool = False,
    dp: int = 1,
    ep: int = 1,
) -> Any:
    """On every rank: load, forward, export. The last stage returns its logits as a numpy array.

    With `own` the model is a teacher with groups of its own, while Megatron's global state holds another layout.
    """
    from nemo_opd.config import LayoutConfig
    from nemo_opd.engines.megatron import cpu, parallel
    from nemo_opd.engines.megatron.model import build_model
    from nemo_opd.engines.megatron.weights import export_hf_weights, load_hf_weights, save_hf_checkpoint

    cpu.install()
    layout = parallel.Layout(tp, pp, dp, rank, ep)
    student = parallel.Layout(pp, tp, dp, rank) if own else layout
    parallel.destroy_student_groups()  # of an earlier test in this process
    groups = parallel.student_groups(student, seed=0)
    try:
        if own:
            groups = parallel.teacher_groups(layout)
        config = LayoutConfig(sequence_parallel="moe" in source)
        model, architecture = build_model(source, config, layout, groups, getattr(torch, dtype), "student", 4 // tp)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))  # whatever the loader forgets shows
        load_hf_weights(model, source)
        logits = _forward(model.chunks[0], groups) if dtype == "float32" else None
        save_hf_checkpoint(export_hf_weights(model, architecture), exported, source)
        return logits
    finally:
        parallel.destroy_student_groups()


def _forward(model: Any, groups: Any) -> Any:
    """Logits [batch, sequence, vocabulary] on the last stage; one packed row, sent from stage to stage by hand."""
    from nemo_opd.engines.megatron import cpu

    ids = _input_ids()
    batch, length = ids.shape
    stage, stages = groups.pp.rank(), groups.pp.size()
    inputs = model.inputs(ids.flatten(), torch.arange(0, ids.numel() + 1, length, dtype=torch.int32))
    with cpu.megatron_device(), torch.no_grad():
        if stage > 0:
            ranks = groups.tp.size() if model.config.sequence_parallel else 1
            hidden = torch.empty(ids.numel() // ranks, 1, model.config.hidden_size)
            dist.recv(hidden, group=groups.pp, group_src=stage - 1)
            model.set_input_tensor(hidden)
        output = model.eval()(inputs)
        if stage < stages - 1:
            dist.send(output.contiguous(), group=groups.pp, group_dst=stage + 1)
            return None
        local = model.last_hidden(output) @ model.output_weight.T
        shards = [torch.empty_like(local) for _ in range(groups.tp.size())]
        dist.all_gather(shards, local, group=groups.tp)
        logits = torch.cat(shards, dim=-1)
    assert logits.shape[-1] == 100 and not logits[:, VOCAB:].any(), "padding rows of the output layer are zero"
    return logits[:, :VOCAB].unflatten(0, (batch, length)).numpy()


def test_every_rank_of_every_replica_gets_every_whole_tensor(ranks4: RankPool, checkpoints: Path) -> None:
    """TP 2 x DP 2 and PP 2 x DP 2, for a quantity derived from the parameters, as gradients are."""
    for tp, pp in ((2, 1), (1, 2)):
        for names in ranks4.run(_export_doubled, str(checkpoints / "qwen2-bias-tied"), tp, pp):
            assert len(names) == 50 and len(set(names)) == 50


def _export_doubled(rank: int, source: str, tp: int, pp: int) -> list[str]:
    from safetensors.torch import load_file

    from nemo_opd.config import LayoutConfig
    from nemo_opd.engines.megatron import cpu, parallel
    from nemo_opd.engines.megatron.model import build_model
    from nemo_opd.engines.megatron.weights import export_hf_weights

    cpu.install()
    layout = parallel.Layout(tp, pp, 2, rank)
    parallel.destroy_student_groups()  # of an earlier test in this process
    groups = parallel.student_groups(layout, seed=0)
    try:
        config = LayoutConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        model, architecture = build_model(source, config, layout, groups, torch.float32, "student")
        files = [load_file(path) for path in sorted(Path(source).glob("*.safetensors"))]
        expected = {name: tensor for tensors in files for name, tensor in tensors.items()}
        names = []
        for name, tensor in export_hf_weights(model, architecture, tensor_of=lambda p: 2 * p.detach().double()):
            assert tensor.dtype == torch.float64 and torch.equal(tensor, 2 * expected[name].double()), name
            names.append(name)
        return names
    finally:
        parallel.destroy_student_groups()
