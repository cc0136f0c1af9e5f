"""S9: a model's folder is weights and JSON. One that names code is refused by everything that reads models, a name on
a hub is refused with what to do, and a chat template stays in its sandbox."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_opd.cli import main
from nemo_opd.engines.hf.model import load_model
from nemo_opd.engines.megatron.families import read_architecture
from nemo_opd.engines.vllm.settings import ServerSettings
from nemo_opd.errors import ConfigError
from nemo_opd.foreign import JSON_FILES, names_code
from nemo_opd.prompts.template import chat_text, load_tokenizer
from nemo_opd.tasks.models import ModelShape, write_random_model
from nemo_opd.tasks.tokenizer import write_tokenizer
from tests.unit.configuration.workspace import make_workspace

FIELDS: list[dict[str, Any]] = [
    {"auto_map": {"AutoConfig": "evil.T", "AutoTokenizer": ["evil.T", "evil.T"], "AutoModelForCausalLM": "evil.T"}},
    {"auto_map": {"AutoModelForCausalLM": "somebody/else--evil.T"}},
    {"text_config": {"auto_map": {"AutoConfig": "evil.T"}}},
    {"parts": [{"custom_pipelines": {"x": {"impl": "evil.T"}}}]},
    {"_attn_implementation_internal": "somebody/kernel"},
    {"attn_implementation": "somebody/kernel:flash"},
    {"_attn_implementation": {"text": "somebody/kernel"}},
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model with a file of code beside it that leaves a canary."""
    write_tokenizer(tmp_path / "tokenizer")
    folder = tmp_path / "model"
    shape = ModelShape(hidden_size=32, layers=1, heads=4, kv_heads=2, ffn=64)
    write_random_model(folder, tmp_path / "tokenizer", shape=shape, seed=0)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass T: pass\n")
    return folder


def add(file: Path, fields: dict[str, Any]) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **fields}))


def test_the_model_is_fine_without_it(model: Path) -> None:
    load_tokenizer(model)
    load_model(model)
    read_architecture(model)


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: json.dumps(fields)[:40])
@pytest.mark.parametrize("file", JSON_FILES)
def test_a_folder_that_names_code_is_refused_and_none_of_it_runs(
    model: Path, file: str, fields: dict[str, Any]
) -> None:
    add(model / file, fields)
    for read in (load_tokenizer, load_model):
        with pytest.raises(ConfigError, match="is never run here"):
            read(model)
    if file == "config.json" and "auto_map" in fields:
        with pytest.raises(ConfigError, match="auto_map"):
            read_architecture(model)
    assert not (model.parent / "canary").exists(), "executed 0"


def test_other_fields_are_none(model: Path) -> None:
    for fields in ({"_attn_implementation": "sdpa"}, {"attn_implementation": None}, {"_name_or_path": "a/b"}):
        assert names_code({**json.loads((model / "config.json").read_text()), **fields}) is None


@pytest.mark.parametrize("key", ["student.model", "teacher.model", "teacher.base_model"])
def test_a_recipe_with_such_a_model_never_starts(tmp_path: Path, monkeypatch, capsys, key: str) -> None:
    monkeypatch.chdir(tmp_path)
    make_workspace(tmp_path)
    for name in ("student", "teacher"):
        add(tmp_path / name / "config.json", FIELDS[4] if key == f"{name}.model" else {})
    words = []
    if key == "teacher.base_model":
        add(tmp_path / "student" / "x.json", {})
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "config.json").write_text((tmp_path / "teacher" / "config.json").read_text())
        add(tmp_path / "base" / "config.json", FIELDS[0])
        words = ["loss=extrapolated", "teacher.base_model=base"]
    assert main(["train", "recipe.yaml", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {key}") and "with code of its own" in error
    assert not (tmp_path / "run").exists()


def test_a_server_with_such_a_model_never_starts(model: Path, tmp_path: Path) -> None:
    add(model / "config.json", FIELDS[0])
    settings = ServerSettings(str(model), "writer", str(tmp_path / "ready"), str(tmp_path))
    done = started(tmp_path, settings)
    assert done.returncode != 0 and "auto_map" in done.stderr
    assert not (tmp_path / "canary").exists() and not (tmp_path / "ready").exists()


def started(folder: Path, settings: ServerSettings) -> subprocess.CompletedProcess[str]:
    (folder / "settings.json").write_text(replace(settings, dtype="float32").to_json())
    command = [sys.executable, "-m", "nemo_opd.engines.vllm.server", str(folder / "settings.json")]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_name_on_a_hub_is_refused_with_what_to_do(tmp_path: Path, monkeypatch, capsys) -> None:
    """Nothing is downloaded, so no revision has to be guessed: whoever downloads names it."""
    monkeypatch.chdir(tmp_path)
    make_workspace(tmp_path)
    assert main(["train", "recipe.yaml", "student.model=Qwen/Qwen3-0.6B"]) == 2
    assert "`hf download NAME --revision COMMIT --local-dir DIR`" in capsys.readouterr().err


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch {canary}') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('touch {canary}') }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ ('%s' | attr('format'))(messages) }}{{ (messages | attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}{{ raise_exception('no') }}",
    "{% set x = messages.append('more') %}{{ x.__class__.__base__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch {canary}') }}",
    "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "{{ 'x' * 10**11 }}{{ raise_exception('no') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ raise_exception('no') }}",
    "{% if %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_stays_in_its_sandbox(model: Path, template: str) -> None:
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = template.replace("{canary}", str(model.parent / "canary"))
    try:
        text = chat_text(tokenizer, [{"role": "user", "content": "?"}])
    except (ConfigError, MemoryError):
        text = ""
    assert not (model.parent / "canary").exists(), "executed 0"
    assert not any(word in text for word in ("<class", "root:", "os.system", "built-in", "module"))
