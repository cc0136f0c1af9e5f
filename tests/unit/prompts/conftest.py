from __future__ import annotations

from pathlib import Path

import pytest

from nemo_opd.prompts.template import load_tokenizer
from nemo_opd.tasks.tokenizer import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path):
    return load_tokenizer(tokenizer_folder)
