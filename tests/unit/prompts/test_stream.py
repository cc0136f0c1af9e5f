from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_opd.config import DataConfig
from nemo_opd.errors import ConfigError
from nemo_opd.prompts.stream import PromptStream, first_prompts

N = 10


def _write(path: Path, records) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    rows = [{"prompt": f"{i}+1=", "answer": i + 1, "response": str(i + 1), "kind": "add"} for i in range(N)]
    return DataConfig(path=_write(tmp_path / "data.jsonl", rows))


def _names(prompts) -> list[tuple[int, int]]:
    return [(p.epoch, p.index) for p in prompts]


def test_a_prompt_is_complete(data: DataConfig, tokenizer) -> None:
    prompt = next(p for p in PromptStream(data, tokenizer).take(N) if p.index == 3)
    assert prompt.messages == ({"role": "user", "content": "3+1="},)
    assert tokenizer.decode(prompt.token_ids) == "<bos><user>3+1=<assistant>"
    assert (prompt.answer, prompt.response, dict(prompt.meta)) == ("4", None, {"kind": "add"})
    twin = copy.deepcopy(tokenizer)
    twin.chat_template += "{{ ending }}"
    told = PromptStream(replace(data, template_arguments={"ending": "#"}), twin).take(1)[0]
    assert twin.decode(told.token_ids).endswith("+1=<assistant>#")
    written = PromptStream(data, tokenizer, needs_response=True).take(N)
    assert {p.index: p.response for p in written}[3] == "4"


@pytest.mark.parametrize("batch", [1, 3, 4, 10, 23])
def test_every_epoch_holds_every_prompt_once_whatever_the_batch(data: DataConfig, tokenizer, batch: int) -> None:
    stream = PromptStream(data, tokenizer, seed=5)
    names: list[tuple[int, int]] = []
    while len(names) < 3 * N:
        names += _names(stream.take(batch))
    for epoch in range(3):
        assert sorted(i for _, i in names[epoch * N : (epoch + 1) * N]) == list(range(N))
        assert {e for e, _ in names[epoch * N : (epoch + 1) * N]} == {epoch}


def test_the_order_follows_from_seed_and_epoch_and_batches_do_not_matter(data: DataConfig, tokenizer) -> None:
    def order(seed: int) -> list[int]:
        return [p.index for p in PromptStream(data, tokenizer, seed).take(2 * N)]

    assert order(5) == order(5)
    assert order(5) != order(6)
    assert order(5)[:N] != order(5)[N:]
    stream = PromptStream(data, tokenizer, 5)
    assert [stream.take(1)[0].index for _ in range(2 * N)] == order(5)
    unshuffled = PromptStream(replace(data, shuffle=False), tokenizer, 5)
    assert [p.index for p in unshuffled.take(2 * N)] == list(range(N)) * 2


def test_the_permutation_is_even(tmp_path: Path, tokenizer) -> None:
    """Each of 4 records comes first about equally often over 400 seeds (chi-squared test, p = 1e-4)."""
    data = DataConfig(path=_write(tmp_path / "d.jsonl", [{"prompt": f"{i}"} for i in range(4)]))
    first = Counter(PromptStream(data, tokenizer, seed).take(1)[0].index for seed in range(400))
    assert sum((first[i] - 100) ** 2 / 100 for i in range(4)) < 21.1


@pytest.mark.parametrize("taken", [0, 4, N - 1, N, N + 1, 2 * N])
def test_seek_goes_on_exactly_where_state_was_taken(data: DataConfig, tokenizer, taken: int) -> None:
    stream = PromptStream(data, tokenizer, seed=2)
    stream.take(taken)
    state = json.loads(json.dumps(stream.state()))
    rest = stream.take(15)
    resumed = PromptStream(data, tokenizer, seed=2)
    resumed.seek(state)
    assert _names(resumed.take(15)) == _names(rest)
    assert resumed.state() == stream.state()


def test_seek_onto_another_data_set_is_refused(data: DataConfig, tokenizer, tmp_path: Path) -> None:
    state = PromptStream(data, tokenizer).state()
    other = DataConfig(path=_write(tmp_path / "other.jsonl", [{"prompt": "1"}] * 3))
    with pytest.raises(ConfigError, match="10 records"):
        PromptStream(other, tokenizer).seek(state)


MALFORMED = [
    ('{"prompt": ', "JSON"),
    ({"question": "x"}, "no 'prompt' \\(keys: \\['question'\\]\\)"),
    ({"prompt": ""}, "''"),
    ({"prompt": None}, "None"),
    ({"prompt": 7}, "7"),
    ({"prompt": []}, r"\[\]"),
    ({"prompt": ["x"]}, "message 0"),
    ({"prompt": [{"role": "user"}]}, "message 0"),
    ({"prompt": [{"role": "robot", "content": "x"}]}, "robot"),
    ({"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "ends with the assistant"),
    ({"prompt": "x", "answer": ["a"]}, "answer"),
    ({"prompt": "x", "answer": True}, "answer"),
]


@pytest.mark.parametrize(("bad", "message"), MALFORMED)
def test_malformed_record_names_file_and_line_at_once(tmp_path: Path, tokenizer, bad, message: str) -> None:
    data = DataConfig(path=_write(tmp_path / "d.jsonl", [{"prompt": "1"}, {"prompt": "2"}, bad]))
    with pytest.raises(ConfigError, match=message) as caught:
        PromptStream(data, tokenizer)
    assert caught.value.key == f"{tmp_path / 'd.jsonl'}, line 3"


@pytest.mark.parametrize(("bad", "_message"), MALFORMED)
def test_malformed_record_is_skipped_and_counted_when_the_recipe_says_so(tmp_path, tokenizer, bad, _message) -> None:
    data = DataConfig(path=_write(tmp_path / "d.jsonl", [{"prompt": "1"}, bad, {"prompt": "3"}]), on_malformed="skip")
    stream = PromptStream(data, tokenizer, seed=1)
    prompts = stream.take(6)
    assert Counter(p.index for p in prompts) == {0: 3, 2: 3}
    assert stream.skipped["malformed"] in (2, 3)  # the third epoch's may still lie ahead
    resumed = PromptStream(data, tokenizer, seed=1)
    resumed.seek(stream.state())
    assert resumed.skipped == stream.skipped


def test_a_missing_response_is_malformed_only_where_one_is_needed(tmp_path: Path, tokenizer) -> None:
    data = DataConfig(path=_write(tmp_path / "d.jsonl", [{"prompt": "1"}]))
    assert len(PromptStream(data, tokenizer).take(2)) == 2
    with pytest.raises(ConfigError, match="response"):
        PromptStream(data, tokenizer, needs_response=True)


def test_malformed_beyond_the_first_look_is_refused_when_reached(tmp_path: Path, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("nemo_opd.prompts.stream._CHECKED_AT_START", 1)
    data = DataConfig(path=_write(tmp_path / "d.jsonl", [{"prompt": "1"}, "{"]), shuffle=False)
    stream = PromptStream(data, tokenizer)
    stream.take(1)
    with pytest.raises(ConfigError) as caught:
        stream.take(1)
    assert caught.value.key.endswith("line 2")


def test_long_prompts_are_skipped_never_cut(tmp_path: Path, tokenizer) -> None:
    rows = [{"prompt": "1" * n} for n in (1, 5, 50)]
    data = DataConfig(path=_write(tmp_path / "d.jsonl", rows), max_prompt_tokens=8)
    stream = PromptStream(data, tokenizer)
    prompts = stream.take(4)
    assert {p.index for p in prompts} == {0, 1}
    assert max(len(p.token_ids) for p in prompts) == 8
    assert stream.skipped["too_long"] in (1, 2)


@pytest.mark.parametrize("rows", [["{"], [{"prompt": "1" * 50}]])
def test_no_usable_prompt_ends_instead_of_looping(tmp_path: Path, tokenizer, rows) -> None:
    data = DataConfig(path=_write(tmp_path / "d.jsonl", rows), max_prompt_tokens=8, on_malformed="skip")
    with pytest.raises(ConfigError, match="without a usable prompt"):
        PromptStream(data, tokenizer).take(1)


def test_messages_and_system_prompt(tmp_path: Path, tokenizer) -> None:
    talk = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    data = DataConfig(path=_write(tmp_path / "d.jsonl", [{"prompt": talk}]), system_prompt="be brief")
    (prompt,) = PromptStream(data, tokenizer).take(1)
    assert prompt.messages == ({"role": "system", "content": "be brief"}, *talk)
    assert tokenizer.decode(prompt.token_ids) == "<bos><user>be brief<user>1<assistant>2<eos><user>3<assistant>"


def test_raw_text_is_fed_as_it_is_and_takes_neither_messages_nor_system_prompt(tmp_path: Path, tokenizer) -> None:
    raw = DataConfig(path=_write(tmp_path / "d.jsonl", [{"prompt": "7+5="}]), chat_template=False)
    assert tokenizer.decode(PromptStream(raw, tokenizer).take(1)[0].token_ids) == "7+5="
    with pytest.raises(ConfigError, match=r"data\.chat_template=true"):
        PromptStream(replace(raw, system_prompt="x"), tokenizer)
    talk = [{"prompt": [{"role": "user", "content": "1"}]}]
    with pytest.raises(ConfigError, match=r"data\.chat_template=true"):
        PromptStream(replace(raw, path=_write(tmp_path / "m.jsonl", talk)), tokenizer)


def test_first_prompts_are_the_files_first_usable_ones_each_once(data: DataConfig, tokenizer) -> None:
    assert _names(first_prompts(data, tokenizer, 4)) == [(0, i) for i in range(4)]
    assert _names(first_prompts(data, tokenizer)) == [(0, i) for i in range(N)]
    assert _names(first_prompts(data, tokenizer, 999)) == [(0, i) for i in range(N)]


def test_other_keys_can_be_named(tmp_path: Path, tokenizer) -> None:
    row = {"question": "1", "gold": 1.5, "solution": "s"}
    data = DataConfig(
        path=_write(tmp_path / "d.jsonl", [row]), prompt_key="question", answer_key="gold", response_key="solution"
    )
    (prompt,) = PromptStream(data, tokenizer, needs_response=True).take(1)
    assert (prompt.answer, prompt.response) == ("1.5", "s")
