"""What a GPU makes of student, teacher and loss: one command, no network, random weights.

    python -m benchmarks.gpu                                 Qwen3-1.7B from Qwen3-8B, one GPU (about 60 GB of it)
    python -m benchmarks.gpu --parts loss bf16 --out FILE.md
    python -m benchmarks.gpu --toy                           all of it at toy size, in seconds, also without a GPU

Needs torch 2.11 or later, and besides it megatron-core with what that installs, safetensors and jaxtyping. NeMo,
transformers, datasets, omegaconf and PyYAML need not be there: the loss is the fused loss's hand-written divergence
without NeMo's module around it (`benchmarks/bare_loss.py`). Parts, each in a process of its own, so that none costs
another its result:

    loss        the fused loss beside its matrix products alone (`limit`) and Liger-Kernel, as `benchmarks.losses`
    bf16        a training step of the student, scoring by the teacher; memory beside that of `nemo-opd plan`
    blockwise, tensorwise, delayed    the same with layers of both models in FP8, where Transformer Engine is

A time is the median of the repeats after a warm-up, between two events of the stream. MFU is of the GPU's dense bf16
peak (`nemo_opd/planning/gpus.py`), in FP8 too. Operations of a training step are those of the model: with P parameters
of the layers, L layers, query width q, hidden h, vocabulary V and sequences of n positions,

    3 x sum over sequences of n (2 P + 2 L q n)  +  (6 h_student + 2 h_teacher) V  for each trained token

and of scoring the first sum once, and 2 h V for each token where log-probabilities are asked for. The teacher's hidden
states that the student is trained on lie in host memory, as in a run. What failed is a row that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

FP8 = ("blockwise", "tensorwise", "delayed")
PARTS = ("loss", "bf16", *FP8)
PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "liger-kernel", "nemo-toolkit")
GIB = 1 << 30

Row = dict[str, Any]
"""`part`, `what`, `case`, and numbers, or why there are none (`note`)."""


def attempt(part: str, what: str, case: str, run: Callable[[], dict[str, Any]]) -> Row:
    """One row; what goes wrong is its note."""
    row: Row = {"part": part, "what": what, "case": case}
    try:
        return row | run()
    except Exception as error:  # noqa: BLE001 - whatever it is, the other rows are measured
        first = (str(error).strip() or "no message").splitlines()[0]
        return row | {"note": f"{type(error).__name__}: {first}"[:300], "trace": _trace()}


def _trace() -> str:
    """Without where this machine keeps its files."""
    return traceback.format_exc().replace(str(Path.cwd()), ".").replace(sys.prefix, "PREFIX")[-3000:]


def rows_of(part: str, sizes: Any) -> Iterator[Row]:
    """The rows of one part, as they are measured."""
    yield from loss_rows(sizes) if part == "loss" else model_rows(part, sizes)


def loss_rows(sizes: Any) -> Iterator[Row]:
    """One row of tokens through both output layers of the two models' shapes."""
    import torch

    from benchmarks.gpu_parts import forget_peak
    from benchmarks.losses import Case, measure

    student, teacher = sizes.shape(sizes.student), sizes.shape(sizes.teacher)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, chunk = (64, 32) if sizes.toy else (8192, 2048)
    case = Case("limit", "-", tokens, student.vocabulary, student.hidden, teacher.hidden, chunk, 1, device)
    for method, loss in (("limit", "-"), ("ours", "reverse_kl"), ("ours", "jsd"), ("liger", "jsd")):
        one = replace(case, method=method, loss=loss, repeats=sizes.repeats)

        def run(one: Case = one) -> Row:
            forget_peak()
            found = measure(one, 0, None)
            rate = {"tokens_per_second": tokens / found["seconds"], "peak": found.pop("megabytes") * 2**20}
            return found | rate | {"note": "best of the repeats; memory above the inputs"}

        yield attempt("loss", "fused loss", f"{method} {loss}".removesuffix(" -"), run)


def model_rows(part: str, sizes: Any) -> Iterator[Row]:
    """Both models on the device at once, as in a run; then scoring and a training step."""
    from benchmarks import gpu_parts as parts

    with tempfile.TemporaryDirectory() as folder:
        config = parts.recipe(sizes, Path(folder), "none" if part == "bf16" else part)
        made: dict[str, Any] = {}
        plan: Row = {}
        if part == "bf16":
            planned = attempt(part, "memory by nemo-opd plan", part, lambda: parts.planned_memory(sizes, config))
            plan = {} if "note" in planned else planned
            yield planned

        def build(name: str, make: Callable[[Any], Any]) -> Row:
            parts.forget_peak()
            made[name] = make(config)
            return parts.peak_memory() | {"note": "built"}

        yield attempt(part, "student with optimizer", part, lambda: build("trainer", parts.make_trainer))
        yield attempt(part, "teacher", part, lambda: build("teacher", parts.make_teacher))
        if "teacher" in made:
            for name, needs in parts.NEEDS.items():
                found = attempt(part, f"scoring, {name}", part, lambda n=needs: _score(sizes, made["teacher"][0], n))
                yield found | _beside(plan, "scoring", found)
        if "trainer" in made:
            found = attempt(part, "training step", part, lambda: _train(sizes, made))
            yield found | _beside(plan, "training", found)


def _beside(plan: Row, phase: str, found: Row) -> Row:
    return {"planned": plan[phase]} if phase in plan and "seconds" in found else {}


def _score(sizes: Any, scorer: Any, needs: Any) -> Row:
    from benchmarks import gpu_parts as parts

    asked = parts.requests(parts.rollouts(sizes))

    def run() -> None:
        answers = list(scorer.score(asked, needs))
        assert len(answers) == len(asked) and all(bool(answer.valid.all()) for answer in answers), "scores not finite"

    parts.forget_peak()
    found = parts.timed(run, sizes) | parts.peak_memory()
    return parts.rates(found, parts.score_operations(sizes, needs), sum(sizes.lengths))


def _train(sizes: Any, made: dict[str, Any]) -> Row:
    """Where the teacher could not be built the student is its own, so that its step is still measured."""
    from benchmarks import gpu_parts as parts

    trainer, alone = made["trainer"], "teacher" not in made
    sizes = replace(sizes, teacher=sizes.student) if alone else sizes
    trainer.set_teacher_output(trainer.model if alone else made["teacher"][1])
    batch = parts.batch(sizes, sizes.shape(sizes.teacher).hidden)
    inside: list[dict[str, float]] = []

    def run() -> None:
        stats = trainer.train_step(batch)
        assert not stats.skipped, f"the update was left out: {stats.broken or 'gradient norm'} is not finite"
        inside.append(dict(stats.seconds))

    parts.forget_peak()
    found = parts.timed(run, sizes) | parts.peak_memory()
    optimizer = sorted(one["optimizer"] for one in inside)[len(inside) // 2]
    note = f"of it {1000 * optimizer:.1f} ms in the optimizer" + ("; the student is its own teacher" if alone else "")
    return parts.rates(found, parts.train_operations(sizes), sum(sizes.lengths)) | {"note": note}


# --- the processes, the table -----------------------------------------------------------------------------------------


def in_own_process(part: str, words: Sequence[str], limit: float) -> list[Row]:
    """Measure a part in a process that writes each row as soon as it has it, so that its end costs no earlier one."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "benchmarks.gpu", *words, "--child", part, "--rows", str(file)]
        note = ""
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            if done.returncode:
                note = f"ended with {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}"
        except subprocess.TimeoutExpired:
            note = f"not through after {limit:.0f} s (--limit)"
        if file.exists():
            rows = [json.loads(line) for line in file.read_text().splitlines()]
        if note:
            rows.append({"part": part, "what": "the process", "case": part, "note": note[:300]})
    return rows


def machine() -> dict[str, str]:
    """GPU, date and versions."""
    import torch

    found = {"GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none, on CPU"}
    found |= {"date": str(date.today()), "Python": platform.python_version(), "CUDA": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


HEADER = "| what | case | ms | time / bf16 | tokens/s | TFLOP/s | MFU | peak, GiB | by plan, GiB | note |"


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line a row."""
    lines = [HEADER, "|" + "---|" * HEADER.count(" | ") + "---|"]
    in_bf16 = {row["what"]: row["seconds"] for row in rows if row["part"] == "bf16" and "seconds" in row}
    for row in rows:
        base = in_bf16.get(row["what"]) if row["part"] in FP8 else None
        note = str(row.get("note", ""))
        if "training" in row:
            note = ", ".join(f"{phase} {row[phase] / GIB:.2f} GiB" for phase in ("scoring", "training"))
        cells = [
            row["what"], row["case"], _cell(row, "seconds", "{:.2f}", 1000.0),
            f"{row['seconds'] / base:.3f}" if base and "seconds" in row else "",
            _cell(row, "tokens_per_second", "{:,.0f}"), _cell(row, "tflops", "{:.3g}"), _cell(row, "mfu", "{:.1%}"),
            _cell(row, "peak", "{:.2f}", 1 / GIB), _cell(row, "planned", "{:.2f}", 1 / GIB), note.replace("|", "/"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Row, name: str, form: str, factor: float = 1.0) -> str:
    return form.format(row[name] * factor) if name in row else ""


def report(words: Sequence[str], sizes: Any, rows: Sequence[Row], out: Path | None) -> str:
    """Markdown, written to `out` with all numbers as JSON beside it."""
    facts, command = machine(), " ".join(["python -m benchmarks.gpu", *words])
    what = f"{sizes.student} from {sizes.teacher}{' at toy size' if sizes.toy else ''}, random weights, "
    what += f"{sizes.responses} responses of {sizes.response} tokens after prompts of {sizes.prompt}"
    how = f"{what}, rows of {sizes.row}, loss {sizes.chunk} tokens at a time. "
    how += f"Median of {sizes.repeats} after {sizes.warmup}."
    versions = ", ".join(f"{name} {value}" for name, value in facts.items())
    text = f"# On a GPU\n\n    {command}\n\n{table(rows)}\n\n{how} {versions}.\n"
    if out is None:
        return text
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    kept = {"command": command, "machine": facts, "sizes": vars(sizes), "rows": list(rows)}
    out.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
    return text


def arguments_of(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="Qwen3-1.7B", help="a model of nemo_opd/planning/models (%(default)s)")
    parser.add_argument("--teacher", default="Qwen3-8B", help="with the student's vocabulary (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--prompt", type=int, default=129, help="tokens (%(default)s)")
    parser.add_argument("--response", type=int, default=1920, help="tokens (%(default)s)")
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--row", type=int, default=4096, help="positions of a micro-batch (%(default)s)")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of the loss at a time (%(default)s)")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=150.0, help="seconds of each part's process (%(default)s)")
    parser.add_argument("--toy", action="store_true", help="tiny models and batches, all in this process")
    parser.add_argument("--out", type=Path, help="Markdown file (benchmarks/results/gpu.md; none with --toy)")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def sizes_of(args: argparse.Namespace) -> Any:
    from benchmarks.gpu_parts import Sizes

    if args.toy:
        return Sizes(args.student, args.teacher, 5, 12, 4, 32, 16, 1, 2, toy=True)
    return Sizes(
        args.student, args.teacher, args.prompt, args.response, args.responses, args.row, args.chunk,
        args.warmup, args.repeats,
    )  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    args = arguments_of(words)
    sizes = sizes_of(args)
    if args.child:
        with args.rows.open("a") as file:
            for row in rows_of(args.child, sizes):
                file.write(json.dumps(row) + "\n")
                file.flush()
        return
    out = args.out or (None if args.toy else Path("benchmarks/results/gpu.md"))
    rows: list[Row] = []
    for part in args.parts:
        rows += rows_of(part, sizes) if args.toy else in_own_process(part, words, args.limit)
        text = report(words, sizes, rows, out)  # after each part, in case this process is ended too
    print(text)


if __name__ == "__main__":
    main()
