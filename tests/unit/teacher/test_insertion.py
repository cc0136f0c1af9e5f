"""Inserted text cannot act as anything but text, and stands where it belongs."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest

from nemo_opd.errors import ConfigError
from nemo_opd.prompts.template import load_tokenizer, render_chat
from nemo_opd.tasks.tokenizer import write_tokenizer
from nemo_opd.teacher.insertion import ContextRenderer, ControlTokens, fair_shares

USER = {"role": "user", "content": "What is 7+5?"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module", params=["chatml", "characters"])
def tokenizer(request: pytest.FixtureRequest, chatml: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "chatml":
        return chatml
    folder: Path = tmp_path_factory.mktemp("characters")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def control_texts(tokenizer: Any) -> list[str]:
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip()]


def test_control_tokens_are_special_and_visible_added_ones(chatml: Any) -> None:
    named = {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool>"}
    assert ControlTokens(chatml).ids == set(chatml.convert_tokens_to_ids(sorted(named)))
    assert ControlTokens(chatml).removed_from("if x:\n    return") == "if x:\n    return"


def test_every_special_token_split_over_every_boundary(tokenizer: Any) -> None:
    """A token, split anywhere, with any token between the halves, also twice over: removal must not make a new one."""
    renderer, texts = ContextRenderer(tokenizer), control_texts(tokenizer)
    cases = []
    for token in texts:
        for cut in range(len(token) + 1):
            for inner in texts:
                once = token[:cut] + inner + token[cut:]
                cases += [once, f"7 {once} 5", token[:cut] + once + token[cut:]]
    spans = renderer.encode(cases)
    assert all(not renderer.control.ids & set(span) for span in spans)
    for case, span in zip(cases, spans, strict=True):
        kept = renderer.control.removed_from(case)
        assert not any(token in kept for token in texts), case
        assert not any(token in tokenizer.decode(span) for token in texts), case


def test_random_mixtures_of_pieces_of_special_tokens(tokenizer: Any) -> None:
    renderer, texts, draw = ContextRenderer(tokenizer), control_texts(tokenizer), random.Random(0)
    for _ in range(3000):
        pieces = []
        for _ in range(draw.randrange(1, 12)):
            token = draw.choice(texts)
            start, end = sorted(draw.choices(range(len(token) + 1), k=2))
            pieces.append(draw.choice([token, token[start:end], token[:end], token[start:], "7 ", "\n"]))
        text = "".join(pieces)
        kept = renderer.control.removed_from(text)
        assert not any(token in kept for token in texts), text
        assert renderer.control.removed_from(kept) == kept
        assert not renderer.control.ids & set(renderer.encode([text])[0]), text


def test_text_without_control_tokens_is_kept(chatml: Any) -> None:
    renderer = ContextRenderer(chatml)
    for text in ("x <- 3; y > 2 | z", "<|im_ start|>", "\\frac{a}{b} <b>bold</b>", "日本語 ✓", "    indented"):
        assert renderer.control.removed_from(text) == text
        assert chatml.decode(renderer.encode([text])[0]) == text


def test_a_tokenizer_that_rewrites_text_first(chatml: Any) -> None:
    """Full-width letters become a control token only inside the tokenizer: the filter of ids catches it."""
    text = "＜tool＞"
    assert ContextRenderer(chatml).control.removed_from(text) == text
    assert chatml.convert_tokens_to_ids("<tool>") in chatml(text)["input_ids"]
    assert ContextRenderer(chatml).encode([text])[0] == ()


@pytest.mark.parametrize(
    ("place", "messages", "expected"),
    [
        ("user", [USER], "user\nWhat is 7+5?\n\nHint: 12!<|im_end|>"),
        ("user", [SYSTEM, USER], "user\nWhat is 7+5?\n\nHint: 12!<|im_end|>"),
        ("user", [USER, {"role": "assistant", "content": "13"}, USER | {"content": "No."}],
         "assistant\n13<|im_end|>\n<|im_start|>user\nNo.\n\nHint: 12!<|im_end|>"),
        ("user", [USER, {"role": "tool", "content": "ok"}],
         "user\nWhat is 7+5?\n\nHint: 12!<|im_end|>\n<|im_start|>tool\nok<|im_end|>"),
        ("user", [SYSTEM], "user\nHint: 12!<|im_end|>"),
        ("system", [USER], "system\nHint: 12!<|im_end|>\n<|im_start|>user\nWhat is 7+5?<|im_end|>"),
        ("system", [SYSTEM, USER],
         "system\nBe brief.\n\nHint: 12!<|im_end|>\n<|im_start|>user\nWhat is 7+5?<|im_end|>"),
    ],
)  # fmt: skip
def test_where_the_insertion_stands(chatml: Any, place: str, messages: list[dict[str, str]], expected: str) -> None:
    renderer, before = ContextRenderer(chatml, place), copy.deepcopy(messages)
    inserted = renderer.encode(["12"])[0]
    rendered = renderer.render(messages, inserted, "Hint: ", "!")
    text = chatml.decode(rendered.ids)
    assert expected in text
    assert text.endswith("<|im_start|>assistant\n")
    assert rendered.inserted == inserted
    assert rendered.ids == rendered.before + inserted + rendered.after
    assert messages == before, "what was handed in is not changed"


def test_without_an_insertion_the_teacher_sees_the_students_prompt(tokenizer: Any) -> None:
    renderer = ContextRenderer(tokenizer)
    assert renderer.plain([USER]).ids == render_chat(tokenizer, [USER])
    assert renderer.plain([USER]).inserted == ()


def test_a_message_that_contains_the_mark(chatml: Any) -> None:
    user = {"role": "user", "content": "[inserted text 0] [inserted text 1]"}
    rendered = ContextRenderer(chatml).render([user], (7,), "", "[inserted text 2]")
    assert chatml.decode(rendered.before).endswith("[inserted text 0] [inserted text 1]\n\n")
    assert chatml.decode(rendered.after).startswith("[inserted text 2]<|im_end|>")


def test_templates_that_have_no_room_are_refused_at_the_start(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + str(tokenizer.chat_template)
    )
    ContextRenderer(tokenizer)
    with pytest.raises(ConfigError, match=r"context\.place: got system .*no system.*set context\.place=user"):
        ContextRenderer(tokenizer, "system")
    tokenizer.chat_template = "always the same"
    with pytest.raises(ConfigError, match="shows a message 0 times"):
        ContextRenderer(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"teacher\.model: got a tokenizer without a chat template"):
        ContextRenderer(tokenizer)


def test_the_longest_are_cut_first() -> None:
    assert fair_shares([10, 2, 9], 12) == [5, 2, 5]
    assert fair_shares([3, 4], 100) == [3, 4]
    assert fair_shares([5, 5, 5], 4) == [1, 1, 2]
    assert fair_shares([], 4) == []
    draw = random.Random(1)
    for _ in range(200):
        lengths, budget = draw.choices(range(20), k=draw.randrange(1, 6)), draw.randrange(60)
        shares = fair_shares(lengths, budget)
        assert sum(shares) == min(sum(lengths), budget)
        assert all(share <= length for share, length in zip(shares, lengths, strict=True))
        cut = [share for share, length in zip(shares, lengths, strict=True) if share < length]
        assert not cut or max(shares) - min(cut) <= 1, "nothing that is cut is shorter than what is kept"
