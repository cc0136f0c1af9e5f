from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nemo_opd.errors import ConfigError
from nemo_opd.prompts.template import (
    eos_token_ids,
    load_tokenizer,
    render_chat,
    render_text,
    response_token_ids,
    with_system_prompt,
)

USER = {"role": "user", "content": "7+5="}


@pytest.fixture
def folder(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tokenizer_folder, tmp_path / "model"))


def test_chat_is_what_transformers_renders(tokenizer) -> None:
    messages = ({"role": "system", "content": "be brief"}, USER)
    expected = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
    assert list(render_chat(tokenizer, messages)) == expected
    assert tokenizer.decode(expected) == "<bos><user>be brief<user>7+5=<assistant>"


def test_the_template_is_given_the_recipes_arguments(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    plain = render_chat(tokenizer, (USER,))
    tokenizer.chat_template += "{% if enable_thinking is false %}0{% endif %}"
    assert render_chat(tokenizer, (USER,)) == render_chat(tokenizer, (USER,), {"enable_thinking": True}) == plain
    told = render_chat(tokenizer, (USER,), {"enable_thinking": False})
    assert tokenizer.decode(told) == tokenizer.decode(plain) + "0"


def test_system_prompt_comes_first_unless_the_record_has_its_own() -> None:
    assert with_system_prompt((USER,), "be brief") == ({"role": "system", "content": "be brief"}, USER)
    assert with_system_prompt((USER,), None) == (USER,)
    own = ({"role": "system", "content": "own"}, USER)
    assert with_system_prompt(own, "be brief") == own


def test_no_template_and_a_template_that_refuses_are_the_users_to_mend(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(ConfigError, match="no system role here"):
        render_chat(tokenizer, (USER,))
    tokenizer.chat_template = "{{ messages.__class__.__mro__ }}"  # jinja's sandbox: no way to Python's internals
    with pytest.raises(ConfigError, match="unsafe"):
        render_chat(tokenizer, (USER,))
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"data\.chat_template=false"):
        render_chat(tokenizer, (USER,))


def test_plain_text_gets_the_tokenizers_begin_but_never_its_end(folder: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(folder)
    plain = render_text(tokenizer, "7+5=")
    assert tokenizer.decode(plain) == "7+5="
    ends = [("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    assert tokenizer("7+5=")["input_ids"][-1] == tokenizer.eos_token_id
    assert render_text(tokenizer, "7+5=") == (tokenizer.bos_token_id, *plain)


def test_response_is_tokenised_apart_and_ends_with_eos(tokenizer) -> None:
    ids = response_token_ids(tokenizer, "12#12", 2)
    assert ids[-1] == 2 and tokenizer.decode(ids[:-1]) == "12#12"


def test_eos_ids_are_gathered_with_the_tokenizers_own_first(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    own = tokenizer.eos_token_id
    assert eos_token_ids(folder, tokenizer) == (own,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [41, own, 40]}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 42}))
    assert eos_token_ids(folder, tokenizer) == (own, 41, 40, 42)
    tokenizer.eos_token = None
    assert eos_token_ids(folder, tokenizer) == (41, own, 40, 42)
    (folder / "generation_config.json").write_text("{}")
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="eos_token_id"):
        eos_token_ids(folder, tokenizer)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_repository_with_its_own_code_is_refused_and_nothing_of_it_runs(folder: Path, file: str) -> None:
    canary = folder / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass T: pass\n")
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    content["auto_map"] = {"AutoTokenizer": ["evil.T", "evil.T"], "AutoConfig": "evil.T"}
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="auto_map"):
        load_tokenizer(folder)
    assert not canary.exists()


def test_folders_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="check the path"):
        load_tokenizer(tmp_path / "absent", key="teacher.model")
    with pytest.raises(ConfigError, match=r"tokenizer\.json") as caught:
        load_tokenizer(tmp_path, key="teacher.model")
    assert caught.value.key == "teacher.model"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_tokenizer(tmp_path)
