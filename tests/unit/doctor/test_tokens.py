"""Token ids, ends and templates of two model folders, one of them spoilt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_opd.doctor.finding import Finding, Verdict
from nemo_opd.doctor.tokens import token_findings, variables
from nemo_opd.prompts.template import load_tokenizer
from tests.helpers.workspace import make_workspace, workspace_config

QWEN3_END = (
    "{%- if add_generation_prompt %}<assistant>"
    "{%- if enable_thinking is defined and enable_thinking is false %}#{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("doctor"), problems=4)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "ws"))


def findings(folder: Path, *overrides: str) -> dict[str, Finding]:
    return {one.name: one for one in token_findings(workspace_config(folder, *overrides))}


def change(file: Path, what: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(file.read_text())
    what(values)
    file.write_text(json.dumps(values))


def template(folder: Path, change: Callable[[str], str]) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(change(file.read_text()))


def with_thinking(text: str) -> str:
    return text.replace("{% if add_generation_prompt %}<assistant>{% endif %}", QWEN3_END)


def test_models_of_one_family_agree(folder: Path) -> None:
    found = findings(folder)
    assert {one.verdict for one in found.values()} == {Verdict.OK}
    assert {"teacher: token ids", "teacher: end tokens", "teacher: chat template", "student: end of a turn"} <= set(
        found
    )
    assert "student: thinking" not in found, "the template knows nothing of it"


def test_a_teacher_with_permuted_token_ids(folder: Path) -> None:
    def permute(values: dict[str, Any]) -> None:
        vocabulary = values["model"]["vocab"]
        vocabulary["1"], vocabulary["7"] = vocabulary["7"], vocabulary["1"]

    change(folder / "teacher" / "tokenizer.json", permute)
    found = findings(folder)["teacher: token ids"]
    assert found.verdict is Verdict.FAIL and str(found.found).startswith("2 tokens differ, first '1': 13 for 7")


def test_a_model_without_rows_for_its_tokens(folder: Path) -> None:
    change(folder / "teacher" / "config.json", lambda values: values.update(vocab_size=59))
    change(
        folder / "teacher" / "tokenizer.json",
        lambda values: values["added_tokens"].append({**values["added_tokens"][0], "id": 59, "content": "<more>"}),
    )
    found = findings(folder)
    assert found["teacher: vocabulary"].verdict is Verdict.FAIL
    assert found["teacher: vocabulary"].found == "59 rows, largest id 59"


@pytest.mark.parametrize(
    ("ends", "verdict"), [([2, 0], Verdict.WARN), ([2], Verdict.OK), ([0], Verdict.WARN)]
)  # the tokenizer's own end is one of them
def test_other_ends_of_the_teacher(folder: Path, ends: list[int], verdict: Verdict) -> None:
    (folder / "teacher" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    found = findings(folder)["teacher: end tokens"]
    assert found.verdict is verdict


def test_a_teacher_that_does_not_end_as_the_student_does(folder: Path) -> None:
    change(folder / "teacher" / "tokenizer_config.json", lambda values: values.update(eos_token="<pad>"))
    for name in ("config.json", "generation_config.json"):
        change(folder / "teacher" / name, lambda values: values.update(eos_token_id=0))
    found = findings(folder)["teacher: end tokens"]
    assert (found.verdict, found.found) == (Verdict.FAIL, "[0], student [2]")


def test_a_turn_that_ends_with_what_ends_no_response(folder: Path) -> None:
    template(folder / "student", lambda text: text.replace("{{ eos_token }}", "<user>"))
    found = findings(folder)
    assert (found["student: end of a turn"].verdict, found["student: end of a turn"].found) == (
        Verdict.WARN,
        "<user> (4)",
    )


def test_another_template_of_the_teacher_is_shown(folder: Path) -> None:
    template(folder / "teacher", lambda text: text.replace("<user>", "<user>:"))
    found = findings(folder)["teacher: chat template"]
    assert found.verdict is Verdict.WARN
    assert found.found == "at character 11: 'ser>:What is 12 + 30?<assist' for 'ser>What is 12 + 30?<assista'"
    own = findings(folder, "context=privileged", "context.text=even", "context.max_tokens=64")["teacher: chat template"]
    assert own.verdict is Verdict.OK, "there the teacher's prompt is rendered by its own"


def test_a_template_that_knows_thinking_is_told(folder: Path) -> None:
    for model in ("student", "teacher"):
        template(folder / model, with_thinking)
    found = findings(folder)["student: thinking"]
    assert (found.verdict, found.found) == (Verdict.FAIL, "enable_thinking is not set, which reads as true")
    assert found.way_out.startswith("say it: data.template_arguments.enable_thinking=false")
    told = findings(folder, "data.template_arguments.enable_thinking=false")
    assert (told["student: thinking"].verdict, told["student: thinking"].found) == (Verdict.OK, "enable_thinking=False")
    assert "teacher: thinking" not in told, "it is shown the student's prompt"
    plain = findings(folder, "data.chat_template=false")
    assert not [name for name in plain if "thinking" in name or "template" in name]


def test_a_teacher_that_thinks_in_its_own_prompt_is_told(folder: Path) -> None:
    template(folder / "teacher", with_thinking)
    words = ("context=privileged", "context.text=even", "context.max_tokens=64")
    assert findings(folder, *words)["teacher: thinking"].verdict is Verdict.FAIL
    told = findings(folder, *words, "data.template_arguments.enable_thinking=true")
    assert told["teacher: thinking"].verdict is Verdict.OK
    assert told["student: template arguments"].verdict is Verdict.WARN, "the student's template does not read it"


def test_a_template_with_todays_date(folder: Path) -> None:
    template(
        folder / "student",
        lambda text: text + "{% if date_string is defined %}{% else %}{% set d = strftime_now('%d') %}{% endif %}",
    )
    assert findings(folder)["student: date"].verdict is Verdict.WARN
    assert "student: date" not in findings(folder, "data.template_arguments.date_string=26 Jul 2024")


def test_a_template_that_refuses(folder: Path) -> None:
    template(folder / "student", lambda text: "{{ raise_exception('no') }}")
    found = findings(folder)["student: chat template"]
    assert found.verdict is Verdict.FAIL and "no" in str(found.found)


def test_variables_of_templates_with_tags_of_transformers(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "student")
    turn = "{%- generation -%}{{ m.thinking }}{% endgeneration %}{% break %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}{{{{ effort }}}}"
    assert variables(tokenizer) == {"messages", "effort"}
