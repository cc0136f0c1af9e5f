"""The tables of docs/scaling.md: what `nemo-opd plan` says of a pair of models from 8 to 1,024 GPUs, and of one change
at a time. Arithmetic, no measurement.

    python -m benchmarks.scaling            prints them
    python -m benchmarks.scaling --write    puts them into docs/scaling.md
    python -m benchmarks.scaling --check    exits with 1 where the page has others
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from nemo_opd.planning.gpus import GIB
from nemo_opd.planning.plan import Options, Plan, make_setting, plan, read_recipe
from nemo_opd.planning.setting import Setting

PAGE = Path("docs/scaling.md")
RECIPE = Path("recipes/qwen3-8b_from_qwen3-32b/8_nodes.yaml")
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
FIXED_PROMPTS = 128
PARTS = {"write": "writing", "exchange": "exchange", "score": "scoring", "train": "training", "update": "update",
         "refit": "refit", "rest": "rest"}  # fmt: skip


def at(gpus: int, prompts: int) -> Plan:
    """Half of the GPUs train and score, the other half write."""
    trainer = gpus // 2
    words = [f"train.prompts_per_step={prompts}", f"train.processes={trainer}", "rollout.batch_size=256"]
    words += [f"cluster.rollout_nodes={(gpus - trainer) // 8}"]
    if gpus == 8:  # on the trainer's only node
        words += ["rollout.servers.count=4", "rollout.servers.tensor_parallel_size=1"]
        words += ["teacher.tensor_model_parallel_size=4"]
    return plan(make_setting(read_recipe(RECIPE, words), Options()))


def by_gpus() -> Iterator[tuple[str, ...]]:
    """A step of 1,024 responses on ever more GPUs, and one that grows with them."""
    yield ("GPUs", "1,024 responses: s", "tokens/s and GPU", "longest part", "growing batch", "s", "tokens/s and GPU",
           "longest part", "GiB a GPU")  # fmt: skip
    for gpus in SIZES:
        fixed, grown = at(gpus, FIXED_PROMPTS), at(gpus, max(16, 2 * gpus))
        yield (
            f"{gpus:,}",
            *_step(fixed, gpus),
            f"{grown.setting.responses:,}",
            *_step(grown, gpus),
            f"{max(fixed.worst.peak[1], grown.worst.peak[1]) / GIB:.1f}",
        )


def _step(found: Plan, gpus: int) -> tuple[str, str, str]:
    times = found.times
    return f"{times.step:.0f}", f"{times.tokens_per_second / gpus:,.0f}", PARTS[times.bottleneck]


def by_change() -> Iterator[tuple[str, ...]]:
    """One thing at a time, from the recipe with 64 GPUs."""
    yield ("change", "GiB a GPU", "activations, GiB", "writing, s", "scoring, s", "training, s", "of it the loss, s",
           "GB sent by a rank")  # fmt: skip
    yield _changed("the recipe", ())
    for tokens in (1024, 8192, 16384):
        yield _changed(f"responses of {tokens:,} tokens", (f"rollout.max_new_tokens={tokens}",))
    for rows in (32_000, 256_000):
        yield _changed(f"a vocabulary of {rows:,}", (), lambda setting, rows=rows: _vocabulary(setting, rows))
    for name in ("Qwen3-1.7B", "Qwen3-14B", "Qwen3-32B"):
        yield _changed(f"student {name}", (f"student.model=models/{name}",))
    for name in ("Qwen3-8B", "Qwen3-14B"):
        yield _changed(f"teacher {name}", (f"teacher.model=models/{name}",))
    for size in (2, 8):
        yield _changed(f"student at TP {size}", (f"student.tensor_model_parallel_size={size}",))
    for size in (2, 4):
        words = ("student.tensor_model_parallel_size=4", f"student.pipeline_model_parallel_size={size}")
        yield _changed(f"student at TP 4 x PP {size}", words)
    for size in (2, 4):
        yield _changed(f"teacher at TP 8 x PP {size}", (f"teacher.pipeline_model_parallel_size={size}",))
    yield _changed("micro-batches of one response", ("train.micro_batch_tokens=5120",))
    for count in (2, 4):
        yield _changed(f"{count} teachers of this size, mixed", _teachers(count))


def _teachers(count: int) -> tuple[str, ...]:
    words = ["teacher.model=null", "teacher.tensor_model_parallel_size=1", "teacher.sequence_parallel=false"]
    words += ["teacher.micro_batch_tokens=4096"]
    for number in range(count):
        words += [f"teachers.t{number}.model=models/Qwen3-32B", f"teachers.t{number}.tensor_model_parallel_size=8"]
        words += [f"teachers.t{number}.sequence_parallel=true", f"teachers.t{number}.micro_batch_tokens=8192"]
    return tuple(words)


def _vocabulary(setting: Setting, rows: int) -> Setting:
    shapes = {key: replace(shape, vocabulary=rows) for key, shape in setting.shapes.items()}
    return replace(setting, shapes=shapes)


def _changed(
    what: str, words: Sequence[str], change: Callable[[Setting], Setting] = lambda setting: setting
) -> tuple[str, ...]:
    found = plan(change(make_setting(read_recipe(RECIPE, words), Options())))
    parts = found.times.parts
    worst = found.worst
    return (
        what,
        f"{worst.peak[1] / GIB:.1f}" + (", does not fit" if found.problems else ""),
        f"{worst.activations / GIB:.1f}",
        *(f"{parts[name]:.1f}" for name in ("write", "score", "train", "loss")),
        f"{sum(flow.sent for flow in found.flows) / 1e9:,.0f}",
    )


TABLES = {"gpus": by_gpus, "changes": by_change}


def markdown(rows: Sequence[tuple[str, ...]]) -> str:
    """A table; all columns but the first at the right."""
    marks = ("---", *("---:" for _ in rows[0][1:]))
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], marks, *rows[1:]))


def filled(text: str) -> str:
    """The page with its tables made anew, each between two marks."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: made by `python -m benchmarks.scaling --write` -->\n", f"<!-- end of {name} -->\n"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"got a page without the marks of {name}; expected {begin}...{end}")
        text = f"{before}{begin}{markdown(list(make()))}{end}{after}"
    return text


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description="Tables of docs/scaling.md.")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if not (args.write or args.check):
        for make in TABLES.values():
            print(markdown(list(make())))
        return 0
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before)
    if args.write:
        PAGE.write_text(after, encoding="utf-8")
    return int(args.check and before != after)


if __name__ == "__main__":
    sys.exit(main())
