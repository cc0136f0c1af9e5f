"""Do student and teacher mean the same by a token, an end and a prompt? Read from tokenizers and small files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_opd.config import Config, SamePromptContext
from nemo_opd.configuration.model_files import read_model_sizes
from nemo_opd.doctor.finding import Finding, Verdict
from nemo_opd.errors import ConfigError
from nemo_opd.prompts.template import (
    Tokenizer,
    chat_text,
    differing_tokens,
    eos_token_ids,
    load_tokenizer,
    with_system_prompt,
)

THINKING = ("enable_thinking", "thinking", "reasoning_effort")
"""Variables by which chat templates are told to think or not to: Qwen3, DeepSeek V3.1 and Granite, gpt-oss."""
_QUESTION = {"role": "user", "content": "What is 12 + 30?"}
_ANSWER = "It is 42"
_SHOWN = 24  # characters of a difference


def token_findings(config: Config) -> list[Finding]:
    """All checks of this file. Raises ConfigError where a tokenizer cannot be read."""
    student = load_tokenizer(config.student.model)
    ends = eos_token_ids(config.student.model, student)
    found = [
        vocabulary("student", config.student.model, student),
        *(prompt_findings(config, "student", student, ends) if config.data.chat_template else []),
    ]
    for key, section in config.every_teacher().items():
        if section.model is None or section.engine == "none":
            continue
        teacher = load_tokenizer(section.model, f"{key}.model")
        found += [
            token_ids(key, student, teacher),
            vocabulary(key, section.model, teacher),
            end_tokens(key, ends, eos_token_ids(section.model, teacher, f"{key}.model")),
        ]
        if config.data.chat_template:
            found.append(same_template(config, key, student, teacher))
            if not isinstance(config.context, SamePromptContext):  # only then is the teacher's own template used
                found += [one for one in [thinking(key, teacher, config.data.template_arguments)] if one]
    return found


def token_ids(key: str, student: Tokenizer, teacher: Tokenizer) -> Finding:
    """The same text has the same id in both: a teacher's score is about ids."""
    name, bound = f"{key}: token ids", "the student's"
    other = differing_tokens(student, teacher)
    if not other:
        return Finding(name, Verdict.OK, f"{len(student.get_vocab())} tokens, all the same", bound)
    token, ours, theirs = other[0]
    found = f"{len(other)} tokens differ, first {token!r}: {theirs} for {ours}"
    return Finding(name, Verdict.FAIL, found, bound, f"choose a teacher of the student's family ({key}.model)")


def vocabulary(key: str, model: str, tokenizer: Tokenizer) -> Finding:
    """The model has a row for every id of its tokenizer; rows that no token uses are usual."""
    rows, largest = read_model_sizes(f"{key}.model", Path(model), convertible=False).vocabulary, _largest(tokenizer)
    name, found = f"{key}: vocabulary", f"{rows} rows, largest id {largest}"
    if largest < rows:
        return Finding(name, Verdict.OK, found, "a row for each id")
    way_out = "tokenizer and weights are of two models, or tokens were added without rows: copy both from one model"
    return Finding(name, Verdict.FAIL, found, "a row for each id", way_out)


def end_tokens(key: str, student: Sequence[int], teacher: Sequence[int]) -> Finding:
    """What ends a response ends one for the teacher too: it is scored, and a teacher that ends otherwise finds it
    improbable. The first of the student's ids is the one that written responses get."""
    name, found = f"{key}: end tokens", f"{sorted(teacher)}, student {sorted(student)}"
    if set(student) == set(teacher):
        return Finding(name, Verdict.OK, found, "the student's")
    way_out = "make eos_token_id in both generation_config.json the same"
    if student[0] in teacher:
        return Finding(name, Verdict.WARN, found, "the student's", way_out)
    way_out = f"the teacher does not end with {student[0]}: {way_out}, or choose a teacher that was trained to"
    return Finding(name, Verdict.FAIL, found, "the student's", way_out)


def prompt_findings(config: Config, key: str, tokenizer: Tokenizer, ends: Sequence[int]) -> list[Finding]:
    """What the model's own chat template does with a conversation."""
    arguments = config.data.template_arguments
    try:
        chat_text(tokenizer, with_system_prompt((_QUESTION,), config.data.system_prompt), arguments)
    except ConfigError as error:
        return [Finding(f"{key}: chat template", Verdict.FAIL, str(error.got), error.expected, error.way_out)]
    found = [turn_end(key, tokenizer, ends, arguments), thinking(key, tokenizer, arguments)]
    return [one for one in [*found, unread(key, tokenizer, arguments), dated(key, tokenizer, arguments)] if one]


def turn_end(key: str, tokenizer: Tokenizer, ends: Sequence[int], arguments: Mapping[str, Any]) -> Finding:
    """The token that the template puts behind an answer ends a response, or responses would go on behind it."""
    name, bound = f"{key}: end of a turn", f"one of the end tokens {sorted(ends)}"
    conversation = (_QUESTION, {"role": "assistant", "content": _ANSWER})
    behind = chat_text(tokenizer, conversation, arguments, open_turn=False).rpartition(_ANSWER)[2]
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    if ids and ids[0] in ends:
        return Finding(name, Verdict.OK, f"{tokenizer.convert_ids_to_tokens(ids[0])} ({ids[0]})", bound)
    found = f"{tokenizer.convert_ids_to_tokens(ids[0])} ({ids[0]})" if ids else "nothing"
    way_out = "responses end where the template does not: name the token in eos_token_id of generation_config.json"
    return Finding(name, Verdict.WARN, found, bound, way_out)


def thinking(key: str, tokenizer: Tokenizer, arguments: Mapping[str, Any]) -> Finding | None:
    """A template that knows thinking is told which, in the recipe; None where it knows nothing of it."""
    reads = variables(tokenizer)
    known = [name for name in THINKING if name in reads]
    if not known:
        return None
    name, bound = f"{key}: thinking", "a line of the recipe"
    said = [f"{word}={arguments[word]}" for word in known if word in arguments]
    if said:
        return Finding(name, Verdict.OK, ", ".join(said), bound)
    line = f"data.template_arguments.{known[0]}"
    way_out = f"say it: {line}=false (or true, with rollout.max_new_tokens for the thoughts)"
    if known[0] == "reasoning_effort":
        way_out = f"say it: {line}=low (or medium, high)"
    return Finding(name, Verdict.FAIL, f"{known[0]} is not set, {_means(tokenizer, known[0])}", bound, way_out)


def unread(key: str, tokenizer: Tokenizer, arguments: Mapping[str, Any]) -> Finding | None:
    """Arguments that the template does not read; None where there are none."""
    lost = sorted(set(arguments) - variables(tokenizer))
    if not lost:
        return None
    way_out = "a word that the template does not know changes nothing: correct it, or leave it out"
    return Finding(f"{key}: template arguments", Verdict.WARN, f"{', '.join(lost)} not read", "all read", way_out)


def dated(key: str, tokenizer: Tokenizer, arguments: Mapping[str, Any]) -> Finding | None:
    """A template with today's date in it makes other prompts tomorrow; None where it has none."""
    if "strftime_now" not in variables(tokenizer) or "date_string" in arguments:
        return None
    way_out = 'a resumed run would see other prompts: fix it, as in data.template_arguments.date_string="26 Jul 2024"'
    return Finding(f"{key}: date", Verdict.WARN, "the template asks for today's", "the same prompt every day", way_out)


def same_template(config: Config, key: str, student: Tokenizer, teacher: Tokenizer) -> Finding:
    """Both render a conversation alike, where the teacher is shown the student's rendering."""
    name, bound = f"{key}: chat template", "the student's rendering"
    messages = with_system_prompt((_QUESTION,), config.data.system_prompt)
    if not isinstance(config.context, SamePromptContext):
        return Finding(name, Verdict.OK, f"its own (context {config.context.name})", "its own")
    if not teacher.chat_template:
        way_out = "a model without a template never saw such prompts: choose a teacher that did, or chat_template=false"
        return Finding(name, Verdict.WARN, "none", bound, way_out)
    try:
        ours, theirs = (chat_text(t, messages, config.data.template_arguments) for t in (student, teacher))
    except ConfigError as error:
        return Finding(name, Verdict.WARN, str(error.got), bound, error.way_out)
    if ours == theirs:
        return Finding(name, Verdict.OK, "the same text", bound)
    way_out = "the teacher reads prompts of another form than its own: give both the same chat template"
    return Finding(name, Verdict.WARN, first_difference(ours, theirs), bound, way_out)


def first_difference(ours: str, theirs: str) -> str:
    """``at character 12: '<user>What' for '[INST]What'``, the teacher's first."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    begin = max(0, place - 4)
    a, b = (text[begin : place + _SHOWN] for text in (ours, theirs))
    return f"at character {place}: {b!r} for {a!r}"


def variables(tokenizer: Tokenizer) -> set[str]:
    """Names that the chat template reads and does not set itself."""
    import jinja2
    import jinja2.meta

    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default", "")
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template or "")
    except jinja2.TemplateSyntaxError:  # tags of transformers' own, as {% generation %}
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_without_generation(template))
    return jinja2.meta.find_undeclared_variables(tree)


def _without_generation(template: str) -> str:
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


def _means(tokenizer: Tokenizer, name: str) -> str:
    """What the template makes of a switch that nobody set."""
    unset = chat_text(tokenizer, (_QUESTION,))
    meant = [
        str(value).lower() for value in (True, False) if chat_text(tokenizer, (_QUESTION,), {name: value}) == unset
    ]
    return f"which reads as {' or '.join(meant) or 'neither true nor false'}"


def _largest(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab().values())
