"""Reads a recipe as plain data: no tags, no anchors or aliases, no duplicate keys, and the line of every key.

Scalars resolve as in the YAML 1.2 core schema, so `no` and `on` are texts and `1e-6` is a number (PyYAML follows 1.1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nemo_opd.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
"""A recipe is about 40 lines, three levels deep; what is far beyond that is a mistake or an attack on the parser."""


@dataclass(frozen=True)
class Document:
    """A YAML mapping and, for each dotted key, the line (from 1) on which it stands."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """``recipes/x.yaml:12`` for the key, or for the nearest section around it."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{self.path}:{self.lines.get(key, 1)}"


class _Loader(yaml.SafeLoader):
    """SafeLoader with the core schema's scalars."""


_Loader.yaml_implicit_resolvers = {}
_NUMBER = "+-.0123456789"
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:[Tt]rue|TRUE|[Ff]alse|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list(_NUMBER))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list(_NUMBER),
)
_Loader.add_constructor(
    "tag:yaml.org,2002:int", lambda loader, node: int(node.value.replace("_", ""))
)  # PyYAML's would take a leading 0 for octal


def parse_scalar(text: str) -> Any:
    """The value of one plain scalar, by the same rules as in a recipe: ``"2e-6"`` -> 2e-06, ``"null"`` -> None."""
    loader = _Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text))
    finally:
        loader.dispose()


def read_yaml(path: Path) -> Document:
    """Read a mapping. Raises ConfigError that names file and line for everything that is not plain data."""
    text = _read_text(path)
    try:
        _refuse_more_than_data(path, text)
        root = yaml.compose(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{path}:{line}", error.problem or "unreadable YAML", "YAML", "mend this line") from error
    except yaml.YAMLError as error:
        raise ConfigError(str(path), str(error).splitlines()[0], "YAML text", "mend the file") from error
    if root is None:
        return Document(path)
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}:1", "a list or a single value", "`key: value` lines", "see recipes/README.md")
    document = Document(path)
    loader = _Loader("")
    try:
        document.values.update(_mapping(loader, root, document, ""))
    finally:
        loader.dispose()
    return document


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(str(path), f"{size} bytes", f"at most {MAX_BYTES} bytes", "give a recipe, not data")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(str(path), "no such file", "a recipe", "check the path, or see recipes/README.md") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            str(path), str(error), "a readable text file in UTF-8", "check path and permissions"
        ) from None


def _refuse_more_than_data(path: Path, text: str) -> None:
    """Look at the parser's events, before anything is built, for what a recipe may not contain."""
    place = _Place()
    for event in yaml.parse(text, _Loader):
        where = f"{path}:{event.start_mark.line + 1}"
        place.come_to(event)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            name = f"the anchor or alias `{event.anchor}`{place}"
            raise ConfigError(where, name, "plain values", "write the value out where it is needed")
        if (tag := getattr(event, "tag", None)) is not None:
            got, way_out = f"the tag `{tag}`{place}", "a recipe holds data, no code: remove the tag"
            raise ConfigError(where, got, "plain values", way_out)
        if len(place.open) > MAX_DEPTH:
            got = f"more than {MAX_DEPTH} levels{place}"
            raise ConfigError(where, got, "sections and keys", "see recipes/README.md")


@dataclass
class _Collection:
    """A mapping or list that the parser is within."""

    is_mapping: bool
    key: str = ""
    """The last key that was read."""
    key_is_next: bool = True


class _Place:
    """Where the parser is; as a text `` at `train.steps` ``, empty outside of any key."""

    def __init__(self) -> None:
        self.open: list[_Collection] = []

    def __str__(self) -> str:
        key = ".".join(one.key for one in self.open if one.key)
        return f" at `{key[:80]}`" if key else ""

    def come_to(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.CollectionEndEvent):
            self.open.pop()
        elif isinstance(event, yaml.NodeEvent):
            if self.open and (around := self.open[-1]).is_mapping:
                if around.key_is_next:
                    around.key = str(getattr(event, "value", "?"))
                around.key_is_next = not around.key_is_next
            if isinstance(event, yaml.CollectionStartEvent):
                self.open.append(_Collection(isinstance(event, yaml.MappingStartEvent)))


def _mapping(loader: _Loader, node: yaml.MappingNode, document: Document, prefix: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        name = _key(key_node, f"{document.path}:{line}")
        key = f"{prefix}{name}"
        if name in values:
            first = document.lines[key]
            raise ConfigError(
                f"{document.path}:{line}",
                f"`{key}` a second time",
                f"each key once (first on line {first})",
                "remove one",
            )
        document.lines[key] = line
        if isinstance(value_node, yaml.MappingNode):
            values[name] = _mapping(loader, value_node, document, f"{key}.")
        else:
            values[name] = _value(loader, value_node, f"{document.path}:{line}")
    return values


def _key(node: yaml.Node, where: str) -> str:
    if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str":
        got = f"the key `{node.value}`" if isinstance(node, yaml.ScalarNode) else "a list or mapping as a key"
        raise ConfigError(where, got, "a name as key", "see recipes/README.md")
    if node.value == "_target_":
        raise ConfigError(
            where, "`_target_`", "data", "choose by name (`loss: reverse_kl`); a recipe builds no objects"
        )
    if "." in node.value:
        nested = node.value.replace(".", ": {", 1)
        raise ConfigError(where, f"the dotted key `{node.value}`", "nested sections", f"write `{nested}: ...}}`")
    return node.value


def _value(loader: _Loader, node: yaml.Node, where: str) -> Any:
    try:
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(where, str(error).splitlines()[0], "a plain value", "mend this line") from error
