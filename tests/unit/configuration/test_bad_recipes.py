"""What a user can get wrong, and the one line that tells what to change: key, got, expected, way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nemo_opd.cli import main
from tests.unit.configuration.workspace import make_workspace, write_model


@dataclass(frozen=True)
class Bad:
    """A way to go wrong and how its message begins, after ``error: ``."""

    name: str
    message: str
    words: tuple[str, ...] = ()
    """``key=value`` words of the command line."""
    old: str = ""
    """Text of the recipe that is replaced by `new` (an empty `old`: `new` is put at its end)."""
    new: str = ""
    prepare: Callable[[Path], object] = field(default=lambda folder: None)


SERVED = ("teacher.engine=vllm", "teacher.servers.urls=http://node1:8000")
STANDING = ("rollout.engine=vllm", "rollout.servers.urls=http://a:1")
AHEAD = ("rollout.engine=vllm", "rollout.servers.urls=http://a:1", "rollout.servers.weights_dir=/w",
         "rollout.staleness=2")  # fmt: skip
WRITTEN = ("rollout.engine=vllm", "rollout.servers.urls=http://node1:8000", "rollout.servers.weights_dir=weights")
STOCK = (*STANDING, "rollout.servers.protocol=openai", "rollout.servers.weights_dir=w")
SEVERAL = ("teacher.model=null", "teachers.math.model=teacher", "teachers.code.model=teacher")


def experts(folder: Path) -> None:
    """A mixture of 6 experts of a width that no layout has to divide."""
    write_model(folder / "experts", architectures=["Qwen3MoeForCausalLM"], num_experts=6, moe_intermediate_size=25)


CASES = [
    # keys
    Bad("unknown_key", "student.tensor_parallel: got an unknown key; expected a key of `student`; "
        "did you mean `student.tensor_model_parallel_size`?", ("student.tensor_parallel=2",)),
    Bad("unknown_key_in_recipe", "train.max_steps (recipe.yaml:12): got an unknown key; expected a key of `train`; "
        "did you mean `train.steps`?", old="  steps: 10", new="  max_steps: 10"),
    Bad("key_of_another_section", "train.lr: got an unknown key; expected a key of `train`; did you mean "
        "`optimizer.lr`?", ("train.lr=1e-5",)),
    Bad("unknown_section", "optimiser.lr (recipe.yaml:13): got an unknown key; expected a key of the schema; did you "
        "mean `optimizer.lr`?", new="optimiser: {lr: 1e-5}\n"),
    Bad("section_as_value", "run: got 5; expected a section with dir, seed, accept_changes, restarts, time_limit; set "
        "them one by one, for example run.dir=...", ("run=5",)),
    Bad("empty_section", "run (recipe.yaml:1): got nothing; expected a section with dir, seed, accept_changes, "
        "restarts, time_limit; set them one by one, for example run.dir=...", old="run: {dir: run}", new="run:"),
    Bad("value_as_section", "train.steps (recipe.yaml:12): got {}; expected a whole number; change the value",
        old="  steps: 10", new="  steps: {}"),
    Bad("missing_key", "train.steps: got nothing; expected a whole number; set train.steps in the recipe or on the "
        "command line", old="train:\n  steps: 10\n"),
    Bad("missing_keys", "run.dir: got nothing; expected a text; set run.dir, student.model in the recipe or on the "
        "command line", old="run: {dir: run}\nstudent:\n  model: student\n"),
    Bad("mark_of_a_missing_value", "run.dir: got ???; expected a value; write the value itself: recipes have no "
        "references", ("run.dir=???",)),
    Bad("no_equals_sign", "command line: got `train.steps`; expected key=value; for example train.steps=50; quote "
        "spaces", ("train.steps",)),
    # types
    Bad("text_for_number", "train.steps: got 'many'; expected a whole number; change the value", ("train.steps=many",)),
    Bad("fraction_for_count", "train.steps (recipe.yaml:12): got 1.5; expected a whole number; change the value",
        old="steps: 10", new="steps: 1.5"),
    Bad("nothing_for_number", "train.steps: got ''; expected a whole number; change the value", ("train.steps=",)),
    Bad("truth_for_number", "optimizer.lr (recipe.yaml:13): got True; expected a number; change the value",
        new="optimizer: {lr: true}\n"),
    Bad("yes_for_true", "train.packing: got 'yes'; expected true or false; change the value", ("train.packing=yes",)),
    Bad("list_for_text", "data.path (recipe.yaml:7): got ['a.jsonl', 'b.jsonl']; expected a text; change the value",
        old="train.jsonl", new="[a.jsonl, b.jsonl]"),
    Bad("null_for_text", "student.model (recipe.yaml:3): got None; expected a text; change the value",
        old="model: student", new="model:"),
    Bad("reference", "run.dir: got ${oc.env:HOME}/x; expected a value; write the value itself: recipes have no "
        "references", ("run.dir=${oc.env:HOME}/x",)),
    # slots
    Bad("unknown_loss", "loss.name: got reverse_kll; expected one of reverse_kl, ", ("loss=reverse_kll",)),
    Bad("refused_loss", "loss.name: got k1; expected a loss with a gradient; that of log p - log q on sampled tokens "
        "is zero in expectation; use policy_gradient or k2", ("loss=k1",)),
    Bad("unknown_algorithm", "algorithm (recipe.yaml:13): got sfft; expected one of entropy_aware_opd, ",
        new="algorithm: sfft\n"),
    Bad("parameter_of_another_loss", "loss.clip_ratio: got an unknown key; expected a parameter of loss reverse_kl (",
        ("loss.clip_ratio=0.2",)),
    # values
    Bad("unknown_dtype", "student.dtype: got fp16; expected one of bfloat16, float32, float64; choose one of these",
        ("student.dtype=fp16",)),
    Bad("unknown_outlier", "loss.outlier: got drop; expected one of forward_kl, mask, clip; choose one of these",
        ("loss=trust_region", "loss.outlier=drop")),
    Bad("zero_steps", "train.steps: got 0; expected at least 1; change the value", ("train.steps=0",)),
    Bad("top_p_above_one", "rollout.top_p (recipe.yaml:11): got 1.5; expected a value from 1e-06 to 1; change the "
        "value", old="train:", new="  top_p: 1.5\ntrain:"),
    Bad("not_a_number", "optimizer.lr: got nan; expected at least 0; change the value", ("optimizer.lr=.nan",)),
    Bad("minimum_above_maximum", "optimizer.min_lr: got 0.1; expected at most optimizer.lr (1e-06); lower it",
        ("optimizer.min_lr=0.1",)),
    Bad("warmup_longer_than_training", "optimizer.warmup_steps: got 11; expected at most train.steps (10); shorten the "
        "warm-up or train longer", ("optimizer.warmup_steps=11",)),
    # sizes that do not divide
    Bad("heads_by_tensor_parallel", "student.tensor_model_parallel_size: got 3; expected 1, 2 or 4 (4 "
        "attention heads and a feed-forward width of 64 divide by these, and 2 key-value heads divide by them or "
        "divide them); set it to one of these",
        ("student.tensor_model_parallel_size=3",)),
    Bad("key_value_heads_by_tensor_parallel", "teacher.tensor_model_parallel_size: got 16; expected 1, 2, 4 or 8 (8 "
        "attention heads and a feed-forward width of 64 divide by these, and 4 key-value heads divide by them or "
        "divide them); set it to one of these", ("teacher.tensor_model_parallel_size=16",)),
    Bad("a_run_that_would_overwrite_its_student", "student.model: got run/model; expected a folder that this run does "
        "not write its own model to; choose another run.dir, or set checkpoint.export_at_end=false",
        ("run.dir=run", "student.model=run/model")),
    Bad("experts_of_a_dense_model", "student.expert_model_parallel_size: got 2; expected 1, as the model has no "
        "experts; leave it out", ("student.expert_model_parallel_size=2",)),
    Bad("experts_that_do_not_divide", "teacher.expert_model_parallel_size: got 4; expected a divisor of the 6 experts "
        "of a layer; change it", ("teacher.model=experts", "teacher.expert_model_parallel_size=4"), prepare=experts),
    Bad("layers_by_pipeline_parallel", "teacher.pipeline_model_parallel_size (recipe.yaml:6): got 4; expected 1, 2, 3 "
        "or 6 (divisors of 6 layers); set it to one of these", old="data:",
        new="  pipeline_model_parallel_size: 4\ndata:"),
    Bad("layers_by_chunks", "student.virtual_pipeline_model_parallel_size: got 4; expected 1 or 2 (divisors of the 2 "
        "layers of a stage); set it to one of these", ("student.pipeline_model_parallel_size=2",
         "student.virtual_pipeline_model_parallel_size=4")),
    Bad("chunks_of_no_stage", "student.virtual_pipeline_model_parallel_size: got 2; expected 1 with "
        "pipeline_model_parallel_size 1, as there are no stages; leave it out, or raise "
        "student.pipeline_model_parallel_size", ("student.virtual_pipeline_model_parallel_size=2",)),
    Bad("chunks_of_a_teacher", "teacher.virtual_pipeline_model_parallel_size: got 3; expected 1, as forward passes "
        "alone fill a pipeline well: only the student's stages are interleaved; leave it out",
        ("teacher.pipeline_model_parallel_size=2", "teacher.virtual_pipeline_model_parallel_size=3")),
    Bad("no_chunk", "student.virtual_pipeline_model_parallel_size: got 0; expected at least 1; change the value",
        ("student.virtual_pipeline_model_parallel_size=0",)),
    Bad("experts_without_sequence_parallel", "teacher.sequence_parallel: got False; expected true for a mixture of "
        "experts under tensor parallelism, whose ranks would each route every token; set it to true",
        ("teacher.model=experts", "teacher.tensor_model_parallel_size=2"), prepare=experts),
    Bad("sequences_of_a_mixture_that_are_cut", "teacher.context_parallel_size: got 2; expected 1 for a mixture of "
        "experts, whose sequences are not cut; leave it out; raise teacher.tensor_model_parallel_size or "
        "pipeline_model_parallel_size instead", ("teacher.model=experts", "teacher.context_parallel_size=2"),
        prepare=experts),
    Bad("no_part_of_a_sequence", "student.context_parallel_size: got 0; expected at least 1; change the value",
        ("student.context_parallel_size=0",)),
    Bad("sequences_of_another_engine_that_are_cut", "teacher.context_parallel_size: got 2; expected 1, as the hf "
        "engine does not split; set all sizes to 1, or teacher.engine=megatron",
        ("teacher.engine=hf", "teacher.context_parallel_size=2")),
    Bad("processes_by_context_parallel", "train.processes: got 6; expected a multiple of 4 (tensor x context x "
        "pipeline parallel: 4 of the student and 1 of the teacher); change the number of processes or the layouts",
        ("train.processes=6", "student.tensor_model_parallel_size=2", "student.context_parallel_size=2")),
    Bad("heads_of_a_mixture", "teacher.tensor_model_parallel_size: got 3; expected 1, 2 or 4 (4 attention heads divide "
        "by these, and 2 key-value heads divide by them or divide them); set it to one of these",
        ("teacher.model=experts", "teacher.tensor_model_parallel_size=3"), prepare=experts),
    Bad("processes_by_expert_parallel", "train.processes: got 4; expected a multiple of 6 (tensor, expert and pipeline "
        "parallel: 2 of the student and 3 of the teacher); change the number of processes or the layouts",
        ("train.processes=4", "student.tensor_model_parallel_size=2", "teacher.model=experts",
         "teacher.expert_model_parallel_size=3"), prepare=experts),
    Bad("processes_by_layouts", "train.processes: got 4; expected a multiple of 6 (tensor x pipeline parallel: 2 of "
        "the student and 3 of the teacher); change the number of processes or the layouts",
        ("train.processes=4", "student.tensor_model_parallel_size=2", "teacher.pipeline_model_parallel_size=3")),
    Bad("vocabulary_padding", "student.vocab_padding_multiple: got 128; expected so small that each of 2 ranks holds "
        "some of the 96 vocabulary entries; lower it (1 always works)",
        ("student.vocab_padding_multiple=128", "student.tensor_model_parallel_size=2")),
    Bad("sequence_parallel_alone", "student.sequence_parallel: got True; expected false with "
        "tensor_model_parallel_size 1; leave it out, or raise student.tensor_model_parallel_size",
        ("student.sequence_parallel=true",)),
    Bad("longer_than_the_model", "rollout.max_new_tokens (recipe.yaml:10): got 64 after a prompt of up to 200; "
        "expected together at most the 256 positions of the student; lower it or data.max_prompt_tokens",
        ("data.max_prompt_tokens=200",)),
    Bad("evaluation_longer_than_the_model", "evaluate.max_new_tokens: got 200 after a prompt of up to 64; expected "
        "together at most the 256 positions of the student; lower it or data.max_prompt_tokens",
        ("evaluate.path=train.jsonl", "verify.name=exact", "evaluate.max_new_tokens=200")),
    Bad("longer_than_a_sliding_window", "rollout.max_new_tokens (recipe.yaml:10): got 64 after a prompt of up to 64; "
        "expected together at most the 100 positions of the teacher; lower it or data.max_prompt_tokens",
        ("teacher.model=window",), prepare=lambda folder: write_model(
            folder / "window", architectures=["MistralForCausalLM"], sliding_window=100)),
    Bad("teacher_with_fewer_tokens", "teacher.model: got a vocabulary of 95; expected at least the student's 96; use a "
        "teacher that knows every token of the student", ("teacher.model=small",),
        prepare=lambda folder: write_model(folder / "small", vocab_size=95)),
    Bad("more_ids_than_the_vocabulary", "loss.k: got 97; expected at most the student's vocabulary of 96; lower it",
        ("loss=stop_gradient", "loss.k=97")),
    # combinations
    Bad("scores_at_ids_of_the_student", "loss.support: got student; expected teacher or intersection with "
        "loss.teacher=scores, as the teacher is asked before the student's k best ids are known; choose one of these, "
        "or loss.teacher=full", ("loss=tail", "loss.teacher=scores")),
    Bad("scores_of_a_union", "loss.support: got union; expected teacher or intersection with loss.teacher=scores",
        ("loss=stop_gradient", "loss.teacher=scores", "loss.support=union")),
    Bad("prefix_weight_without_log_q", "weight.name: got prefix; expected unit with loss cross_entropy, as that weight "
        "needs the teacher's log-probability of every written token; choose loss=policy_gradient, k2, or one that "
        "reads the teacher's whole distribution", ("algorithm=sft", "weight=prefix")),
    Bad("prefix_weight_with_few_scores", "weight.name: got prefix; expected unit with loss tail",
        ("loss=tail", "loss.teacher=scores", "loss.support=teacher", "weight=prefix")),
    Bad("no_base", "teacher.base_model: got nothing; expected a model folder, as loss extrapolated compares the "
        "teacher with the model it was trained from; set teacher.base_model, or choose another loss",
        ("loss=extrapolated",)),
    Bad("base_that_nothing_reads", "teacher.base_model: got student; expected nothing, as loss reverse_kl does not "
        "look at it; leave it out, or choose loss=extrapolated", ("teacher.base_model=student",)),
    Bad("base_with_fewer_tokens", "teacher.base_model: got a vocabulary of 95; expected at least the student's 96",
        ("loss=extrapolated", "teacher.base_model=small"),
        prepare=lambda folder: write_model(folder / "small", vocab_size=95)),
    Bad("entropy_of_a_teacher_that_is_not_asked", "weight.of: got teacher; expected student with loss policy_gradient, "
        "which does not ask for the teacher's whole distribution; choose weight.of=student, or a loss over",
        ("loss=policy_gradient", "weight=entropy", "weight.of=teacher")),
    Bad("loss_without_teacher", "teacher.engine: got none; expected an engine, as loss reverse_kl compares with a "
        "teacher; set teacher.engine=megatron and teacher.model, or choose loss=cross_entropy",
        ("teacher.engine=none",)),
    Bad("teacher_without_loss", "teacher.engine: got megatron; expected none, as loss cross_entropy asks no teacher; "
        "set teacher.engine=none, or choose a loss that learns from the teacher", ("loss=cross_entropy",)),
    Bad("teacher_without_model", "teacher.model: got nothing; expected a model folder; set teacher.model (or "
        "teacher.source=ema), or teacher.engine=none with loss=cross_entropy", ("teacher.model=null",)),
    Bad("unknown_source", "teacher.source: got self; expected one of external, current, frozen, ema; choose one of "
        "these", ("teacher.source=self",)),
    Bad("self_teacher_with_a_model", "teacher.model (recipe.yaml:5): got teacher; expected nothing with "
        "teacher.source=ema, as the teacher is the student itself; leave it out, or set teacher.source=external",
        ("teacher.source=ema",)),
    Bad("self_teacher_of_another_engine", "teacher.engine: got hf; expected megatron, where the student's weights are",
        ("teacher.source=current", "teacher.model=null", "teacher.engine=hf")),
    Bad("self_teacher_in_another_layout", "teacher.tensor_model_parallel_size: got 2; expected the student's 1 with "
        "teacher.source=frozen, which lives on the student's layout; leave it out",
        ("teacher.source=frozen", "teacher.model=null", "teacher.tensor_model_parallel_size=2")),
    Bad("self_teacher_that_nobody_asks", "teacher.source: got ema; expected external, as loss cross_entropy asks no "
        "teacher; leave it out, or choose a loss with a teacher", ("algorithm=sft", "teacher.source=ema")),
    Bad("decay_above_one", "teacher.decay: got 1.5; expected a value from 0 to 1; change the value",
        ("teacher.source=ema", "teacher.model=null", "teacher.decay=1.5")),
    Bad("hf_teacher_split", "teacher.pipeline_model_parallel_size: got 2; expected 1, as the hf engine does not split; "
        "set all sizes to 1, or teacher.engine=megatron",
        ("teacher.engine=hf", "teacher.pipeline_model_parallel_size=2")),
    # a teacher on servers
    Bad("whole_distribution_of_a_served_teacher", "loss.name (algorithm opd): got reverse_kl; expected a loss that a "
        "served teacher can serve, which reports a few log-probabilities per token; choose one of policy_gradient, k2, "
        "trust_region with loss.outlier=mask or clip, and stop_gradient, tail or renormalised with loss.teacher=scores "
        "and loss.support=teacher or intersection, or set teacher.engine=megatron", SERVED),
    Bad("top_k_of_a_served_teachers_logits", "loss.name: got tail; expected a loss that a served teacher can serve",
        (*SERVED, "loss=tail")),
    Bad("outliers_of_a_served_teacher", "loss.name: got trust_region; expected a loss that a served teacher can serve",
        (*SERVED, "loss=trust_region")),
    Bad("one_of_several_served", "loss.name (algorithm opd): got reverse_kl; expected a loss that a served ",
        (*SEVERAL, "teachers.code.engine=vllm", "data.teacher_key=task")),
    Bad("served_self", "teacher.engine: got vllm; expected megatron, where the student's weights are",
        (*SERVED, "teacher.source=ema", "teacher.model=null")),
    Bad("served_base", "teacher.base_model: got student; expected nothing with teacher.engine=vllm, whose servers hold "
        "one model; set teacher.engine=megatron, or choose another loss",
        (*SERVED, "loss=extrapolated", "teacher.base_model=student")),
    Bad("served_teacher_split", "teacher.tensor_model_parallel_size: got 2; expected 1, as it is on servers of its "
        "own; set all sizes to 1; teacher.servers.tensor_parallel_size splits a server's model",
        (*SERVED, "loss=k2", "teacher.tensor_model_parallel_size=2")),
    Bad("served_float64", "teacher.dtype: got float64; expected bfloat16 or float32 with engine vllm; choose one of "
        "these", (*SERVED, "loss=k2", "teacher.dtype=float64")),
    Bad("whole_divergence_from_a_served_teacher", "stop.divergence: got full; expected tail with teacher.engine=vllm, "
        "which reports a few log-probabilities per token; set stop.divergence=tail",
        (*SERVED, "loss=k2", "stop=kat", "stop.divergence=full", "stop.window=8", "stop.stride=8")),
    *(Bad(f"{name}_of_a_stop_rule_on_servers", f"{name}: got {got}; expected {only} with rollout.engine=vllm and stop "
          f"length_matched, as servers say the best ids of the model's own distribution; {way_out}rollout.engine=hf",
          (*WRITTEN, "stop=length_matched", "stop.window=8", "stop.stride=8", f"{name}={got}"))
      for name, got, only, way_out in (
          ("stop.divergence", "full", "tail", "set stop.divergence=tail, or "),
          ("stop.support", "teacher", "student", "set stop.support=student, or "),
          ("rollout.temperature", "0.7", "1.0", "leave it out, or set "),
          ("rollout.top_p", "0.9", "1.0", "leave it out, or set "),
          ("rollout.top_k", "20", "0", "leave it out, or set "),
      )),
    Bad("servers_of_no_teacher", "teacher.servers: got settings; expected none with engine megatron; set "
        "teacher.engine=vllm, or leave teacher.servers out", ("teacher.servers.count=2",)),
    Bad("ipc_between_gpus", "rollout.servers.placement: got separate; expected colocated with transport ipc, by which "
        "servers read the memory of the trainer's own GPUs; set it, or choose transport nccl or disk",
        (*STANDING, "rollout.servers.transport=ipc")),
    Bad("nccl_on_one_gpu", "rollout.servers.transport: got nccl; expected ipc or disk with placement colocated, as "
        "NCCL does not join two processes on one GPU; choose one of these, or placement separate",
        (*STANDING, "rollout.servers.transport=nccl", "rollout.servers.placement=colocated")),
    Bad("weights_dir_of_no_use", "rollout.servers.weights_dir: got w; expected nothing with transport gloo, which "
        "needs no folder; leave it out",
        (*STANDING, "rollout.servers.transport=gloo", "rollout.servers.weights_dir=w")),
    Bad("unknown_transport", "rollout.servers.transport: got http; expected one of disk, nccl, ipc, gloo",
        (*STANDING, "rollout.servers.transport=http")),
    Bad("ahead_on_the_same_gpus", "rollout.staleness: got 1; expected 0 with placement colocated, where writing and "
        "training take turns on the same GPUs; set rollout.servers.placement=separate, or leave staleness out",
        (*STANDING, "rollout.servers.weights_dir=w", "rollout.servers.placement=colocated", "rollout.staleness=1")),
    Bad("stock_servers_of_our_own", "rollout.servers.protocol: got openai; expected own for servers that the run "
        "starts itself; set rollout.servers.urls, or leave protocol out",
        ("rollout.engine=vllm", "rollout.servers.protocol=openai")),
    Bad("unknown_protocol", "rollout.servers.protocol: got http; expected one of own, openai",
        (*STANDING, "rollout.servers.protocol=http")),
    Bad("broadcast_to_stock_servers", "rollout.servers.transport: got nccl; expected disk with protocol openai: a "
        "stock server takes weights from a folder; leave transport out, or protocol",
        (*STOCK, "rollout.servers.transport=nccl")),
    Bad("stock_servers_asleep", "rollout.servers.placement: got colocated; expected separate with protocol openai: a "
        "stock server keeps its memory; leave placement out, or protocol",
        (*STOCK, "rollout.servers.placement=colocated")),
    Bad("stock_servers_ahead", "rollout.staleness: got 1; expected 0 with rollout.servers.protocol=openai: stock "
        "servers take weights only while they write nothing; leave staleness out, or protocol",
        (*STOCK, "rollout.staleness=1")),
    Bad("hotter_than_stock_servers", "rollout.temperature: got 3.0; expected at most 2 with rollout.servers.protocol="
        "openai, vLLM's limit over HTTP; lower it, or leave protocol out", (*STOCK, "rollout.temperature=3")),
    Bad("traps_on_stock_servers", "rollout.servers.protocol: got openai; expected own with stop kat, which reads the "
        "student's distribution while it writes; leave protocol out, or stop",
        (*STOCK, "stop=kat", "stop.window=8", "stop.stride=8")),
    Bad("no_folder_for_stock_servers", "rollout.servers.weights_dir: got nothing; expected the folder that these "
        "servers read weights from", (*STANDING, "rollout.servers.protocol=openai")),
    Bad("given_ids_of_a_stock_teacher", "stop.support: got student; expected teacher with teacher.servers.protocol="
        "openai, as a stock server scores no ids that it is given; set it, or leave teacher.servers.protocol out",
        (*SERVED, "loss=k2", "teacher.servers.protocol=openai", "stop=kat", "stop.window=8", "stop.stride=8",
         "stop.support=student")),
    Bad("stock_teacher_of_our_own", "teacher.servers.protocol: got openai; expected own for servers that the run "
        "starts itself; set teacher.servers.urls, or leave protocol out",
        (*SERVED[:1], "loss=k2", "teacher.servers.protocol=openai")),
    Bad("stock_teacher_that_knows_more", "teacher.servers.protocol: got openai; expected own for a teacher of 100 ids "
        "and a student of 96, as a stock server's probabilities are about all ids that its model knows; serve it with "
        "nemo_opd.engines.vllm.server (scored_ids), or leave urls out too",
        (*SERVED, "loss=k2", "teacher.servers.protocol=openai", "teacher.model=big"),
        prepare=lambda folder: write_model(folder / "big", vocab_size=100)),
    Bad("sleeping_teacher", "teacher.servers.placement: got colocated; expected nothing, as it is about servers that "
        "write; leave it out", (*SERVED, "loss=k2", "teacher.servers.placement=colocated")),
    Bad("weights_for_a_teacher", "teacher.servers.weights_dir: got weights; expected nothing, as a teacher takes no "
        "weights from the run; leave it out", (*SERVED, "loss=k2", "teacher.servers.weights_dir=weights")),
    Bad("address_that_is_none", "teacher.servers.urls: got node1:8000; expected addresses as in http://node1:8000,",
        (*SERVED[:1], "loss=k2", "teacher.servers.urls=node1:8000")),
    Bad("no_key_file", "teacher.servers.key_file: got no file secret; expected a file with the key; check the path",
        (*SERVED, "loss=k2", "teacher.servers.key_file=secret")),
    Bad("no_server", "teacher.servers.count: got 0; expected a value from 1 to 4096; change the value",
        (*SERVED, "loss=k2", "teacher.servers.count=0")),
    Bad("longer_than_a_server_reads", "rollout.max_new_tokens (recipe.yaml:10): got 64 after a prompt of up to 192; "
        "expected together at most the 255 positions of the teacher; lower it or data.max_prompt_tokens",
        (*SERVED, "loss=k2", "data.max_prompt_tokens=192")),
    Bad("samples_of_a_data_set", "rollout.samples_per_prompt: got 4; expected 1, as the data set has one response per "
        "prompt; set rollout.samples_per_prompt=1, or prefix=student to let the student write",
        ("algorithm=sft", "rollout.samples_per_prompt=4")),
    Bad("importance_ratio_of_a_data_set", "loss.name: got policy_gradient; expected a loss that does not ask how "
        "probable a token was when it was drawn, as the data set wrote it; choose prefix=student, or do without an "
        "importance ratio (loss=reverse_kl, weight=unit)", ("prefix=dataset", "loss=policy_gradient")),
    Bad("importance_ratio_twice", "weight.name: got tis; expected unit with loss.importance_ratio=sampler; set "
        "loss.importance_ratio=none, or the ratio is applied twice", ("loss=policy_gradient", "weight=tis")),
    Bad("prefix_of_no_teacher", "prefix.name: got teacher; expected student or dataset, as there is no teacher; set "
        "teacher.model and a loss", ("algorithm=sft", "prefix=teacher")),
    Bad("prefix_of_a_privileged_teacher", "prefix.name: got teacher; expected student with context privileged, as the "
        "teacher writes to the student's prompt; choose prefix=student or context=same_prompt",
        ("prefix=teacher", "context=privileged", "context.text=x", "context.max_tokens=64")),
    Bad("policy_gradient_on_the_teachers_tokens", "prefix.loss: got same; expected cross_entropy with loss "
        "policy_gradient, as the student did not draw what prefix teacher brings; set prefix.loss=cross_entropy, or "
        "a loss of distributions", ("prefix=teacher", "prefix.loss=same", "loss=policy_gradient")),
    Bad("sampled_loss_on_the_data_set", "prefix.loss: got same; expected cross_entropy with loss k2",
        ("prefix=mixed", "loss=k2")),
    Bad("stop_rule_on_the_data_set", "stop.name: got fixed; expected default with prefix mixed, as the data set wrote "
        "some of the responses; leave stop out, or choose prefix=student", ("prefix=mixed", "stop=fixed",
                                                                            "stop.length=9")),
    Bad("ratio_beside_minillm", "weight.name: got tis; expected one without an importance ratio, as loss minillm has "
        "its own; leave the weight out", ("loss=minillm", "weight=tis")),
    Bad("share_above_one", "prefix.on_policy_share: got 1.5; expected a value from 0 to 1; change the value",
        ("prefix=mixed", "prefix.on_policy_share=1.5")),
    Bad("nothing_privileged", "context.field: got nothing; expected either a field of the records or one text for all; "
        "set context.field or context.text, not both", ("context=privileged", "context.max_tokens=64")),
    Bad("privileged_twice", "context.field: got a field besides context.text; expected either a field of the records "
        "or one text for all", ("context=privileged", "context.max_tokens=64", "context.field=a", "context.text=b")),
    Bad("privileged_without_its_place", "context.template: got 'Be brief.'; expected {privileged} exactly once; for "
        "example context.template=", ("context=privileged", "context.text=x", "context.template=Be brief.")),
    Bad("context_without_teacher", "context.name: got peers; expected same_prompt, as loss cross_entropy asks no "
        "teacher; leave it out or choose a loss with a teacher", ("algorithm=sft", "teacher.engine=none",
                                                                  "context=peers")),
    Bad("template_argument_of_ours", "data.template_arguments.tokenize: got tokenize; expected a name that the chat "
        "template reads, as enable_thinking; choose another, or leave it out",
        ("data.template_arguments.tokenize=false",)),
    Bad("template_argument_of_parts", "data.template_arguments.a: got {'b': 1}; expected a text, a number, true or "
        "false; change the value", ("data.template_arguments.a.b=1",)),
    Bad("template_arguments_as_value", "data.template_arguments: got '3'; expected", ("data.template_arguments=3",)),
    Bad("template_argument_without_a_template", "data.chat_template: got False; expected true, as "
        "data.template_arguments.a is for the chat template; set data.chat_template=true, or leave it out",
        ("data.template_arguments.a=1", "data.chat_template=false")),
    Bad("context_without_chat_template", "data.chat_template: got False; expected true, as context peers adds to a "
        "message; set data.chat_template=true, or context=same_prompt", ("context=peers", "data.chat_template=false")),
    Bad("peers_of_one", "rollout.samples_per_prompt: got 1; expected at least 2, as peers are other rollouts of the "
        "same prompt; set it to 8, for example", ("context=peers",)),
    Bad("peers_without_verifier", "verify.name: got none; expected a verifier, as peers are chosen by their reward; "
        "set verify.name (exact, integer, math, ...), or context=same_prompt",
        ("context=peers", "rollout.samples_per_prompt=4")),
    Bad("unrelated_peers_of_one_prompt", "train.prompts_per_step: got 1; expected at least 2, as peers come from "
        "another prompt of the step; raise it or choose another context.variant",
        ("context=peers", "context.variant=unrelated_prompt", "rollout.samples_per_prompt=4", "verify.name=exact",
         "train.prompts_per_step=1")),
    Bad("unknown_peers", "context.variant: got best; expected one of contrastive, successes, random_peer, "
        "unrelated_prompt, success_only_matched; choose one of these", ("context=peers", "context.variant=best")),
    Bad("context_longer_than_the_teacher", "context.max_tokens: got 10240 besides up to 128 of prompt and response; "
        "expected together at most the 256 positions of the teacher; lower it",
        ("context=peers", "rollout.samples_per_prompt=4", "verify.name=exact")),
    Bad("teacher_besides_several", "teacher.model (recipe.yaml:5): got teacher; expected nothing beside teachers math, "
        "code, each of which has its own settings; say it of the one that is meant, or leave it out",
        ("teachers.math.model=teacher", "teachers.code.model=teacher")),
    Bad("several_teachers_that_nobody_asks", "teachers: got math; expected none, as loss cross_entropy asks no "
        "teacher; leave them out, or choose a loss that learns from a teacher",
        ("teacher.model=null", "teachers.math.model=teacher", "loss=cross_entropy")),
    Bad("one_of_several_without_model", "teachers.code.model: got nothing; expected a model folder; set "
        "teachers.code.model (or teachers.code.source=ema)",
        (*SEVERAL, "teachers.code.model=null", "data.teacher_key=task")),
    Bad("one_of_several_in_a_wrong_layout", "teachers.code.tensor_model_parallel_size: got 16; expected 1, 2, 4 or 8 (",
        (*SEVERAL, "teachers.code.tensor_model_parallel_size=16", "data.teacher_key=task")),
    Bad("unknown_key_of_one_of_several", "teachers.code.modle: got an unknown key; expected a key of `teachers.code`; "
        "did you mean `teachers.code.model`?", (*SEVERAL, "teachers.code.modle=teacher")),
    Bad("several_as_value", "teachers.code: got 5; expected a section with ", ("teachers.code=5",)),
    Bad("name_that_is_none", "teachers.a/b.model: got a/b; expected a name of letters, digits, _ and -; choose another",
        ("teachers.a/b.model=teacher",)),
    Bad("share_of_nothing", "teachers.code.weight: got 0.0; expected at least 1e-09; change the value",
        (*SEVERAL, "teachers.code.weight=0")),
    Bad("mixture_under_another_loss", "loss.name: got jsd; expected one of reverse_kl, policy_gradient, k2 for a "
        "mixture of teachers, whose gradients are the weighted sums; set data.teacher_key to a field that names each "
        "record's teacher, or change this", (*SEVERAL, "loss=jsd")),
    Bad("mixture_of_contexts", "context.name: got privileged; expected same_prompt for a mixture of teachers",
        (*SEVERAL, "context=privileged", "context.text=x", "context.max_tokens=64")),
    Bad("moving_part_of_a_mixture", "teachers.code.source: got ema; expected external or frozen for a mixture under "
        "loss reverse_kl", (*SEVERAL, "teachers.code.model=null", "teachers.code.source=ema")),
    Bad("two_averages", "teachers.code.source: got ema, a second one; expected one average of the student at most",
        (*SEVERAL, "teachers.code.model=null", "teachers.code.source=ema", "teachers.math.model=null",
         "teachers.math.source=ema")),
    Bad("key_without_teachers", "data.teacher_key: got task; expected null without several teachers; name the teachers",
        ("data.teacher_key=task",)),
    Bad("stop_rule_of_several_teachers", "stop.name: got kat; expected default or fixed with several teachers, as the "
        "rule asks one", (*SEVERAL, "data.teacher_key=task", "stop=kat")),
    Bad("whole_divergence_from_oneself", "stop.divergence: got full; expected tail with teacher.source=ema, whose "
        "output layer is no file; set stop.divergence=tail",
        ("stop=kat", "stop.divergence=full", "teacher.model=null", "teacher.source=ema")),
    Bad("student_that_writes_as_its_teacher", "prefix.name: got teacher; expected student or dataset with "
        "teacher.source=frozen, as one external teacher is who writes",
        ("prefix=teacher", "teacher.model=null", "teacher.source=frozen")),
    Bad("redrawn_data_set", "reward.equal_groups: got redraw; expected keep or drop with prefix mixed, whose written "
        "responses are no group; choose one of these",
        ("prefix=mixed", "prefix.loss=cross_entropy", "reward=group_relative", "reward.equal_groups=redraw",
         "verify.name=exact", "rollout.samples_per_prompt=4")),
    Bad("reward_loss_without_reward", "reward.name: got none; expected group_relative, which loss "
        "verifier_policy_gradient is made of; set reward=group_relative",
        ("loss=verifier_policy_gradient", "teacher.engine=none")),
    Bad("reward_without_verifier", "verify.name: got none; expected a verifier, as reward group_relative learns from "
        "it; set verify.name (exact, integer, math, ...), or reward=none",
        ("reward=group_relative", "rollout.samples_per_prompt=4")),
    Bad("reward_of_one", "rollout.samples_per_prompt: got 1; expected at least 2, as responses to a prompt are "
        "compared; set it to 8, for example", ("reward=group_relative", "verify.name=exact")),
    Bad("reward_of_a_data_set", "reward.name: got group_relative; expected a reward that does not ask how probable a "
        "token was when it was drawn", ("prefix=dataset", "reward=group_relative", "verify.name=exact")),
    Bad("weight_of_nothing", "reward.loss_weight: got 0.5; expected 1 with loss verifier_policy_gradient, beside which "
        "there is no other; leave it out, or choose another loss",
        ("loss=verifier_policy_gradient", "teacher.engine=none", "reward=group_relative", "reward.loss_weight=0.5",
         "verify.name=exact", "rollout.samples_per_prompt=4")),
    Bad("second_importance_ratio", "weight.name: got tis; expected unit with loss verifier_policy_gradient, which has "
        "its own importance ratio; leave it out",
        ("loss=verifier_policy_gradient", "teacher.engine=none", "reward=group_relative", "weight=tis",
         "verify.name=exact", "rollout.samples_per_prompt=4")),
    Bad("clip_of_nothing", "reward.clip_low: got 0.0; expected a value from 1e-06 to 1; change the value",
        ("reward=group_relative", "reward.clip_low=0")),
    Bad("mixture_out_of_range", "loss.beta: got 1.5; expected a value from 0 to 1; change the value",
        ("loss=jsd", "loss.beta=1.5")),
    Bad("evaluation_without_problems", "evaluate.every: got 5; expected 0 without evaluate.path; set evaluate.path to "
        "held-out problems, or evaluate.every=0", ("evaluate.every=5",)),
    Bad("evaluation_without_verifier", "verify.name: got none; expected a verifier, as evaluate.path asks for rewards; "
        "set verify.name (exact, integer, math, ...), or leave evaluate.path out", ("evaluate.path=train.jsonl",)),
    Bad("greedy_samples", "evaluate.samples_per_prompt: got 4; expected 1, as greedy samples are all the same; set "
        "evaluate.samples_per_prompt=1 or evaluate.greedy=false",
        ("evaluate.path=train.jsonl", "verify.name=exact", "evaluate.greedy=true", "evaluate.samples_per_prompt=4")),
    Bad("ahead_without_servers", "rollout.staleness: got 1; expected 0 with engine hf, which writes and trains in the "
        "same processes by turns; set rollout.engine=vllm, or leave staleness out", ("rollout.staleness=1",)),
    Bad("limit_below_a_server_s", "limits.rollout: got 200.0; expected more than rollout.servers.stuck_seconds (300), "
        "after which a server is given up, not the run; raise it, or lower rollout.servers.stuck_seconds",
        (*WRITTEN, "limits.rollout=200")),
    Bad("limit_below_a_teacher_s_start", "limits.start: got 600.0; expected more than teacher.servers.start_seconds "
        "(600), after which a server is given up, not the run; raise it, or lower teacher.servers.start_seconds",
        (*SERVED, "loss=policy_gradient", "limits.start=600")),
    Bad("more_slow_steps_than_are_looked_at", "straggler.steps: got 11; expected at most straggler.window (10), the "
        "steps that are looked at; lower it, or raise the window", ("straggler.steps=11",)),
    Bad("guard_without_a_window", "guard.window: got 1; expected at least 2; change the value", ("guard.window=1",)),
    Bad("ahead_of_a_data_set", "rollout.staleness: got 2; expected 0, as the data set wrote the responses; leave it "
        "out", (*AHEAD, "algorithm=sft", "evaluate.path=train.jsonl", "verify.name=exact")),
    Bad("ahead_of_the_teacher", "rollout.staleness: got 2; expected 0 with prefix teacher, as the teacher begins the "
        "responses in the trainer's processes; leave staleness out, or set prefix=student",
        (*AHEAD, "prefix=teacher")),
    Bad("segments_ahead", "stop.form: got segments; expected after with rollout.staleness=2, as every rank and the "
        "teacher take part between two segments; set stop.form=after, or leave staleness out",
        (*AHEAD, "stop=kat", "stop.window=8", "stop.stride=8")),
    Bad("redrawn_ahead", "reward.equal_groups: got redraw; expected keep or drop with rollout.staleness=2, as further "
        "prompts would be begun when the step is due; choose one of these, or leave staleness out",
        (*AHEAD, "reward=group_relative", "reward.equal_groups=redraw", "verify.name=exact",
         "rollout.samples_per_prompt=4")),
    Bad("old_tokens_taken_for_new", "weight.name (algorithm opd): got unit; expected tis, icepop or sequence for loss "
        "policy_gradient with staleness, whose tokens an older policy drew; choose one of these, or "
        "loss.importance_ratio=sampler",
        (*AHEAD, "loss=policy_gradient", "loss.importance_ratio=none")),
    Bad("old_tokens_of_k2", "weight.name (algorithm opd): got unit; expected tis, icepop or sequence for loss k2 with "
        "staleness, whose tokens an older policy drew; choose one of these", (*AHEAD, "loss=k2")),
    Bad("unknown_action", "diagnose.repetition.action: got halt; expected one of ignore, warn, stop; choose one of "
        "these", ("diagnose.repetition.action=halt",)),
    Bad("action_without_its_key", "diagnose.repetition: got stop; expected a section with action, threshold; set them "
        "one by one, for example diagnose.repetition.action=...", ("diagnose.repetition=stop",)),
    Bad("unknown_sign", "diagnose.repetitions.action: got an unknown key; expected a key of the schema; did you mean "
        "`diagnose.repetition.action`?", ("diagnose.repetitions.action=warn",)),
    Bad("share_above_one", "diagnose.truncation.threshold: got 50.0; expected a value from 1e-06 to 1; change the "
        "value", ("diagnose.truncation.threshold=50",)),
    Bad("growth_below_one", "diagnose.divergence.threshold: got 0.5; expected at least 1; change the value",
        ("diagnose.divergence.threshold=0.5",)),
    Bad("window_of_one_step", "diagnose.window: got 1; expected at least 2; change the value", ("diagnose.window=1",)),
    # files
    Bad("no_model", "student.model: got no folder nowhere; expected a model folder; give a folder in Hugging Face "
        "format (`hf download NAME --revision COMMIT --local-dir DIR` makes one)", ("student.model=nowhere",)),
    Bad("no_model_configuration", "student.model: got no empty/config.json; expected a model folder in Hugging Face "
        "format; check the path", ("student.model=empty",), prepare=lambda folder: (folder / "empty").mkdir()),
    Bad("unsupported_architecture", "student.model: got a model of architecture MambaForCausalLM; expected one of "
        "Qwen3ForCausalLM, Qwen2ForCausalLM, LlamaForCausalLM, MistralForCausalLM, Qwen3MoeForCausalLM; choose a model "
        "of these families",
        ("student.model=mamba",),
        prepare=lambda folder: write_model(folder / "mamba", architectures=["MambaForCausalLM"])),
    Bad("model_with_code", "student.model: got coded/config.json with code of its own (auto_map); expected weights and "
        "JSON only; no code of a model is ever run: convert it to a supported architecture first",
        ("student.model=coded",),
        prepare=lambda folder: write_model(folder / "coded", auto_map={"AutoModel": "modeling.Model"})),
    Bad("model_without_sizes", "student.model: got None as vocab_size in sizeless/config.json; expected a whole number "
        "from 1; check the model folder", ("student.model=sizeless",),
        prepare=lambda folder: write_model(folder / "sizeless", vocab_size=None)),
    Bad("no_data", "data.path (recipe.yaml:7): got no file gone.jsonl; expected a .jsonl or .parquet file, or a saved "
        "data set; check the path", old="train.jsonl", new="gone.jsonl"),
    Bad("data_of_another_kind", "data.path: got recipe.yaml; expected a name in .jsonl or .parquet, or a folder; "
        "convert or rename the file", ("data.path=recipe.yaml",)),
    Bad("run_folder_is_a_file", "run.dir: got train.jsonl; expected a folder, made when absent; choose another",
        ("run.dir=train.jsonl",)),
    # YAML
    Bad("duplicate_key", "recipe.yaml:14: got `run` a second time; expected each key once (first on line 1); remove "
        "one", new="# again\nrun: {seed: 1}\n"),
    Bad("python_tag", "recipe.yaml:12: got the tag `tag:yaml.org,2002:python/object/apply:os.system` at "
        "`train.steps`; expected plain values; a recipe holds data, no code: remove the tag", old="steps: 10",
        new="steps: !!python/object/apply:os.system ['touch canary']"),
    Bad("target", "recipe.yaml:13: got `_target_`; expected data; choose by name (`loss: reverse_kl`); a recipe builds "
        "no objects", new="loss: {_target_: os.system}\n"),
    Bad("alias", "recipe.yaml:13: got the anchor or alias `a` at `optimizer`; expected plain values; write the value "
        "out where it is needed", new="optimizer: &a {lr: 1e-5}\n"),
    Bad("dotted_key", "recipe.yaml:13: got the dotted key `train.steps`; expected nested sections; write "
        "`train: {steps: ...}`", new="train.steps: 5\n"),
    Bad("number_as_key", "recipe.yaml:13: got the key `1`; expected a name as key; see recipes/README.md",
        new="1: one\n"),
    Bad("broken_yaml", "recipe.yaml:13: got found character '\\t' that cannot start any token; expected YAML; mend "
        "this line", new="\trun: x\n"),
]  # fmt: skip


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    make_workspace(tmp_path)
    return tmp_path


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_one_line_tells_what_to_change(bad: Bad, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad.prepare(workspace)
    recipe = workspace / "recipe.yaml"
    text = recipe.read_text()
    assert bad.old in text
    recipe.write_text(text.replace(bad.old, bad.new) if bad.old else text + bad.new)
    before = sorted(path.name for path in workspace.rglob("*"))

    code = main(["train", "recipe.yaml", *bad.words])

    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith(f"error: {bad.message}"), err
    assert err.count("\n") == 1
    assert all(part in err for part in (": got ", "; expected ", "; "))
    assert sorted(path.name for path in workspace.rglob("*")) == before, "a refused recipe leaves nothing behind"


def test_the_unbroken_recipe_is_accepted(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipe.yaml", "--check"]) == 0
    assert "pipeline_model_parallel_size: 1" in capsys.readouterr().out


def test_missing_recipe(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "gone.yaml"]) == 2
    assert capsys.readouterr().err == (
        "error: gone.yaml: got no such file; expected a recipe; check the path, or see recipes/README.md\n"
    )


def test_an_alias_bomb_is_refused_before_it_is_built(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]  # 2^40 items
    (workspace / "recipe.yaml").write_text("\n".join(lines))
    assert main(["train", "recipe.yaml"]) == 2
    assert "recipe.yaml:1: got the anchor or alias `a0`" in capsys.readouterr().err


def test_a_deep_nest_is_refused_before_the_parser_recurses(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "recipe.yaml").write_text("run: " + "[" * 100_000)
    assert main(["train", "recipe.yaml"]) == 2
    assert "recipe.yaml:1: got more than 16 levels" in capsys.readouterr().err


def test_a_huge_file_is_not_read(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "recipe.yaml").write_text("#" * (2 << 20))
    assert main(["train", "recipe.yaml"]) == 2
    assert "recipe.yaml: got 2097152 bytes; expected at most 1048576 bytes" in capsys.readouterr().err


def test_a_model_configuration_that_is_no_json(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "student" / "config.json").write_text(json.dumps([1]))
    assert main(["train", "recipe.yaml"]) == 2
    assert "student/config.json without fields; expected a JSON object" in capsys.readouterr().err
