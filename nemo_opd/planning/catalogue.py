"""Where the sizes of a recipe's models come from: their folders, or the published config.json kept beside this file.

The files in `models/` hold facts about published models (widths, layers, heads, vocabulary), no weights, and no more of
a config.json than its architecture.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_opd.configuration.model_files import ModelSizes, read_config, sizes_of
from nemo_opd.errors import ConfigError
from nemo_opd.planning.shapes import ModelShape

FOLDER = Path(__file__).parent / "models"
TUNED = ("-Instruct", "-Base")
"""Variants of a model with the same architecture: what stands behind its name."""


def known_models() -> list[str]:
    """Names of the models whose architecture is kept here."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def model_values(key: str, model: str) -> tuple[dict[str, Any], str]:
    """The config.json of a model folder, or that of the published model of the same name, and where it was found.

    Args:
        key: the setting that names the model, for the error.
        model: a folder, which need not exist: ``models/Qwen3-8B`` is Qwen3-8B then.

    Raises:
        ConfigError: no such folder and no such name, or a config.json that cannot be read.
    """
    folder = Path(model)
    if (folder / "config.json").is_file():
        return read_config(key, folder), str(folder)
    name = folder.name
    for ending in TUNED:
        name = name.removesuffix(ending)
    file = FOLDER / f"{name}.json"
    if not file.is_file():
        expected = f"a model folder, or a path that ends in one of {', '.join(known_models())}"
        way_out = "give a folder with at least the model's config.json"
        raise ConfigError(key, f"no folder {folder}", expected, way_out)
    return json.loads(file.read_text(encoding="utf-8")), f"{file.stem}, as published"


def model_shape(key: str, model: str) -> ModelShape:
    """The sizes with which a model is planned. Raises ConfigError as `model_values`, and for unsupported ones."""
    values, where = model_values(key, model)
    return ModelShape.of(key, Path(model).name, values, where)


def read_sizes(key: str, folder: Path, *, convertible: bool) -> ModelSizes:
    """What `configuration.model_files.read_model_sizes` reads, of models that need not be here."""
    values, where = model_values(key, str(folder))
    return sizes_of(key, where, values, convertible=convertible)
