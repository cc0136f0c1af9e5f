"""`nemo-opd`: plan, check before training, train, evaluate, measure a teacher's signal, convert, report, make data.

Everything heavy is imported inside a verb, after its arguments and the recipe were checked.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from nemo_opd import __version__
from nemo_opd.config import Config
from nemo_opd.configuration.folders import folder_kind
from nemo_opd.configuration.load import load, recorded_yaml
from nemo_opd.doctor.bounds import parse_bounds
from nemo_opd.errors import ConfigError
from nemo_opd.evaluate.lengths import parse_lengths
from nemo_opd.launch import start
from nemo_opd.planning.gpus import GPUS
from nemo_opd.reliability.outcome import EXIT_CODES, INTERRUPTED, Status
from nemo_opd.reliability.redact import redact
from nemo_opd.worker import configure_logging

_CONFIG_ERROR = EXIT_CODES[Status.CONFIG_ERROR]

_MAIN = """
a first run, on any machine with two CPU cores:
  python -m nemo_opd.quickstart            every step from making the data to the exported student

then, with the models and data that it made:
  nemo-opd train recipes/quickstart/distil.yaml run.dir=runs/mine train.steps=50
  nemo-opd eval runs/mine --data runs/quickstart/data/heldout.jsonl
  nemo-opd export runs/mine runs/student
  nemo-opd report runs/mine

exit codes:
  0    done
  1    doctor: a check failed; its table says which, and what to do. plan: the recipe does not fit
  2    a setting or an argument that cannot work; one line on stderr says what to change
  65   stopped by the diagnosis, with a checkpoint; outcome.json in the run folder has the reason
  70   failed; outcome.json in the run folder has the reason
  75   stopped on request, with a checkpoint: run the same command again to go on
  130  interrupted at once (second Ctrl-C)
"""

_TRAIN = """
examples:
  nemo-opd train recipes/quickstart/distil.yaml
  nemo-opd train my.yaml run.dir=runs/b train.steps=50 loss=policy_gradient loss.clip_ratio=0.2
  nemo-opd train my.yaml student.tensor_model_parallel_size=2 --check

A recipe is a YAML file with the keys of nemo_opd/config.py; key=value on the command line wins over it. `algorithm:
NAME` fills the slots (prefix, stop, context, loss, weight), and each can be replaced by name: loss=cross_entropy.
A text with spaces needs the shell's quotes: "data.system_prompt=Answer briefly."

The number of processes follows from the layouts of student and teacher, or is train.processes. They are started here,
except below torchrun or srun (with MASTER_ADDR and MASTER_PORT set): then this process joins the others.
On a cluster: sbatch slurm/opd.sh RECIPE [key=value ...]

Ctrl-C (or SIGTERM) finishes the step, saves a checkpoint and exits with 75; the same command goes on from there.
A second Ctrl-C ends the run at once. The run folder holds config.yaml, metrics.jsonl, TensorBoard events,
rollouts/*.jsonl, checkpoints/, outcome.json, log.txt and, of the other processes, logs/rank-N.txt.
"""

_DOCTOR = """
examples:
  nemo-opd doctor my.yaml
  nemo-opd doctor my.yaml rollout.engine=vllm --prompts 16 --tokens 256
  nemo-opd doctor my.yaml --static                              no model is built
  nemo-opd doctor my.yaml --static --gpu h200                   and memory as `plan` has it
  nemo-opd doctor my.yaml --bound kl=0.005 --json

What would make this run fail or lie: versions, disk, servers, GPUs and their memory, the SLURM job, token ids, ends,
chat templates; then trainer, generator and teacher are built as `train` builds them, ranks are compared with each other
and engines on the same sequences. Prints a table with every number and its bound, and exits with 1 when a check failed.
Trains nothing, writes nothing into run.dir. See docs/doctor.md.
"""

_PLAN = """
examples:
  nemo-opd plan recipes/qwen3-8b_from_qwen3-32b/2_nodes.yaml
  nemo-opd plan my.yaml --nodes 4 --gpu h200
  nemo-opd plan my.yaml --nodes 8 --sweep                       the best few layouts
  nemo-opd plan my.yaml --assume train_efficiency=0.4 --assume response_share=0.5 --json

Memory of every distinct rank, bytes of every kind of message and an estimate of a step's time, without a GPU and
without the models: of one that is not there, the published config.json of the same name counts. Every distinct rank of
student and teacher is built on the meta device and compared with the arithmetic. Exits with 1 when the recipe does not
fit, after the smallest change with which it would. Rates and assumptions: nemo_opd/planning/gpus.py. See docs/plan.md.
"""

_EVAL = """
examples:
  nemo-opd eval runs/distil --data heldout.jsonl                         newest checkpoint, settings of the run
  nemo-opd eval runs/distil/checkpoints/step-00000100 --data heldout.jsonl evaluate.samples_per_prompt=8
  nemo-opd eval models/student --data heldout.jsonl verify.name=math     any model folder

Prints avg@k and pass@k (k = evaluate.samples_per_prompt) with the number of problems and a 95 % interval.

  nemo-opd eval runs/distil --data heldout.jsonl --teacher-on-prefixes 25%,50%,75%
  nemo-opd eval models/student --data heldout.jsonl teacher.model=models/teacher --teacher-on-prefixes 64,128,256

Lets the teacher continue from what the student wrote, so many tokens or a share of each response, and prints its
accuracy for each length, beside that of the teacher alone on the same problems.
"""

_SIGNAL = """
examples:
  nemo-opd signal my.yaml rollout.samples_per_prompt=8 --prompts 128
  nemo-opd signal my.yaml --context same_prompt --context peers.contrastive --out signal.json

The student writes a group of responses to each prompt, the verifier grades them, and the teacher scores each as a whole
under every context: same_prompt, privileged (the recipe's), peers.contrastive, peers.successes and the controls
peers.random_peer, peers.unrelated_prompt, peers.success_only_matched (default: all that the recipe allows).
Prints, per context, how well scores agree with rewards: AUC, Spearman, and pairwise accuracy within prompts, each with
a 95 % interval over prompts. Runs in one process; nothing is trained.
"""

_EXPORT = """
examples:
  nemo-opd export runs/distil models/student
  nemo-opd export runs/distil/checkpoints/step-00000100 models/student-100
  nemo-opd export runs/distil megatron/student --format torch_dist

Writes safetensors, config.json and tokenizer with Hugging Face names; load it with transformers or vLLM. With
torch_dist: the weights alone, as Megatron-core's dist_checkpointing.load reads them under any layout.
"""

_IMPORT = """
examples:
  nemo-opd import megatron/qwen3-8b models/mine --like models/Qwen3-8B
  nemo-opd import megatron/qwen3-8b/iter_0002000 models/mine --like models/Qwen3-8B --dtype bfloat16

Reads a GPT model's weights in Megatron's torch_dist format (Megatron-LM, Megatron Bridge, NeMo), saved under any
layout, with or without an optimizer; writes safetensors with Hugging Face names beside config.json and tokenizer of
--like.
Names and shapes are compared with that config.json first. Nothing in the checkpoint is executed. See docs/models.md.
"""

_REPORT = """
examples:
  nemo-opd report runs/distil                            writes runs/distil/report.html
  nemo-opd report runs/a runs/b --out compare.html       several runs over each other

One HTML page that loads nothing: how each run ended, what the diagnosis said, curves of every metric, and saved
responses with their tokens coloured by KL, log-probability or weight. Works while a run is going on.
"""

_DATA = """
examples:
  nemo-opd data arithmetic runs/data --train 20000 --heldout 1000
  nemo-opd data KIND --help
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(_CONFIG_ERROR, f"error: command line: {message}; see `{self.prog} --help`\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code and raises nothing that a user has to read as a traceback."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser(arguments[0] if arguments else "")
    args, rest = parser.parse_known_args(arguments)
    try:
        _take_overrides(parser, args, rest)
        configure_logging()
        return args.run(args)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":  # below a launcher every process finds the same error
            sys.stderr.write(redact(f"error: {error}\n"))
        return _CONFIG_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED


def build_parser(verb: str) -> argparse.ArgumentParser:
    """The whole command line; `verb` is the one being called, since `data` brings arguments of its own."""
    parser = _Parser(
        prog="nemo-opd",
        description="On-policy distillation of large language models on Megatron-core: the student writes, the teacher "
        "scores every token, the student learns.",
        epilog=_MAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nemo-opd {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=_Parser)
    _add_train(_verb(verbs, "train", "train a student, or go on with a run", _TRAIN))
    _add_doctor(_verb(verbs, "doctor", "what would make a run fail or lie, before it starts", _DOCTOR))
    _add_plan(_verb(verbs, "plan", "memory, messages and time of a recipe, before any GPU is asked for", _PLAN))
    _add_eval(_verb(verbs, "eval", "accuracy on held-out problems", _EVAL))
    _add_signal(_verb(verbs, "signal", "which teacher context tells good responses from bad ones", _SIGNAL))
    _add_export(_verb(verbs, "export", "write a checkpoint in Hugging Face or Megatron format", _EXPORT))
    _add_import(_verb(verbs, "import", "write a Megatron checkpoint in Hugging Face format", _IMPORT))
    _add_report(_verb(verbs, "report", "one HTML page about runs", _REPORT))
    _add_data(_verb(verbs, "data", "make problems, a tokenizer and untrained models", _DATA), fill=verb == "data")
    return parser


def _verb(verbs: argparse._SubParsersAction[_Parser], name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    return verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML file, see recipes/README.md")
    _add_overrides(parser, "settings that win over the recipe's")
    parser.add_argument("--check", action="store_true", help="check the recipe, print every setting and start nothing")
    parser.set_defaults(run=_train)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML file, see recipes/README.md")
    parser.add_argument("--static", action="store_true", help="build no model: only what files and the machine tell")
    parser.add_argument("--prompts", metavar="N", type=_count, default=8, help="prompts to answer (default 8)")
    parser.add_argument("--tokens", metavar="N", type=_count, default=128, help="longest response (default 128)")
    parser.add_argument(
        "--reference",
        choices=("auto", "always", "never"),
        default="auto",
        help="load models once more on another engine to compare with (auto: up to 4 GiB)",
    )
    parser.add_argument("--gpu", choices=tuple(GPUS), help="compare memory with such a GPU (default: the one here)")
    parser.add_argument("--bound", metavar="NAME=N", action="append", default=[], help="another bound; may be repeated")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    _add_overrides(parser, "settings that win over the recipe's")
    parser.set_defaults(run=_doctor)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML file, see recipes/README.md")
    parser.add_argument("--nodes", metavar="N", type=_count, help="nodes of the trainer (default: train.processes)")
    parser.add_argument("--gpus-per-node", metavar="N", type=_count, default=8, help="default %(default)s")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100", help="default %(default)s")
    parser.add_argument("--assume", metavar="NAME=N", action="append", default=[], help="an assumption; repeatable")
    parser.add_argument("--sweep", action="store_true", help="compare layouts and print the best few")
    parser.add_argument("--arithmetic", action="store_true", help="build no rank on the meta device: under a second")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    _add_overrides(parser, "settings that win over the recipe's")
    parser.set_defaults(run=_plan)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="FOLDER", type=Path, help="run, checkpoint, or model in Hugging Face format")
    parser.add_argument("--data", metavar="FILE", type=Path, help="problems (default: evaluate.path of the run)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the result there too, as JSON")
    parser.add_argument(
        "--compare-transformers",
        action="store_true",
        help="generate with plain transformers too and show whether the answers are the same (model folders only)",
    )
    parser.add_argument(
        "--teacher-on-prefixes",
        metavar="LENGTHS",
        help="let the teacher continue the student's responses from prefixes of these lengths: 64,128 or 25%%,50%%",
    )
    _add_overrides(parser, "settings that win over the run's")
    parser.set_defaults(run=_eval)


def _add_signal(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML file, see recipes/README.md")
    parser.add_argument("--context", metavar="NAME", action="append", help="a context to measure; may be repeated")
    parser.add_argument("--prompts", metavar="N", type=_count, default=64, help="prompts to answer (default 64)")
    parser.add_argument(
        "--draws", metavar="N", type=_count, default=1000, help="bootstrap samples behind an interval (default 1000)"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the result there too, as JSON")
    _add_overrides(parser, "settings that win over the recipe's")
    parser.set_defaults(run=_signal)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}; expected a whole number from 1")
    return int(text)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="FOLDER", type=Path, help="run (its newest checkpoint) or checkpoint")
    parser.add_argument("out", metavar="DIR", type=Path, help="new or empty folder")
    parser.add_argument("--format", choices=("hf", "torch_dist"), default="hf", help="default %(default)s")
    _add_overrides(parser, "settings that win over the run's")
    parser.set_defaults(run=_export)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="CHECKPOINT", type=Path, help="folder in Megatron's torch_dist format")
    parser.add_argument("out", metavar="DIR", type=Path, help="new or empty folder")
    parser.add_argument("--like", metavar="MODEL", type=Path, required=True, help="has its config.json and tokenizer")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="convert to it (default: as the weights are)")
    parser.set_defaults(run=_import)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folder")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the page (default: report.html in the first run)")
    parser.add_argument(
        "--rollout-steps", metavar="N", type=int, default=8, help="steps whose rollouts it shows (default %(default)s)"
    )
    parser.set_defaults(run=_report)


def _add_data(parser: argparse.ArgumentParser, *, fill: bool) -> None:
    if not fill:
        return
    from nemo_opd.tasks import cli as tasks

    tasks.add_arguments(parser)
    parser.set_defaults(run=tasks.run)


def _add_overrides(parser: argparse.ArgumentParser, summary: str) -> None:
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=summary)


def _take_overrides(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: Sequence[str]) -> None:
    """argparse stops collecting `key=value` words at the first option; the ones behind it end up in `rest`."""
    unknown = [word for word in rest if word.startswith("-") or not hasattr(args, "overrides")]
    if unknown:
        parser.error(f"unknown argument {unknown[0]}")
    if rest:
        args.overrides = [*args.overrides, *rest]


def _train(args: argparse.Namespace) -> int:
    config = load(args.recipe, args.overrides)
    if args.check:
        sys.stdout.write(recorded_yaml(config))
        return 0
    return start(config)


def _doctor(args: argparse.Namespace) -> int:
    load(args.recipe, args.overrides)  # what is wrong is said before anything heavy is imported
    args.bound = parse_bounds(args.bound)
    from nemo_opd.doctor import command

    return command.main(args)


def _plan(args: argparse.Namespace) -> int:
    from nemo_opd.planning import command

    return command.main(args)


def _eval(args: argparse.Namespace) -> int:
    args.kind = folder_kind(args.path, ("run", "checkpoint", "model"))
    if args.compare_transformers and args.kind != "model":
        way_out = "export the run first, and name the folder that was written"
        raise ConfigError("--compare-transformers", f"a {args.kind} folder", "a model folder", way_out)
    if args.teacher_on_prefixes is not None:
        args.teacher_on_prefixes = parse_lengths(args.teacher_on_prefixes, "--teacher-on-prefixes")
        if args.compare_transformers:
            way_out = "run them one after the other"
            raise ConfigError("--compare-transformers", "also --teacher-on-prefixes", "one of the two", way_out)
    if args.data is not None and not args.data.exists():
        raise ConfigError("--data", f"no file {args.data}", "a .jsonl or .parquet file", "check the path")
    config = _refuse_wrong_overrides(args)
    if args.teacher_on_prefixes is not None and config.teacher.model is None:
        raise ConfigError("teacher.model", "nothing", "the model that continues", "set teacher.model=FOLDER")
    from nemo_opd.evaluate import command

    return command.main(args)


def _signal(args: argparse.Namespace) -> int:
    load(args.recipe, args.overrides)  # what is wrong is said before anything heavy is imported
    from nemo_opd.evaluate import signal_command

    return signal_command.main(args)


def _export(args: argparse.Namespace) -> int:
    args.kind = folder_kind(args.path, ("run", "checkpoint"))
    _require_room(args.out)
    _refuse_wrong_overrides(args)
    from nemo_opd import export

    return export.main(args)


def _import(args: argparse.Namespace) -> int:
    folder_kind(args.like, ("model",))
    _require_room(args.out)
    from nemo_opd import export

    return export.import_main(args)


def _require_room(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("DIR", f"{out}, which is not empty", "a new or empty folder", "choose another")


def _report(args: argparse.Namespace) -> int:
    from nemo_opd.report import command

    return command.main(args)


def _refuse_wrong_overrides(args: argparse.Namespace) -> Config:
    """Unknown keys and wrong types, before the verb imports what it needs; the verb itself loads its settings."""
    own = args.path / "config.yaml" if args.kind != "model" else None
    required = [] if own else ["run.dir=-", "student.model=-", "data.path=-", "train.steps=1"]
    return load(own, [*required, *args.overrides], checked=False)


if __name__ == "__main__":
    sys.exit(main())
