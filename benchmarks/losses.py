"""Time, peak memory and gradient error of distillation losses, beside plain PyTorch, TRL and Liger-Kernel.

    python -m benchmarks.losses                    one size, all losses and peers (about ten minutes on two cores)
    python -m benchmarks.losses --grid sizes       more tokens, vocabularies and widths, jsd beside Liger-Kernel
    python -m benchmarks.losses --repeats 5

Forward and backward with the gradient of hidden states and output layer. Every measurement is a process of its own;
time is the best of the repeats, memory the highest resident set (on CUDA: allocated memory) above the inputs, so that
gradients, 4 bytes x (tokens + vocabulary) x hidden in float32, are part of it. `limit` is what no method can beat: the
four matrix products alone, in chunks of the same size. Gradient errors are the largest absolute difference to float64
on 64 tokens, over the largest gradient. TP 2 is two processes of one thread each over gloo (NCCL on two GPUs), and its
limit the same products on half the vocabulary each, also in two processes. Peers come from PyPI (extra `bench`); one
that is not installed is left out of the table. On a shared machine the limit itself moves by a tenth between runs, so a
ratio may come out below 1: read `slowest` beside `seconds`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PEERS = ("plain", "trl", "liger")
ERROR_TOKENS = 64


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    method: str
    """limit, ours, plain, trl or liger"""
    loss: str
    tokens: int
    vocab: int
    hidden: int
    teacher_hidden: int
    chunk: int
    tp: int = 1
    device: str = "cpu"
    repeats: int = 3


def standard_cases(device: str) -> list[Case]:
    """One size, all losses and peers, TP 1 and 2."""
    if device == "cuda":
        sizes = [(8192, vocab, 4096, 4096, 2048) for vocab in (128_256, 151_936)]
    else:
        sizes = [(2048, 65_536, 512, 1024, 256)]
    cases = []
    for tokens, vocab, hidden, teacher_hidden, chunk in sizes:
        base = Case("limit", "-", tokens, vocab, hidden, teacher_hidden, chunk, 1, device)
        cases += [base]
        cases += [replace(base, method="ours", loss=loss) for loss in ("reverse_kl", "forward_kl", "jsd", "tail")]
        cases += [replace(base, method=m, loss="jsd") for m in PEERS] + [
            replace(base, method="plain", loss="reverse_kl")
        ]
        if device == "cpu":
            cases += [replace(base, tp=2)]
            cases += [replace(base, method="ours", loss=loss, tp=2) for loss in ("reverse_kl", "forward_kl", "jsd")]
    return cases


def size_cases(device: str) -> list[Case]:
    """More tokens, vocabularies and widths."""
    cases: list[Case] = []
    base = replace(standard_cases(device)[1], loss="jsd")
    changes: list[dict[str, int]] = [{"tokens": t} for t in (512, 8192)]
    changes += [{"vocab": v} for v in (32_000, 151_936)]
    changes += [
        {"hidden": 2048, "teacher_hidden": 2048, "tokens": 512},
        {"hidden": 4096, "teacher_hidden": 4096, "tokens": 512},
    ]
    for change in changes:
        for method in ("limit", "ours", "liger"):
            cases.append(replace(base, method=method, loss="-" if method == "limit" else "jsd", **change))
    return cases


# --- one measurement, in a process of its own ----------------------------------------------------------------------


class Inputs:
    """Hidden states and output layers of both models; under tensor parallelism this rank's rows."""

    def __init__(self, case: Case, rank: int = 0, tokens: int | None = None, double: bool = False) -> None:
        import torch

        generator = torch.Generator(case.device).manual_seed(0)
        dtype = torch.bfloat16 if case.device == "cuda" else torch.float32
        rows, count = case.vocab // case.tp, tokens or case.tokens

        def draw(*shape: int, scale: float) -> torch.Tensor:
            drawn = (torch.randn(*shape, generator=generator, device=case.device) * scale).to(dtype)
            return drawn.double() if double else drawn

        self.hidden = draw(count, case.hidden, scale=1.0).requires_grad_()
        self.teacher_hidden = draw(count, case.teacher_hidden, scale=1.0)
        whole = draw(case.vocab, case.hidden, scale=2.0 / case.hidden**0.5)
        self.weight = whole[rank * rows : (rank + 1) * rows].clone().requires_grad_()
        whole = draw(case.vocab, case.teacher_hidden, scale=2.0 / case.teacher_hidden**0.5)
        self.teacher_weight = whole[rank * rows : (rank + 1) * rows].clone()
        self.ids = torch.randint(0, case.vocab, (count,), generator=generator, device=case.device)


def runner(case: Case, inputs: Inputs, rank: int, group: object) -> Callable[[], None]:
    """What is timed: loss and both gradients."""
    import torch

    if case.method == "limit":
        return lambda: _products(case, inputs)
    losses = {"ours": _ours, "plain": _plain, "trl": _trl, "liger": _liger}
    value = losses[case.method](case, inputs, rank, group)

    def run() -> None:
        inputs.hidden.grad = inputs.weight.grad = None
        value().backward()
        if case.device == "cuda":
            torch.cuda.synchronize()

    return run


def _products(case: Case, inputs: Inputs) -> None:
    """The matrix products that no method can do without, into buffers made once."""
    import torch

    with torch.no_grad():
        dtype = inputs.weight.dtype
        student, teacher = (
            torch.empty(case.chunk, inputs.weight.shape[0], device=case.device, dtype=dtype) for _ in "st"
        )
        dweight, dhidden = torch.zeros_like(inputs.weight), torch.empty_like(inputs.hidden)
        for start in range(0, inputs.hidden.shape[0], case.chunk):
            part = slice(start, start + case.chunk)
            count = inputs.hidden[part].shape[0]
            torch.mm(inputs.hidden[part], inputs.weight.t(), out=student[:count])
            torch.mm(inputs.teacher_hidden[part], inputs.teacher_weight.t(), out=teacher[:count])
            torch.mm(student[:count], inputs.weight, out=dhidden[part])
            dweight.addmm_(student[:count].t(), inputs.hidden[part])
        if case.device == "cuda":
            torch.cuda.synchronize()


def _ours(case: Case, inputs: Inputs, rank: int, group: object) -> Callable:
    import torch

    from nemo_opd.types import TokenBatch
    from nemo_opd.vocab.fused import OutputLayer, fused_loss
    from nemo_opd.vocab.shard import VocabShard

    loss, count = _loss_named(case.loss), len(inputs.ids)
    rows = case.vocab // case.tp
    shard = VocabShard(case.vocab, rank * rows, rows, group)  # type: ignore[arg-type]
    order, zeros = torch.arange(count, device=case.device), torch.zeros(count, device=case.device)
    tokens = TokenBatch(
        position=order,
        ids=inputs.ids,
        sequence=torch.zeros_like(order),
        offset=order,
        author=torch.zeros_like(order, dtype=torch.int8),
        policy_version=torch.zeros_like(order),
        sampler_logprobs=zeros - 5.0,
        advantage=zeros,
        teacher_valid=torch.ones_like(order, dtype=torch.bool),
        teacher_hidden=inputs.teacher_hidden,
    )

    def value() -> torch.Tensor:
        output, teacher = OutputLayer(inputs.weight, shard), OutputLayer(inputs.teacher_weight, shard)
        return fused_loss(
            loss, inputs.hidden, output, teacher, tokens, {loss.name: float(count)}, chunk_tokens=case.chunk
        ).loss

    return value


def _loss_named(name: str) -> Any:
    """The loss, or on a machine without NeMo what the fused loss computes of it."""
    from nemo_opd.config import SLOTS

    try:
        from nemo_opd.losses import build_loss
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "nemo":
            raise
        from benchmarks.bare_loss import BareDivergence

        return BareDivergence(name)
    return build_loss(SLOTS["loss"][name]())


def _logits(inputs: Inputs):  # type: ignore[no-untyped-def]
    return inputs.hidden @ inputs.weight.t(), inputs.teacher_hidden @ inputs.teacher_weight.t()


def _plain(case: Case, inputs: Inputs, rank: int, group: object) -> Callable:
    import math

    import torch

    def value() -> torch.Tensor:
        log_p, log_q = (
            logits.float().log_softmax(1) if case.device == "cuda" else logits.log_softmax(1)
            for logits in _logits(inputs)
        )
        if case.loss == "reverse_kl":
            return (log_p.exp() * (log_p - log_q)).sum(1).mean()
        log_m = torch.logaddexp(log_q, log_p) + math.log(0.5)
        to_teacher, to_student = (log_q.exp() * (log_q - log_m)).sum(1), (log_p.exp() * (log_p - log_m)).sum(1)
        return 0.5 * (to_teacher + to_student).mean()

    return value


def _trl(case: Case, inputs: Inputs, rank: int, group: object) -> Callable:
    from trl.experimental.gkd import GKDTrainer

    def value():  # type: ignore[no-untyped-def]
        student, teacher = _logits(inputs)
        return GKDTrainer.generalized_jsd_loss(
            student.unsqueeze(0), teacher.unsqueeze(0), beta=0.5, reduction="sum"
        ) / len(inputs.ids)

    return value


def _liger(case: Case, inputs: Inputs, rank: int, group: object) -> Callable:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # Its default chunk of 1,024 tokens needs more memory; 128 is the fastest of those that need least on a CPU.
    chunk = 1024 if case.device == "cuda" else 128
    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=case.device == "cuda", chunk_size=chunk
    )

    def value():  # type: ignore[no-untyped-def]
        return module(inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.ids)

    return value


def _resident(field: str) -> float:
    """Megabytes from /proc: VmRSS now, VmHWM the highest since `_forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status; expected Linux")


def _forget_peak() -> None:
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that was freed but kept would hide what is allocated next
    Path("/proc/self/clear_refs").write_text("5")


def measure(case: Case, rank: int, group: object) -> dict[str, float]:
    """Seconds of every repeat and megabytes above the inputs."""
    import torch

    inputs = Inputs(case, rank)
    run = runner(case, inputs, rank, group)
    small = runner(case, Inputs(case, rank, tokens=min(case.chunk, 64)), rank, group)
    small()  # imports, thread pools and compiled kernels are not what is measured
    if case.device == "cuda":
        run()
        inputs.hidden.grad = inputs.weight.grad = None  # gradients are part of what is measured
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        _forget_peak()
        before = _resident("VmRSS")
    seconds = []
    for _ in range(case.repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
        if case.method != "limit":
            inputs.hidden.grad = inputs.weight.grad = None
    peak = torch.cuda.max_memory_allocated() / 2**20 if case.device == "cuda" else _resident("VmHWM")
    return {"seconds": min(seconds), "slowest": max(seconds), "megabytes": peak - before}


def gradient_error(case: Case) -> dict[str, float]:
    """Largest difference to dense float64 autograd over the largest gradient, at the case's vocabulary."""
    import math

    import torch

    if case.method == "limit" or case.tp > 1 or case.loss == "tail":
        return {}
    inputs, exact = Inputs(case, tokens=ERROR_TOKENS), Inputs(case, tokens=ERROR_TOKENS, double=True)
    runner(case, inputs, 0, None)()
    hidden, weight = exact.hidden.detach().requires_grad_(), exact.weight.detach().requires_grad_()
    log_p, log_q = (
        (hidden @ weight.t()).log_softmax(1),
        (exact.teacher_hidden @ exact.teacher_weight.t()).log_softmax(1),
    )
    if case.loss == "reverse_kl":
        value = (log_p.exp() * (log_p - log_q)).sum(1)
    elif case.loss == "forward_kl":
        value = (log_q.exp() * (log_q - log_p)).sum(1)
    else:
        log_m = torch.logaddexp(log_q, log_p) + math.log(0.5)
        value = 0.5 * ((log_q.exp() * (log_q - log_m)).sum(1) + (log_p.exp() * (log_p - log_m)).sum(1))
    value.mean().backward()
    pairs = {"hidden": (inputs.hidden.grad, hidden.grad), "weight": (inputs.weight.grad, weight.grad)}
    return {
        f"error_{name}": float((got.double() - want).abs().max() / want.abs().max())
        for name, (got, want) in pairs.items()
        if got is not None and want is not None
    }


def _rank_main(rank: int, case: Case, store: str, answers: object) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    backend = "nccl" if case.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=case.tp)
    group = dist.group.WORLD
    answers.put((rank, measure(case, rank, group)))  # type: ignore[attr-defined]
    dist.barrier()
    dist.destroy_process_group()


def run_case(case: Case) -> dict[str, float]:
    """The measurement of one row, in this process or in one per tensor-parallel rank (slowest and largest count)."""
    import torch

    if case.tp == 1:
        torch.set_num_threads(os.cpu_count() or 1)
        return {**measure(case, 0, None), **gradient_error(case)}
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank_main, args=(rank, case, f"{folder}/store", answers)) for rank in range(case.tp)
        ]
        for process in processes:
            process.start()
        found = [answers.get()[1] for _ in processes]
        for process in processes:
            process.join()
    return {name: max(one[name] for one in found) for name in found[0]}


# --- the table -----------------------------------------------------------------------------------------------------


def run_all(cases: list[Case]) -> list[tuple[Case, dict[str, float]]]:
    """Each case in a fresh process; a peer that cannot be imported is left out, any other failure ends the run."""
    rows = []
    for case in cases:
        command = [sys.executable, "-m", "benchmarks.losses", "--case", json.dumps(asdict(case))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0 and case.method in ("trl", "liger") and "ModuleNotFoundError" in done.stderr:
            print(f"{case.method} is not installed: left out", flush=True)
            continue
        if done.returncode != 0:
            raise RuntimeError(f"{case} failed:\n{done.stderr[-3000:]}")
        rows.append((case, json.loads(done.stdout.splitlines()[-1])))
        print(table_row(case, rows[-1][1], _limit_of(case, rows)), flush=True)
    return rows


def _limit_of(case: Case, rows: list[tuple[Case, dict[str, float]]]) -> float | None:
    same = ("tokens", "vocab", "hidden", "teacher_hidden", "tp", "device")
    for other, found in rows:
        if other.method == "limit" and all(getattr(other, n) == getattr(case, n) for n in same):
            return found["seconds"]
    return None


HEADER = (
    "| method | loss | tokens | vocabulary | hidden | TP | seconds | slowest | x limit | MB above inputs | "
    "error d hidden | error d weight | TFLOP/s |\n|" + "---|" * 13
)


def table_row(case: Case, found: dict[str, float], limit: float | None) -> str:
    """One row in Markdown."""
    operations = 2.0 * case.tokens * case.vocab * (3 * case.hidden + case.teacher_hidden)
    ratio = f"{found['seconds'] / limit:.2f}" if limit else "-"
    errors = [f"{found[n]:.1e}" if n in found else "-" for n in ("error_hidden", "error_weight")]
    cells = [
        case.method, case.loss, case.tokens, case.vocab, f"{case.hidden} / {case.teacher_hidden}", case.tp,
        f"{found['seconds']:.2f}", f"{found['slowest']:.2f}", ratio, f"{found['megabytes']:.0f}", *errors,
        f"{operations / found['seconds'] / 1e12:.3f}",
    ]  # fmt: skip
    return "| " + " | ".join(str(c) for c in cells) + " |"


def machine(device: str) -> str:
    """Where this was measured, and with which versions."""
    import torch

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    where = torch.cuda.get_device_name() if device == "cuda" else f"{cpu}, {os.cpu_count()} cores"
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "trl", "liger-kernel", "triton"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} absent")
    return f"{where}; load average {os.getloadavg()[0]:.1f} at the end; {', '.join(versions)}; {date.today()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=("standard", "sizes"), default="standard")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", help="one row as JSON, for the processes that this command starts")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run_case(Case(**json.loads(arguments.case)))))
        return
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = size_cases(device) if arguments.grid == "sizes" else standard_cases(device)
    print(HEADER, flush=True)
    rows = run_all([replace(case, repeats=arguments.repeats) for case in cases])
    lines = [table_row(case, found, _limit_of(case, rows)) for case, found in rows]
    RESULTS.mkdir(exist_ok=True)
    name = f"losses-{device}-{arguments.grid}"
    text = f"# Losses: time, memory, gradient error\n\n`python -m benchmarks.losses --grid {arguments.grid}`, best of "
    text += f"{arguments.repeats}: {machine(device)}\n\n" + "\n".join([HEADER, *lines]) + "\n"
    (RESULTS / f"{name}.md").write_text(text)
    (RESULTS / f"{name}.json").write_text(json.dumps([{**asdict(c), **f} for c, f in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
