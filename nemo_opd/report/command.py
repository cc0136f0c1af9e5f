"""`nemo-opd report`: read the runs, write the page."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_opd.configuration.folders import folder_kind
from nemo_opd.errors import ConfigError
from nemo_opd.report.page import page
from nemo_opd.report.read import read_run

FILE = "report.html"


def main(args: argparse.Namespace) -> int:
    """Write the page for ``args.runs`` and say where it is."""
    for path in args.runs:
        folder_kind(path, ("run",))
    if args.rollout_steps < 0:
        raise ConfigError("--rollout-steps", args.rollout_steps, "at least 0", "0 leaves the rollouts out")
    out: Path = args.out or args.runs[0] / FILE
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigError("--out", out, "a file in a folder to write to", "name one, for example --out report.html")
    names = labels(args.runs)
    text = page([read_run(path, name, args.rollout_steps) for path, name in zip(args.runs, names, strict=True)])
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(out)
    sys.stdout.write(f"{out}\n")
    return 0


def labels(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as it takes to tell them apart; a folder given twice gets a number."""
    whole = [path.absolute().parts for path in paths]
    for depth in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-depth:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            break
    return [name if names.count(name) == 1 else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]
