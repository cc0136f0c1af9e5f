"""What a plan says: by hand where that is short, otherwise how it must change when one setting does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nemo_opd.cli import main
from nemo_opd.errors import ConfigError
from nemo_opd.planning.alternatives import suggestion, sweep
from nemo_opd.planning.gpus import GIB, GPUS, Assumptions, Cluster
from nemo_opd.planning.moments import in_flight, moments
from nemo_opd.planning.plan import Options, make_setting, plan, read_recipe
from nemo_opd.planning.shapes import Spread
from nemo_opd.planning.text import layout
from tests.helpers.planned import planned, sent

RECIPE = """\
run: {dir: run}
student: {model: models/Qwen3-1.7B}
teacher: {model: models/Qwen3-8B}
data: {path: data/train.jsonl, max_prompt_tokens: 1024}
rollout: {max_new_tokens: 1024, samples_per_prompt: 4, dtype: bfloat16}
train: {steps: 10, prompts_per_step: 16, micro_batch_tokens: 2048, processes: 8}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def test_what_stays_on_a_rank(recipe: Path) -> None:
    stays = planned(recipe).ranks[0].stays
    parameters = 1_720_574_976
    assert stays["student, weights"] == 2 * parameters
    assert stays["student, gradients"] == 4 * parameters
    assert stays["student, optimizer"] == 12 * parameters / 8
    assert stays["teacher, weights"] == 2 * 8_190_735_360
    assert stays["teacher, output layer"] == 2 * 151_936 * 4096
    assert stays["generator"] == 2 * parameters
    whole = planned(recipe, "optimizer.distributed=false").ranks[0].stays
    assert whole["student, optimizer"] == 12 * parameters


def test_ranks_differ_by_the_stages_that_they_hold(recipe: Path) -> None:
    found = planned(recipe, "student.pipeline_model_parallel_size=2", "teacher.pipeline_model_parallel_size=4")
    kinds = [(rank.ranks, tuple(rank.stages.values())) for rank in found.ranks]
    assert kinds == [("0 to 1", (0, 0)), ("2 to 3", (0, 1)), ("4 to 5", (1, 2)), ("6 to 7", (1, 3))]
    assert "training: output" not in str(found.ranks[0].phases["training"])
    computes = ["loss" in moments(found.setting, rank.stages["student"], "te") for rank in found.ranks]
    assert computes == [False, False, True, True]
    first, last = found.ranks[0], found.ranks[-1]
    assert first.activations == pytest.approx(2 * last.activations)  # two micro-batches in flight, not one


def test_interleaved_stages_fill_sooner_and_hold_more(recipe: Path) -> None:
    """64 rows of a replica through 4 stages, whole or in 7 chunks of one layer each."""
    stages = "student.pipeline_model_parallel_size=4"
    words = (stages, "rollout.samples_per_prompt=8", "student.virtual_pipeline_model_parallel_size=7")
    plain, chunks = planned(recipe, *words[:2]), planned(recipe, *words)
    assert plain.setting.rows == chunks.setting.rows == 64
    assert [in_flight(plain.setting, stage) for stage in (0, 3)] == [4, 1]
    assert [in_flight(chunks.setting, stage) for stage in (0, 3)] == [6 + 24 + 1, 24 + 1]
    assert chunks.ranks[-1].activations > 25 / 7 * plain.ranks[-1].activations, "and the outputs of chunks"
    assert sent(chunks, "student: between stages") == 7 * sent(plain, "student: between stages")
    faster = chunks.times.parts["loss"] / plain.times.parts["loss"]
    assert faster == pytest.approx((64 + 3 / 7) / (64 + 3))
    assert layout(chunks.setting).startswith("student PP 4 x DP 2, each stage in 7 chunks; ")
    best = sweep(read_recipe(recipe, words), Options(), 1000)
    assert {"student.virtual_pipeline_model_parallel_size=1" in found.words for found in best} == {True, False}


def test_a_pipeline_fills_and_drains() -> None:
    assert Spread(1, 4, 1).filled(8) == 11 / 8 and Spread(1, 1, 1).filled(3) == 1
    assert Spread(1, 4, 1, vp=2).filled(8) == 19 / 16, "half of what filling takes, as a chunk is half of a stage"
    assert Spread(1, 4, 1, vp=2).filled(1) == Spread(1, 4, 1).filled(1) == 4, "one row passes all layers"
    assert Spread(1, 4, 1, vp=2).filled(6) == (8 + (4 + 2) + 3) / 12, "the second chunk waits for the first"


def test_a_self_teacher_costs_a_copy_or_nothing(recipe: Path) -> None:
    own = ("teacher.model=null", "teacher.source=")
    sizes = {
        source: planned(recipe, own[0], own[1] + source).ranks[0].stays.get("teacher, copy of the student", 0)
        for source in ("current", "frozen", "ema")
    }
    assert sizes == {"current": 0, "frozen": 2 * 1_720_574_976, "ema": 6 * 1_720_574_976}


def test_the_output_layer_takes_chunks_and_no_more_for_more_tokens(recipe: Path) -> None:
    def loss(*words: str) -> float:
        return moments(planned(recipe, *words).setting, 0, "te")["loss"]["output-layer chunk"]

    one = loss()
    assert one == pytest.approx(256 * 151_936 * (2 * 4 + 2))  # both models' logits, and the gradient in bf16
    assert loss("train.micro_batch_tokens=8192") == one
    assert loss("train.loss_chunk_tokens=512") == 2 * one
    halves = loss("student.tensor_model_parallel_size=2")  # one buffer more, each half as large
    assert halves == pytest.approx(256 * 151_936 / 2 * (3 * 4 + 2))


def test_messages_by_hand(recipe: Path) -> None:
    found = planned(recipe, "student.tensor_model_parallel_size=2", "train.processes=16", gpus_per_node=8)
    replicas, parameters = 8, found.setting.student.shape.stage(found.setting.student.spread, 0).total
    assert sent(found, "replicas: gradients, scattered") == pytest.approx(7 / 8 * 4 * parameters)
    assert sent(found, "replicas: weights, gathered") == pytest.approx(7 / 8 * 2 * parameters)
    positions = 64 * 2048 / replicas
    # two reductions forward and two backward in each of 28 layers, each 2 (n - 1) / n of the row
    assert sent(found, "student: tensor-parallel layers") == pytest.approx(28 * 4 * positions * 2048 * 2)
    assert sent(found, "gradient of the hidden states") == pytest.approx(64 * 1024 / replicas * 2048 * 2)
    links = {flow.what: flow.link for flow in found.flows}
    assert links["student: tensor-parallel layers"] == "NVLink"
    assert links["replicas: gradients, scattered"] == "network"


def test_a_ring_uses_the_ports_of_all_its_ranks_on_a_node() -> None:
    cluster = Cluster(GPUS["h100"], 2, 8, Assumptions(network_efficiency=1.0, call_seconds=1e-12, hop_seconds=1e-12))
    one_rank_each, all_ranks = cluster.seconds_of(2, 8, 50e9, 1, 1), cluster.seconds_of(16, 1, 50e9, 1, 1)
    assert one_rank_each == ("network", pytest.approx(1.0))
    assert all_ranks == ("network", pytest.approx(50e9 / (450e9 * 0.75)))  # eight ports are faster than NVLink
    assert cluster.seconds_of(8, 1, 50e9, 1, 1)[0] == "NVLink"


def test_arithmetic_of_a_step(recipe: Path) -> None:
    found = planned(recipe, assumptions=Assumptions(train_efficiency=1.0, loss_efficiency=1.0, call_seconds=1e-12))
    shape = found.setting.student.shape
    layers = 28 * (2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 6144 + 2 * 2048 + 2 * 128)
    assert shape.active == layers
    products = 6 * 64 * 2048 * layers + 6 * 64 * 2048 * 28 * 2048 * 2048
    assert found.times.parts["train"] - found.times.parts["loss"] == pytest.approx(products / 8 / 989e12)
    loss = 2 * 64 * 1024 * 151_936 * (3 * 2048 + 4096) / 8 / 989e12
    assert found.times.parts["loss"] > loss
    assert found.times.parts["loss"] == pytest.approx(loss, rel=0.6)  # and reading the logits


def test_a_text_costs_time_where_it_is_read(recipe: Path) -> None:
    slow = Assumptions(text_tokens=1e3)

    def exchange(*words: str) -> float:
        return planned(recipe, *words, assumptions=slow).times.parts["exchange"]

    tokens = 64 * 1024
    verified, peers = ("verify.name=math",), ("verify.name=math", "context=peers", "context.max_tokens=512")
    assert exchange(*verified) - exchange() == pytest.approx(tokens / 8 / 1e3), "each process its own"
    assert exchange(*peers) - exchange(*verified) == pytest.approx(tokens / 1e3), "every process all"


def test_writing_ahead_hides_the_shorter_of_the_two(recipe: Path) -> None:
    ahead = ("rollout.engine=vllm", "rollout.servers.urls=http://a:1,http://b:1", "rollout.servers.transport=nccl")
    without, with_it = planned(recipe, *ahead), planned(recipe, *ahead, "rollout.staleness=1")
    parts = with_it.times.parts
    rest = parts["exchange"] + parts["score"] + parts["train"] + parts["update"]
    assert without.times.step - with_it.times.step == pytest.approx(min(parts["write"], rest))
    assert (without.setting.gpus, without.setting.nodes) == (10, 2)


def test_a_recipe_that_does_not_fit_gets_the_smallest_change(recipe: Path) -> None:
    words = ("student.model=models/Qwen3-8B", "teacher.model=models/Qwen3-32B", "rollout.batch_size=8")
    config = read_recipe(recipe, words)
    found = plan(make_setting(config, Options()))
    assert len(found.problems) == 1
    assert re.match(r"ranks 0 to 7 need [\d.]+ GiB while training, and the h100 has 79.6", found.problems[0])
    change = suggestion(config, Options())
    assert change is not None
    assert not change.plan.problems
    better = plan(make_setting(read_recipe(recipe, (*words, *change.words)), Options()))
    assert not better.problems


def test_where_nothing_helps_nothing_is_suggested(recipe: Path) -> None:
    words = ("rollout.batch_size=100000", "rollout.max_new_tokens=30000", "train.prompts_per_step=30000")
    assert suggestion(read_recipe(recipe, words), Options()) is None


def test_a_sweep_prints_layouts_that_fit_fastest_first(recipe: Path) -> None:
    config = read_recipe(recipe, ())
    best = sweep(config, Options(), 4)
    steps = [one.plan.times.step for one in best]
    assert len(best) == 4
    assert steps == sorted(steps)
    assert not any(one.plan.problems for one in best)
    assert steps[0] <= plan(make_setting(config, Options())).times.step


LONG = ("rollout.max_new_tokens=30000", "train.micro_batch_tokens=1", "rollout.engine=vllm", "rollout.batch_size=8",
        "rollout.servers.urls=http://a:1", "rollout.servers.transport=nccl", "rollout.staleness=1")  # fmt: skip


def swept(recipe: Path, *words: str, best: int = 10_000) -> list[dict[str, str]]:
    """The changes of all layouts that fit."""
    found = sweep(read_recipe(recipe, words), Options(), best)
    return [dict(word.split("=") for word in one.words) for one in found]


def test_a_sweep_cuts_long_sequences(recipe: Path) -> None:
    """On 8 GPUs, where the recipe itself does not fit."""
    assert planned(recipe, *LONG).problems
    for model in ("student", "teacher"):
        sizes = {change.get(f"{model}.context_parallel_size") for change in swept(recipe, *LONG)}
        assert sizes >= {"2", "4", "8"}, model
    assert "student.context_parallel_size" in swept(recipe, *LONG, best=1)[0]


def test_every_layout_of_a_sweep_is_one_that_the_recipe_permits(recipe: Path) -> None:
    """The plan that was compared is that of the words which are printed."""
    for one in sweep(read_recipe(recipe, LONG), Options(), 10_000)[::40]:
        again = planned(recipe, *LONG, *one.words)
        assert again.problems == []
        assert again.times == one.plan.times
        assert again.worst == one.plan.worst


def test_a_sweep_does_not_cut_the_sequences_of_experts(recipe: Path) -> None:
    words = ("student.model=models/Qwen3-30B-A3B", "train.processes=32", "rollout.engine=vllm",
             "rollout.servers.urls=http://a:1", "rollout.servers.transport=nccl")  # fmt: skip
    found = swept(recipe, *words)
    assert {change.get("student.expert_model_parallel_size") for change in found} >= {"8", "16"}
    assert not [change for change in found if "student.context_parallel_size" in change]
    assert [change for change in found if "teacher.context_parallel_size" in change], "the teacher has none"


def test_sequences_that_are_cut(recipe: Path) -> None:
    """Half the activations for each rank, the same gradients to reduce, and keys and values that go round."""
    words = ("train.processes=8", "optimizer.distributed=false", "train.micro_batch_tokens=4096")
    whole, cut = planned(recipe, *words), planned(recipe, *words, "student.context_parallel_size=2")
    assert cut.setting.student.spread.dp == 4 and layout(cut.setting).startswith("student CP 2 x DP 4;")
    assert cut.worst.activations == pytest.approx(whole.worst.activations / 2)
    assert cut.ranks[0].stays == whole.ranks[0].stays
    assert sent(cut, "replicas: gradients") == sent(whole, "replicas: gradients") > 0
    assert sent(whole, "student: keys and values to other parts") == 0
    # 64 sequences of 2048 over 8 ranks, 28 layers with 8 key-value heads of 128: there, and back with a gradient
    positions = 64 * 2048 / 8
    assert sent(cut, "student: keys and values to other parts") == pytest.approx(28 * 3 * positions * 2 * 1024 * 2)
    assert cut.times.parts["update"] == pytest.approx(whole.times.parts["update"])
    assert cut.times.parts["train"] > whole.times.parts["train"] * 0.9
    with pytest.raises(ConfigError, match=r"got 6 processes; expected a multiple of 4"):
        planned(recipe, "train.processes=6", "student.context_parallel_size=4")


def test_experts_lie_whole_on_their_ranks(recipe: Path) -> None:
    words = ["student.model=models/Qwen3-30B-A3B", "teacher.model=models/Qwen3-32B", "rollout.batch_size=1"]
    words += ["teacher.tensor_model_parallel_size=8", "rollout.engine=vllm", "rollout.servers.transport=nccl"]
    words += ["rollout.servers.urls=http://a:1", "rollout.servers.tensor_parallel_size=8", "train.processes=32"]
    spread = planned(recipe, *words, "student.expert_model_parallel_size=8")
    experts = 48 * 128 * 3 * 2048 * 768
    dense = 30_532_122_624 - experts
    stays = spread.ranks[0].stays
    assert stays["student, weights"] == 2 * (dense + experts // 8)
    assert stays["student, optimizer"] == pytest.approx(12 * (dense / 32 + experts / 8 / 4))
    assert sent(spread, "tokens to experts and back") > 0
    whole = planned(recipe, *words)
    assert whole.problems
    assert sent(whole, "tokens to experts and back") == 0


def test_a_server_without_room_for_its_weights_is_a_problem(recipe: Path) -> None:
    words = ("teacher.engine=vllm", "teacher.model=models/Qwen3-235B-A22B", "teacher.servers.urls=http://a:1",
             "teacher.servers.tensor_parallel_size=4", "loss=policy_gradient")  # fmt: skip
    (problem,) = planned(recipe, *words).problems
    assert problem.startswith("teacher.servers: weights take 109.5 GiB of the 71.7 GiB that a server has of each GPU")
    assert not planned(recipe, *words, "teacher.servers.tensor_parallel_size=8").problems


def test_servers_of_the_runs_own_need_gpus_beside_it(recipe: Path) -> None:
    words = ("rollout.engine=vllm", "rollout.servers.count=2", "rollout.servers.transport=nccl")
    (problem,) = planned(recipe, *words).problems
    assert problem == "the first node has 8 GPUs, and 8 processes and servers on 2 more want to stand on it"
    assert not planned(recipe, *words, "train.processes=4").problems
    assert planned(recipe, *words, nodes=1).setting.processes == 6


OWN_NODES = ("rollout.engine=vllm", "rollout.servers.count=2", "rollout.servers.tensor_parallel_size=4",
             "rollout.servers.transport=nccl", "cluster.rollout_nodes=3")  # fmt: skip


def test_nodes_of_a_job_are_those_of_its_roles(recipe: Path) -> None:
    words = ("teacher.engine=vllm", "teacher.servers.tensor_parallel_size=8", "cluster.teacher_nodes=2",
             "loss=policy_gradient", "train.processes=16")  # fmt: skip
    found = planned(recipe, *OWN_NODES, *words)
    writers, teacher = found.setting.servings
    assert (writers.servers, writers.gpus, writers.nodes, teacher.servers, teacher.nodes) == (6, 24, 3, 2, 2)
    assert found.setting.job_nodes == {"trainer": 2, "rollout": 3, "teacher": 2}
    assert (found.setting.nodes, found.setting.gpus, found.problems, found.warnings) == (7, 56, [], [])
    assert layout(found.setting) == "student DP 16; 6 writers of 4 on 3 nodes; teacher on servers: 2 of 8 on 2 nodes"
    told = planned(recipe, *OWN_NODES, *words, "rollout.servers.urls=http://a:1")
    assert told.setting.job_nodes == found.setting.job_nodes, "the job starts its own all the same"
    assert planned(recipe, *OWN_NODES, nodes=2).setting.processes == 16, "none of them is the trainer's"


def test_several_teachers_share_their_nodes(recipe: Path) -> None:
    words = ["teacher.model=null", "loss=policy_gradient", "cluster.teacher_nodes=3"]
    for name in "ab":
        words += [f"teachers.{name}.engine=vllm", f"teachers.{name}.model=models/Qwen3-8B"]
        words += [f"teachers.{name}.servers.count=8"]
    setting = planned(recipe, *words).setting
    assert [(one.key, one.nodes, one.servers) for one in setting.servings] == [
        ("teachers.a.servers", 2, 16),
        ("teachers.b.servers", 1, 8),
    ]
    assert setting.job_nodes == {"trainer": 1, "teacher": 3}


def test_servers_that_do_not_fill_their_nodes_are_warned_about(recipe: Path) -> None:
    (warning,) = planned(recipe, *OWN_NODES, "rollout.servers.count=1").warnings
    assert warning == ("rollout.servers: 1 of 4 GPUs leave 4 of a node's 8 without work; set rollout.servers.count=2")
    three = ("rollout.servers.count=1", "rollout.servers.tensor_parallel_size=2", "student.model=models/Qwen3-0.6B")
    assert "leave 6 of a node's 8" in planned(recipe, *OWN_NODES, *three).warnings[0]
    (warning,) = planned(recipe, *OWN_NODES, "train.processes=12").warnings
    assert warning.startswith("train.processes: 12 leave 4 of the trainer's GPUs without work; slurm/opd.sh starts 8")
    assert planned(recipe, "train.processes=4").warnings == [], "no job is spoken of"


def test_servers_that_are_too_many_for_a_node_are_a_problem(recipe: Path) -> None:
    config = read_recipe(recipe, (*OWN_NODES, "rollout.servers.count=3"))
    assert plan(make_setting(config, Options())).problems == ["rollout.servers: 12 GPUs of servers on a node of 8"]
    fewer = suggestion(config, Options())
    assert fewer is not None
    assert fewer.words == ("rollout.servers.count=2",)
    assert planned(recipe, *OWN_NODES, gpus_per_node=4).problems, "of other nodes"


def test_a_job_is_what_sbatch_is_asked_for(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe), "--arithmetic", *OWN_NODES, "rollout.servers.count=1"]) == 0
    text = capsys.readouterr().out
    assert "\nas a job: --nodes=4 --gpus-per-node=8 (1 trainer, 3 rollout)\n" in text
    assert "\nwarning: rollout.servers: 1 of 4 GPUs leave 4" in text
    beside = ("rollout.engine=vllm", "rollout.servers.count=4", "train.processes=4")
    assert main(["plan", str(recipe), "--arithmetic", *beside]) == 0
    line = "as a job: --nodes=1 --gpus-per-node=8 (1 trainer); processes_per_node=4 in slurm/env.sh\n"
    assert line in capsys.readouterr().out
    assert main(["plan", str(recipe), "--arithmetic", "--json", *OWN_NODES]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["job_nodes"], found["warnings"]) == ({"trainer": 1, "rollout": 3}, [])


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (("student.tensor_model_parallel_size=3",), {}, "student.tensor_model_parallel_size.*: got 3"),
        (("teacher.tensor_model_parallel_size=5",), {}, "teacher.tensor_model_parallel_size.*: got 5"),
        (("student.model=models/Qwen4",), {}, "student.model.*: got no folder models/Qwen4; expected a model"),
        (("student.pipeline_model_parallel_size=4", "teacher.pipeline_model_parallel_size=12"), {},
         "train.processes: got 8 processes; expected a multiple of 12, by the layouts of student and teachers"),
        (("data.max_prompt_tokens=40000",), {}, "together at most the 40960 positions of the student"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(
    recipe: Path, words: tuple[str, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(recipe, *words, **options)


@pytest.mark.parametrize("word", ["train_efficiency=much", "speed=2", "slack=0", "slack"])
def test_an_assumption_has_a_name_and_a_number(word: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--assume: got {word}; expected NAME=NUMBER")):
        Assumptions().with_words([word])
    assert Assumptions().with_words(["slack=1.5"]).slack == 1.5


def test_the_command_prints_all_and_says_whether_it_fits(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe), "--arithmetic"]) == 0
    text = capsys.readouterr().out
    for words in ("memory of a GPU, GiB of 79.6", "student, weights", "messages of a step", "seconds of a step",
                  "fits: at most", "computed again in backward"):  # fmt: skip
        assert words in text
    assert main(["plan", str(recipe), "--arithmetic", "--gpu", "h200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["gpu"]["name"] == "h200"
    assert found["ranks"][0]["stays"]["student, weights"] == 2 * 1_720_574_976
    assert found["ranks"][0]["peak"]["bytes"] < 140 * GIB
    assert main(["plan", str(recipe), "--arithmetic", "rollout.batch_size=4000", "train.prompts_per_step=1000"]) == 1
    assert "does not fit: ranks 0 to 7 need" in capsys.readouterr().out


def test_a_wrong_recipe_is_refused_in_one_line(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe), "student.model=models/GPT-2"]) == 2
    assert capsys.readouterr().err.startswith("error: student.model: got no folder models/GPT-2; expected a model")
