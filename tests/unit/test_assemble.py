"""What is refused while a run is put together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_opd.assemble import build_evaluation
from nemo_opd.config import Config, DataConfig, EvaluateConfig, RolloutConfig, RunConfig, VerifyConfig
from nemo_opd.errors import ConfigError
from nemo_opd.prompts.template import load_tokenizer
from nemo_opd.tasks.tokenizer import write_tokenizer


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ('{"prompt": "1+1=", "solution": "2"}', {}),
        ('{"prompt": "1+1=", "answer": "two"}', {}),
        ('{"prompt": "1+1=", "answer": "2"}', {"max_prompt_tokens": 1}),
    ],
    ids=["no answer", "an answer of another kind", "no prompt that is short enough"],
)
def test_an_evaluation_that_can_give_no_number_is_refused_before_training(
    tmp_path: Path, line: str, settings: dict[str, int]
) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "heldout.jsonl").write_text(line + "\n")
    config = Config(
        run=RunConfig(dir="unused"),
        data=replace(DataConfig(path="unused"), **settings),
        rollout=RolloutConfig(max_new_tokens=8),
        verify=VerifyConfig(name="integer"),
        evaluate=EvaluateConfig(path=str(tmp_path / "heldout.jsonl")),
    )
    with pytest.raises(ConfigError, match=r"evaluate\.path.*none with an answer.*data\.answer_key"):
        build_evaluation(config, load_tokenizer(tmp_path / "tokenizer"))
