from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from nemo_opd.errors import ConfigError
from nemo_opd.prompts.template import eos_token_ids, load_tokenizer, render_chat
from nemo_opd.tasks.arithmetic import ArithmeticTask, records
from nemo_opd.tasks.cli import add_arguments, run
from nemo_opd.tasks.models import FAMILIES, ModelShape, write_random_model
from nemo_opd.tasks.tokenizer import CHARACTERS, SPECIAL_TOKENS, VOCAB_SIZE, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


def test_tokenizer_round_trips_every_character_and_has_distinct_ends(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = tokenizer(CHARACTERS, add_special_tokens=False)["input_ids"]
    assert ids == list(range(len(SPECIAL_TOKENS), VOCAB_SIZE))
    assert tokenizer.decode(ids) == CHARACTERS
    assert len(tokenizer) == VOCAB_SIZE == 59
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4
    assert tokenizer("7É", add_special_tokens=False)["input_ids"] == [ids[7], tokenizer.unk_token_id]


def test_every_character_of_the_task_is_known(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    for record in records(ArithmeticTask("+-*", 2, 4), 100, seed=0):
        for text in record.values():
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_chat_template_renders_one_token_per_character(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = render_chat(tokenizer, ({"role": "user", "content": "7+5="},))
    assert tokenizer.convert_ids_to_tokens(list(ids)) == ["<bos>", "<user>", "7", "+", "5", "=", "<assistant>"]


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_model_loads_with_transformers(tmp_path: Path, tokenizer_folder: Path, family: str, tie: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    shape = ModelShape(hidden_size=32, layers=2, heads=4, kv_heads=2, ffn=48)
    before = torch.random.get_rng_state()
    count = write_random_model(tmp_path, tokenizer_folder, family, shape, seed=4, tie=tie, vocab_size=61)
    assert torch.equal(before, torch.random.get_rng_state())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.model_type == family
    assert model.get_input_embeddings().weight.shape == (61, 32)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tie
    assert sum(p.numel() for p in model.parameters()) == count
    tokenizer = load_tokenizer(tmp_path)
    assert eos_token_ids(tmp_path, tokenizer) == (tokenizer.eos_token_id,)
    assert list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("*.bin"))
    again = write_random_model(tmp_path / "again", tokenizer_folder, family, shape, seed=4, tie=tie, vocab_size=61)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again == count
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hidden_size": 33}, "multiple of 8"),
        ({"heads": 4, "kv_heads": 3}, "divisor of 4"),
        ({"layers": 0}, "positive"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelShape(**shape)


def test_vocabulary_below_the_tokenizers_and_unknown_family_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(ConfigError, match="at least the tokenizer's 59"):
        write_random_model(tmp_path, tokenizer_folder, vocab_size=58)
    with pytest.raises(ConfigError, match="family"):
        write_random_model(tmp_path, tokenizer_folder, family="gpt2")


def _command(line: list[str]) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(line))


def test_commands_write_data_tokenizer_and_model(tmp_path: Path) -> None:
    data, model = str(tmp_path / "data"), str(tmp_path / "model")
    assert _command(["arithmetic", data, "--train", "20", "--heldout", "5", "--terms", "3", "--noise", "0.5"]) == 0
    lines = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    assert len(lines) == 20 and set(json.loads(lines[0])) == {"prompt", "answer", "response"}
    assert _command(["model", model, "--tokenizer", f"{data}/tokenizer", "--hidden", "32", "--ffn", "48"]) == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["vocab_size"]) == ("qwen3", 32, VOCAB_SIZE)
    with pytest.raises(ConfigError):
        _command(["arithmetic", data, "--operations", "/"])
