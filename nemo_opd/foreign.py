"""What a folder from somebody else may not ask for: that code which it names is run, or that two read it differently.

`transformers` refuses most of this by itself where `trust_remote_code` is off, and so does vLLM; both had holes in it
(docs/security.md, version floors). Here it is refused before either of them sees the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_opd.errors import ConfigError

JSON_FILES = (
    *("config.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json"),
    *("processor_config.json", "preprocessor_config.json"),
)
CODE_FIELDS = ("auto_map", "custom_pipelines")
"""They name Python files of the repository, or of another one."""
_KERNELS = ("_implementation", "_implementation_internal")
"""Fields that end so name a kernel: ``sdpa``, or, with a slash, a repository whose code would be fetched."""


def names_code(values: object) -> str | None:
    """The first field, at any depth of a model's JSON, by which code would be run; None where there is none."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            if name in CODE_FIELDS or (str(name).endswith(_KERNELS) and "/" in json.dumps(value)):
                return str(name)
            if (found := names_code(value)) is not None:
                return found
    elif isinstance(values, list):
        return next((found for value in values if (found := names_code(value)) is not None), None)
    return None


def refuse_code(folder: Path, key: str) -> None:
    """Raise ConfigError when a JSON file of a model folder names code, with `key` as the setting that named the folder.

    A file that is no JSON is left to those who read it.
    """
    for file in JSON_FILES:
        try:
            values: Any = json.loads((folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if (field := names_code(values)) is not None:
            raise ConfigError(
                key, f"{field} in {folder / file}", "a model that transformers itself implements",
                "code from a model repository is never run here; choose an architecture known to transformers",
            )  # fmt: skip


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(..., object_pairs_hook=)`: raises ValueError where an object has a name twice, of which two
    readers may each take another."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"it has {name[:80]!r} twice")
        values[name] = value
    return values
