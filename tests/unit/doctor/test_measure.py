"""Trainer, generator and teacher compared: real models in one and two processes, and engines that are wrong."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_opd.doctor.bounds import DEFAULTS
from nemo_opd.doctor.options import Options
from nemo_opd.doctor.probe import Probe, generator_findings, sampling_findings, teacher_findings
from nemo_opd.processes import Processes
from nemo_opd.types import Finish, GenerateRequest, Need, Rollout, Sampling, ScoreRequest, TeacherNeeds, TeacherScores
from tests.helpers.ranks import RankPool
from tests.helpers.rollouts import make_prompt
from tests.helpers.servers import START_SECONDS, need_vllm
from tests.helpers.workspace import make_workspace, workspace_config

EXACT = DEFAULTS["float32"]
OPTIONS = Options(prompts=4, tokens=12)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("measure"), problems=8, head_dim=32)  # which vLLM has kernels for


# --- engines from a formula


def logprob(offset: int, ids: torch.Tensor) -> torch.Tensor:
    return -0.1 - ((offset + ids) % 5).float()


class Writes:
    """A generator: four tokens of a response, with the formula's probabilities `off` by some nats."""

    version = 0

    def __init__(self, off: float = 0.0) -> None:
        self.off = off

    def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling, stop: Any) -> Iterator[Rollout]:
        for request in requests:
            ids = (torch.arange(4) * -1) % 5 if sampling.greedy else torch.arange(4) + request.prompt.index
            values = torch.stack([logprob(t, ids[t]) for t in range(4)]) + self.off
            versions, mask = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
            yield Rollout(request.prompt, 0, ids, values, versions.to(torch.int8), versions, mask, Finish.LENGTH)


class Says:
    """A scorer of the same formula; `lost` is a key whose last token gets no score."""

    def __init__(self, off: float = 0.0, lost: int | None = None, by_order: bool = False) -> None:
        self.off, self.lost, self.by_order = off, lost, by_order

    def score(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        for place, one in enumerate(requests):
            count = len(one.response_ids)
            valid = torch.ones(count, dtype=torch.bool)
            valid[-1] = one.key != self.lost
            if needs.need is Need.TOP_K:
                best = (torch.arange(count) * -1) % 5
                yield TeacherScores(one.key, valid, ids=best[:, None], id_logprobs=torch.zeros(count, 1))
            else:
                values = torch.stack([logprob(t, one.response_ids[t]) for t in range(count)])
                yield TeacherScores(one.key, valid, sampled_logprobs=values + self.off + place * self.by_order)


def probe() -> Probe:
    return Probe(Processes(), [make_prompt(index) for index in range(5)], 0, lambda ids: "")


def verdicts(findings: Sequence[Any]) -> dict[str, str]:
    return {one.name: one.verdict.value for one in findings}


def test_a_generator_that_is_the_trainer() -> None:
    rollouts = probe().written(Writes(), Sampling(4))
    found = generator_findings(probe(), Says(), Writes(), rollouts, 4, EXACT)
    assert set(verdicts(found).values()) == {"ok"} and len(found) == 7
    assert found[0].found == "20 of 20"


def test_a_generator_with_other_probabilities() -> None:
    rollouts = probe().written(Writes(0.01), Sampling(4))
    found = verdicts(generator_findings(probe(), Says(), Writes(0.01), rollouts, 4, EXACT))
    assert found["generator: mean |difference| of log p"] == found["generator: KL"] == "fail"
    assert found["generator: greedy agreement"] == "ok"


def test_sampling_of_another_distribution_is_told_unless_it_is_corrected() -> None:
    found = [
        sampling_findings(probe(), Says(), Writes(0.5), Sampling(4, 0.5), corrected) for corrected in (False, True)
    ]
    assert [one[0].verdict.value for one in found] == ["warn", "ok"] and found[0][0].found == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("teacher", "wrong"),
    [
        (Says(), set()),
        (Says(lost=3), {"teacher: tokens compared"}),
        (Says(by_order=True), {"teacher: asked twice, mean |difference|"}),
    ],
)
def test_a_teacher_is_asked_twice(teacher: Says, wrong: set[str]) -> None:
    rollouts = probe().written(Writes(), Sampling(4))
    first, second = (probe().logprobs(teacher, rollouts, backwards=back) for back in (False, True))
    found = verdicts(teacher_findings("teacher", first, second, EXACT))
    assert {name for name, verdict in found.items() if verdict == "fail"} == wrong


# --- real engines


def doctor(rank: int, workspace: Path, folder: Path, words: list[str], options: dict[str, Any]) -> tuple[int, Any]:
    """Exit code and JSON of `nemo-opd doctor`."""
    from nemo_opd.configuration.load import to_yaml
    from nemo_opd.doctor import command
    from nemo_opd.engines.megatron.parallel import destroy_student_groups

    destroy_student_groups()  # of an earlier test in this process
    recipe = folder / "recipe.yaml"
    recipe.write_text(to_yaml(workspace_config(workspace, run_dir=folder / "run")))
    given = {
        "prompts": 4,
        "tokens": 12,
        "reference": "auto",
        "bound": {},
        "static": False,
        "json": True,
        "gpu": None,
        **options,
    }
    with redirect_stdout(io.StringIO()) as output:
        code = command.main(argparse.Namespace(recipe=recipe, overrides=words, **given))
    return code, json.loads(output.getvalue())


def asked(pool: RankPool, workspace: Path, folder: Path, *words: str, **options: Any) -> tuple[int, dict[str, Any]]:
    [(code, document)] = pool.run(doctor, workspace, folder, list(words), options, timeout=START_SECONDS)
    assert document["failed"] is (code == 1)
    assert not (folder / "run").exists(), "nothing is trained, so there is no run"
    return code, {one["name"]: one for one in document["findings"]}


def wrong(found: dict[str, Any]) -> dict[str, str]:
    """Rows that are not ok, but for those about a cluster and a GPU that are not here."""
    elsewhere = {"memory", "slurm"}
    return {name: one["verdict"] for name, one in found.items() if one["verdict"] != "ok" and name not in elsewhere}


def test_a_recipe_without_a_mismatch(ranks1: RankPool, workspace: Path, tmp_path: Path) -> None:
    code, found = asked(ranks1, workspace, tmp_path)
    assert code == 0 and wrong(found) == {}
    assert {
        *(
            "versions: packages",
            "disk: free, GiB",
            "teacher: token ids",
            "generator: KL",
            "generator: greedy agreement",
        ),
        *("teacher: asked twice, mean |difference|", "teacher against hf: mean |difference| of log p"),
        *("student as teacher (megatron): KL",),
    } <= set(found)
    assert found["generator: KL"]["found"] < 1e-9
    assert found["generator: tokens compared"]["found"].split(" of ")[0] != "0"


def test_what_a_file_tells_is_enough_to_fail(ranks1: RankPool, workspace: Path, tmp_path: Path) -> None:
    code, found = asked(ranks1, workspace, tmp_path, "data.max_prompt_tokens=1", reference="never")
    assert code == 1 and found["models: data.path"]["verdict"] == "fail"
    code, found = asked(ranks1, workspace, tmp_path, "data.max_prompt_tokens=1", static=True)
    assert code == 0 and found["models"]["verdict"] == "skipped"


def test_a_teacher_with_permuted_ids_stops_before_models(ranks1: RankPool, workspace: Path, tmp_path: Path) -> None:
    import shutil

    teacher = Path(shutil.copytree(workspace / "teacher", tmp_path / "teacher"))
    file = teacher / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["1"], vocabulary["7"] = vocabulary["7"], vocabulary["1"]
    file.write_text(json.dumps(values))
    code, found = asked(ranks1, workspace, tmp_path, f"teacher.model={teacher}")
    assert code == 1 and found["teacher: token ids"]["verdict"] == "fail"
    assert found["models"]["found"] == "not built, as a check before them failed"


def test_data_set_responses_and_no_teacher(ranks1: RankPool, workspace: Path, tmp_path: Path) -> None:
    words = ("prefix=dataset", "loss=cross_entropy", "rollout.samples_per_prompt=1", "teacher.engine=none")
    words += ("teacher.model=null",)
    code, found = asked(ranks1, workspace, tmp_path, *words)
    assert code == 0 and found["generator"]["verdict"] == found["teacher"]["verdict"] == "skipped"


def test_a_teacher_that_is_the_student(ranks1: RankPool, workspace: Path, tmp_path: Path) -> None:
    words = ("teacher.source=ema", "teacher.model=null", "rollout.temperature=0.5")
    code, found = asked(ranks1, workspace, tmp_path, *words)
    assert code == 0 and found["teacher is the student: KL"]["found"] < 1e-9
    assert found["sampling: mean |difference| by temperature, top-k, top-p"]["verdict"] == "warn"


def spoilt(rank: int, workspace: Path) -> dict[str, dict[str, str]]:
    """Rows about a generator whose weights are off by 2 %, and about a teacher that is another model than it says."""
    from nemo_opd.assemble import build_external_scorer, decoder
    from nemo_opd.doctor.measure import Bench
    from nemo_opd.engines.megatron.parallel import destroy_student_groups
    from nemo_opd.prompts.stream import PromptStream
    from nemo_opd.prompts.template import load_tokenizer

    destroy_student_groups()
    config = workspace_config(workspace)
    tokenizer = load_tokenizer(config.student.model)
    prompts = PromptStream(config.data, tokenizer).take(4)
    bench = Bench(config, OPTIONS, Processes(), tokenizer, Probe(Processes(), prompts, 0, decoder(tokenizer)))
    bench.build()
    assert bench.generator is not None
    weights = dict(bench.generator.model.state_dict())  # type: ignore[attr-defined]
    draw = torch.Generator().manual_seed(0)
    off = {name: one * (1 + 0.02 * torch.randn(one.shape, generator=draw)) for name, one in weights.items()}
    bench.generator.load_weights(iter(off.items()), 1)
    rollouts = bench.rollouts()
    generator = verdicts(bench.generator_rows(rollouts))
    other = replace(config, teacher=replace(config.teacher, model=config.student.model))
    bench.scorer = build_external_scorer(other, tokenizer)
    teacher = verdicts(bench.teacher_rows(rollouts))
    bench.close()
    return {"generator": generator, "teacher": teacher}


def test_perturbed_weights_and_a_wrong_teacher_are_found(ranks1: RankPool, workspace: Path) -> None:
    [found] = ranks1.run(spoilt, workspace)
    assert found["generator"]["generator: mean |difference| of log p"] == "fail"
    assert found["generator"]["generator: KL"] == "fail"
    assert found["teacher"]["teacher against hf: mean |difference| of log p"] == "fail"
    assert found["teacher"]["teacher: asked twice, mean |difference|"] == "ok"


def in_two_processes(rank: int, workspace: Path, folder: Path) -> bool:
    from nemo_opd.doctor import worker
    from nemo_opd.engines.megatron.parallel import destroy_student_groups

    destroy_student_groups()
    words = ("student.tensor_model_parallel_size=2", "teacher.pipeline_model_parallel_size=2")
    return worker.run(workspace_config(workspace, *words, run_dir=folder / "run"), OPTIONS, folder)


def test_models_that_are_spread_over_processes(ranks2: RankPool, workspace: Path, tmp_path: Path) -> None:
    from nemo_opd.doctor.worker import read_findings

    assert ranks2.run(in_two_processes, workspace, tmp_path) == [True, True]
    found = read_findings(tmp_path)
    slow = {one.name for one in found if one.name.endswith("slowest over median")}  # another process may be the reason
    assert {one.verdict.value for one in found if one.name not in slow} == {"ok"} and len(slow) == 2
    assert len(found) == len({one.name for one in found}) == 23
    assert {one.found for one in found if one.name.endswith("tokens compared")} != {"0 of 0"}


@pytest.mark.slow
def test_the_command_starts_its_processes(workspace: Path, tmp_path: Path) -> None:
    from nemo_opd.configuration.load import to_yaml

    (tmp_path / "recipe.yaml").write_text(
        to_yaml(workspace_config(workspace, "student.tensor_model_parallel_size=2", run_dir=tmp_path / "run"))
    )
    command = [sys.executable, "-m", "nemo_opd.cli", "doctor", str(tmp_path / "recipe.yaml"), "--tokens", "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ.copy())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "models: built and refitted" in done.stdout and "2 process(es)" in done.stdout
    assert not (tmp_path / "run").exists()
    broken = subprocess.run([*command, "data.max_prompt_tokens=1"], capture_output=True, text=True, check=False)
    assert broken.returncode == 1 and "fail     models: data.path" in broken.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "rows"),
    [
        (("rollout.engine=vllm",), {"generator: KL", "generator: greedy agreement"}),
        (
            ("loss=policy_gradient", "teacher.engine=vllm"),
            {"teacher against megatron: mean |difference| of log p", "student as teacher (vllm): KL"},
        ),
    ],
    ids=["rollouts", "teacher"],
)
def test_what_vllm_serves(
    ranks1: RankPool, workspace: Path, tmp_path: Path, words: tuple[str, ...], rows: set[str]
) -> None:
    """The teacher's server is followed by one with the student in its place."""
    need_vllm()
    code, found = asked(ranks1, workspace, tmp_path, *words)
    assert code == 0 and wrong(found) == {}
    assert rows <= set(found)
