"""`nemo-opd data`: problems, tokenizer and untrained models for runs that need no download.

nemo-opd data arithmetic OUT --train 20000 --heldout 1000 --seed 1
nemo-opd data shared-rule OUT --rule base4
nemo-opd data instance OUT --answers 10
nemo-opd data trap OUT --moves 5
nemo-opd data model OUT --tokenizer FOLDER --hidden 96 --layers 2
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from nemo_opd.tasks import instance, shared_rule, trap
from nemo_opd.tasks.arithmetic import ArithmeticTask, write
from nemo_opd.tasks.models import FAMILIES, ModelShape, write_random_model
from nemo_opd.tasks.tokenizer import write_tokenizer

_LOG = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands on the parser of `nemo-opd data`."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    _add_arithmetic(kinds.add_parser("arithmetic", help="integer arithmetic with written-out steps, and a tokenizer"))
    _add_shared_rule(kinds.add_parser("shared-rule", help="a system prompt changes how answers are written"))
    _add_instance(kinds.add_parser("instance", help="a random map that only privileged information tells"))
    _add_trap(kinds.add_parser("trap", help="early mistakes lead into loops"))
    _add_model(kinds.add_parser("model", help="a randomly initialised checkpoint in Hugging Face format"))


def _add_arithmetic(parser: argparse.ArgumentParser) -> None:
    task = ArithmeticTask()
    _add_sizes(parser)
    parser.add_argument("--operations", default=task.operations, help="out of + - * (default %(default)s)")
    parser.add_argument("--digits", type=int, default=task.digits, help="digits of an operand (default %(default)s)")
    parser.add_argument("--terms", type=int, default=task.terms, help="operands of a problem (default %(default)s)")
    parser.add_argument(
        "--noise", type=float, default=0.0, help="share of training responses with a wrong step (default %(default)s)"
    )


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    """What all kinds of problems have."""
    parser.add_argument("out", type=Path, help="folder for the .jsonl files and tokenizer/")
    parser.add_argument("--train", type=int, default=20_000, help="training problems (default %(default)s)")
    parser.add_argument("--heldout", type=int, default=1_000, help="held-out problems (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides which problems are drawn (default %(default)s)")


def _add_shared_rule(parser: argparse.ArgumentParser) -> None:
    _add_sizes(parser)
    rules = sorted(shared_rule.RULES)
    rule = shared_rule.SharedRuleTask().rule
    parser.add_argument("--rule", choices=rules, default=rule, help="of train and heldout (default %(default)s)")
    parser.add_argument("--terms", type=int, default=4, help="operands of a problem (default %(default)s)")
    _add_prompted(parser)


def _add_instance(parser: argparse.ArgumentParser) -> None:
    _add_sizes(parser)
    task = instance.InstanceTask()
    parser.add_argument("--answers", type=int, default=task.answers, help="to draw from (default %(default)s)")
    parser.add_argument("--digits", type=int, default=task.digits, help="of a prompt (default %(default)s)")
    _add_prompted(parser)


def _add_prompted(parser: argparse.ArgumentParser) -> None:
    text = "share of warmup that sees the privileged text (default %(default)s)"
    parser.add_argument("--prompted", type=float, default=0.5, help=text)


def _add_trap(parser: argparse.ArgumentParser) -> None:
    _add_sizes(parser)
    task = trap.TrapTask()
    parser.add_argument("--moves", type=int, default=task.moves, help="steps of a problem (default %(default)s)")
    parser.add_argument("--early", type=int, default=task.early, help="first steps that may err (default %(default)s)")
    parser.add_argument("--loops", type=int, default=task.loops, help="repetitions in a trap (default %(default)s)")
    text = "share of trapped responses in {}.jsonl (default %(default)s)"
    parser.add_argument("--teacher-trapped", type=float, default=0.05, help=text.format("teacher"))
    parser.add_argument("--student-trapped", type=float, default=0.6, help=text.format("student"))


def _add_model(parser: argparse.ArgumentParser) -> None:
    shape = ModelShape()
    parser.add_argument("out", type=Path, help="folder for the checkpoint and its tokenizer")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with the tokenizer to copy")
    parser.add_argument("--family", choices=FAMILIES, default="qwen3", help="architecture (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=shape.hidden_size, help="hidden size (default %(default)s)")
    parser.add_argument("--layers", type=int, default=shape.layers, help="default %(default)s")
    parser.add_argument("--heads", type=int, default=shape.heads, help="query heads (default %(default)s)")
    parser.add_argument(
        "--kv-heads", type=int, default=shape.kv_heads, help="key and value heads (default %(default)s)"
    )
    parser.add_argument("--head-dim", type=int, help="width of a head (default: hidden / heads; vLLM on CPU wants 32)")
    parser.add_argument("--ffn", type=int, default=shape.ffn, help="feed-forward width (default %(default)s)")
    parser.add_argument("--vocab-size", type=int, help="rows of the embedding (default: the tokenizer's length)")
    parser.add_argument("--tie", action="store_true", help="share input and output embedding")
    parser.add_argument("--seed", type=int, default=0, help="of the initialisation (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Do what the parsed arguments say; 0 on success.

    Raises:
        ConfigError: sizes that cannot work, too few problems, or a tokenizer that cannot be read.
    """
    if args.kind == "model":
        _model(args)
    else:
        _problems(args)
    return 0


def _problems(args: argparse.Namespace) -> None:
    if args.kind == "arithmetic":
        task = ArithmeticTask(args.operations, args.digits, args.terms)
        write(args.out, task, args.train, args.heldout, args.noise, args.seed)
    elif args.kind == "shared-rule":
        ruled = shared_rule.SharedRuleTask(args.rule, ArithmeticTask(terms=args.terms))
        shared_rule.write(args.out, ruled, args.train, args.heldout, args.prompted, args.seed)
    elif args.kind == "instance":
        told = instance.InstanceTask(args.answers, args.digits)
        instance.write(args.out, told, args.train, args.heldout, args.prompted, args.seed)
    else:
        shares = args.teacher_trapped, args.student_trapped
        trapping = trap.TrapTask(args.moves, args.early, args.loops)
        trap.write(args.out, trapping, args.train, args.heldout, *shares, args.seed)
    write_tokenizer(args.out / "tokenizer")
    _LOG.info("%d training and %d held-out problems in %s", args.train, args.heldout, args.out)


def _model(args: argparse.Namespace) -> None:
    shape = ModelShape(args.hidden, args.layers, args.heads, args.kv_heads, args.ffn, args.head_dim)
    count = write_random_model(args.out, args.tokenizer, args.family, shape, args.seed, args.tie, args.vocab_size)
    _LOG.info("%s of %d parameters in %s", args.family, count, args.out)
