"""Loads a recipe: schema < algorithm's record < recipe < command line, typed by OmegaConf.

Each layer is first flattened to dotted keys, with the place where each was written. A slot given as a bare word
(`loss: reverse_kl`, `loss=reverse_kl`) is sugar for its name, and the name picks the slot's dataclass before anything
is merged, since OmegaConf takes neither a word for a section nor a choice between dataclasses. A layer that changes
the name of a slot drops the parameters that earlier layers gave to it: they belonged to another choice.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_opd.algorithms import ALGORITHMS
from nemo_opd.config import MISSING, REFUSED_LOSSES, SLOTS, Config, OneOfSeveral
from nemo_opd.configuration.check import check
from nemo_opd.configuration.strict_yaml import parse_scalar, read_yaml
from nemo_opd.errors import ConfigError
from nemo_opd.reliability.redact import redact_data

COMMAND_LINE = "command line"
NAMED: dict[str, type] = {"teachers": OneOfSeveral}
"""Sections that hold sections of this kind, under names that the recipe chooses."""


@dataclass(frozen=True)
class Setting:
    """A value and where it was written: ``recipes/x.yaml:12``, ``command line`` or ``algorithm sft``."""

    value: Any
    where: str


FREE = "data.template_arguments"
"""The section whose keys are not ours: words and numbers under names that a chat template knows."""

_NAME = re.compile(r"[A-Za-z0-9_-]+")

Layer = dict[str, Setting]
"""Settings by dotted key."""


def load(
    recipe: Path | None,
    overrides: Sequence[str] = (),
    *,
    checked: bool = True,
    rules: Callable[[Config], None] = check,
) -> Config:
    """The whole configuration of a run.

    Args:
        recipe: a YAML file; None starts from the schema alone.
        overrides: ``key=value`` words of a command line; of a key given twice the last counts.
        checked: apply `rules` too.
        rules: raises ConfigError for what cannot work; as it is, on this machine.

    Raises:
        ConfigError: for whatever the user has to mend, with the key and where it was written.
    """
    layers = [recipe_layer(recipe) if recipe else {}, command_line_layer(overrides)]
    layers.insert(0, algorithm_layer(_last(layers, "algorithm", Config.algorithm)))
    layers.insert(0, {f"{slot}.name": Setting(_default_name(slot), "default") for slot in SLOTS})
    names = {slot: _slot_name(slot, layers) for slot in SLOTS}
    settings = _merged(layers)
    config = _typed(settings, names, _named_sections(settings))
    if checked:
        try:
            rules(config)
        except ConfigError as error:
            raise _located(error, settings) from error.__cause__
    return config


def to_yaml(config: Config) -> str:
    """Every setting as YAML. `load` of this text gives an equal configuration."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def recorded_yaml(config: Config) -> str:
    """The same for what is kept and shown: without secrets (`nemo_opd.reliability.redact`)."""
    return OmegaConf.to_yaml(OmegaConf.create(redact_data(OmegaConf.to_container(OmegaConf.structured(config)))))


def recipe_layer(path: Path) -> Layer:
    """The settings of a recipe."""
    document = read_yaml(path)
    return {key: Setting(value, document.where(key)) for key, value in _flat(document.values)}


def command_line_layer(overrides: Iterable[str]) -> Layer:
    """The settings of ``key=value`` words. A text is taken as it stands: YAML would read ``#### `` as a comment."""
    layer: Layer = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(COMMAND_LINE, f"`{word}`", "key=value", "for example train.steps=50; quote spaces")
        layer[f"{key}.name" if key in SLOTS else key] = Setting(text, COMMAND_LINE)
    return layer


def algorithm_layer(chosen: Setting) -> Layer:
    """The settings of a named algorithm."""
    if chosen.value not in ALGORITHMS:
        way_out = _did_you_mean(str(chosen.value), ALGORITHMS) or "choose one of these"
        raise ConfigError(_place("algorithm", chosen), chosen.value, f"one of {_list(ALGORITHMS)}", way_out)
    algorithm = ALGORITHMS[chosen.value]
    where = f"algorithm {algorithm.name}"
    values = {slot: dataclasses.asdict(choice) for slot, choice in algorithm.slots.items()}
    return {key: Setting(value, where) for key, value in [*_flat(values), *algorithm.settings.items()]}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values; a bare word for a slot becomes its name."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and (value or key in NAMED):
            yield from _flat(value, f"{key}.")
        elif key in SLOTS and isinstance(value, str):
            yield f"{key}.name", value
        else:
            yield key, value


def _last(layers: Sequence[Layer], key: str, default: Any) -> Setting:
    return next((layer[key] for layer in reversed(layers) if key in layer), Setting(default, "default"))


def _default_name(slot: str) -> str:
    factory: Any = Config.__dataclass_fields__[slot].default_factory
    return factory().name


def _slot_name(slot: str, layers: Sequence[Layer]) -> str:
    chosen = _last(layers, f"{slot}.name", None)
    if slot == "loss" and chosen.value in REFUSED_LOSSES:
        expected, way_out = REFUSED_LOSSES[chosen.value]
        raise ConfigError(_place("loss.name", chosen), chosen.value, expected, way_out)
    if chosen.value not in SLOTS[slot]:
        way_out = _did_you_mean(str(chosen.value), SLOTS[slot]) or "choose one of these"
        raise ConfigError(_place(f"{slot}.name", chosen), chosen.value, f"one of {_list(SLOTS[slot])}", way_out)
    return chosen.value


def _merged(layers: Sequence[Layer]) -> Layer:
    """One layer: later ones win, and a slot keeps only what was said since its name was last changed."""
    merged: Layer = {}
    for layer in layers:
        for slot in SLOTS:
            name = layer.get(f"{slot}.name")
            if name is not None and f"{slot}.name" in merged and merged[f"{slot}.name"].value != name.value:
                merged = {key: setting for key, setting in merged.items() if not key.startswith(f"{slot}.")}
        merged |= layer
    return merged


def _named_sections(settings: Layer) -> dict[str, type]:
    """The sections that the recipe named, by key: ``teachers.math``.

    Raises:
        ConfigError: a name that is no word.
    """
    found = {}
    for key, setting in settings.items():
        section, _, rest = key.partition(".")
        if section in NAMED and rest:
            name = rest.partition(".")[0]
            if not _NAME.fullmatch(name):
                raise ConfigError(_place(key, setting), name, "a name of letters, digits, _ and -", "choose another")
            found[f"{section}.{name}"] = NAMED[section]
    return found


def _typed(settings: Layer, names: Mapping[str, str], members: Mapping[str, type]) -> Config:
    """Put the settings into the schema, which refuses unknown keys and wrong types."""
    tree: DictConfig = OmegaConf.structured(Config)
    for slot, name in names.items():
        tree[slot] = OmegaConf.structured(SLOTS[slot][name])
    fields = {key: kind for key, kind in _fields(Config, names) if key not in NAMED}
    for member, schema in members.items():
        section, name = member.split(".")
        tree[section][name] = OmegaConf.structured(schema)
        fields |= _fields(schema, names, f"{member}.")
    fields |= {key: object for key in settings if key.startswith(f"{FREE}.")}
    for key, setting in settings.items():
        if key not in fields:
            raise _unknown(key, setting, fields, names)
        value = _converted(key, setting, fields[key])
        try:
            OmegaConf.update(tree, key, value)
        except OmegaConfBaseException:
            raise _wrong_type(key, setting, fields[key]) from None
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing:
        way_out = f"set {_list(missing)} in the recipe or on the command line"
        raise ConfigError(missing[0], "nothing", _type_in_words(fields[missing[0]]), way_out)
    return typing.cast(Config, OmegaConf.to_object(tree))


def _fields(schema: type, names: Mapping[str, str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of the schema with its type; the chosen dataclass stands for a slot."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key = f"{prefix}{field.name}"
        section = SLOTS[key][names[key]] if key in SLOTS else hints[field.name]
        if dataclasses.is_dataclass(section):
            yield from _fields(typing.cast(type, section), names, f"{key}.")
        else:
            yield key, section


def _converted(key: str, setting: Setting, kind: Any) -> Any:
    """What OmegaConf is given: a word of the command line becomes a value of the field's kind."""
    value, members = setting.value, _members(kind)
    if setting.where == COMMAND_LINE and (str not in members or (value == "null" and types.NoneType in members)):
        try:
            value = parse_scalar(value)
        except ValueError:
            raise _wrong_type(key, setting, kind) from None
    if bool in members and not isinstance(value, bool | types.NoneType):
        raise _wrong_type(key, setting, kind)  # OmegaConf would take 3 and "on" for true
    if isinstance(value, Mapping | list) and not isinstance(kind, types.GenericAlias):
        raise _wrong_type(key, setting, kind)
    if isinstance(value, str) and (value == MISSING or "${" in value):
        raise ConfigError(_place(key, setting), value, "a value", "write the value itself: recipes have no references")
    return value


def _unknown(key: str, setting: Setting, fields: Mapping[str, Any], names: Mapping[str, str]) -> ConfigError:
    inside = [name for name in fields if name.startswith(f"{key}.")]
    if inside:
        value = "nothing" if setting.value in (None, {}) else setting.value
        expected = f"a section with {_list(name.removeprefix(f'{key}.') for name in inside)}"
        return ConfigError(_place(key, setting), value, expected, f"set them one by one, for example {inside[0]}=...")
    section, _, last = key.rpartition(".")
    siblings = [name for name in fields if name.rpartition(".")[0] == section]
    if section in names:
        parameters = _list(name.rpartition(".")[2] for name in siblings if not name.endswith(".name"))
        owners = [name for name, choice in SLOTS[section].items() if last in choice.__dataclass_fields__]
        way_out = f"`{last}` belongs to {section} {_list(owners)}" if owners else "remove it"
        expected = f"a parameter of {section} {names[section]} ({parameters or 'it has none'})"
        return ConfigError(_place(key, setting), "an unknown key", expected, _did_you_mean(key, siblings) or way_out)
    same_name = [name for name in fields if name.rpartition(".")[2] == last]
    way_out = _did_you_mean(key, same_name, 0) or _did_you_mean(key, siblings) or _did_you_mean(key, fields)
    expected = f"a key of `{section}`" if siblings and section else "a key of the schema"
    return ConfigError(_place(key, setting), "an unknown key", expected, way_out or "see nemo_opd/config.py")


def _wrong_type(key: str, setting: Setting, kind: Any) -> ConfigError:
    return ConfigError(_place(key, setting), repr(setting.value), _type_in_words(kind), "change the value")


def _members(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _type_in_words(kind: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
    words[object] = "a text, a number, true or false"
    return " or ".join(words.get(member, str(member)) for member in _members(kind))


def _did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"did you mean `{nearest[0]}`?" if nearest else ""


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)


def _place(key: str, setting: Setting) -> str:
    """The key, with file and line where a file said it."""
    return key if setting.where in (COMMAND_LINE, "default") else f"{key} ({setting.where})"


def _located(error: ConfigError, settings: Layer) -> ConfigError:
    key = error.key if error.key in settings else f"{error.key}.name"
    if key not in settings:
        return error
    return ConfigError(_place(error.key, settings[key]), error.got, error.expected, error.way_out)
