"""The table of all recipes in recipes/README.md.

    python -m nemo_opd.planning.recipes_table            writes it anew
    python -m nemo_opd.planning.recipes_table --check    exits with 1 where the file says something else

Memory is `nemo-opd plan`'s on H100, without building the ranks; a dash stands for models that are made on the spot.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_opd.config import Config
from nemo_opd.configuration.load import load
from nemo_opd.planning.gpus import GIB
from nemo_opd.planning.plan import Options, make_setting, plan, read_recipe
from nemo_opd.planning.text import layout

RECIPES = Path("recipes")
BEGIN = "<!-- made by `python -m nemo_opd.planning.recipes_table`: do not edit -->\n"
END = "<!-- end -->\n"
HEADS = ("recipe", "algorithm", "student", "teacher", "layout", "nodes", "GiB of a GPU's 79.6", "status")
SEEN = {"quickstart": "run on CPU", "smoke": "run on CPU"}
"""Folders whose recipes were run, and where; all others are planned."""
NO_RECIPES = {"reproductions"}
"""Folders of experiments, which make their recipes."""
_OWN = "the student"


def main(words: Sequence[str] | None = None) -> int:
    """Write the table, or compare it."""
    parser = argparse.ArgumentParser(prog="python -m nemo_opd.planning.recipes_table", description="Table of recipes.")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--recipes", metavar="FOLDER", type=Path, default=RECIPES, help="default %(default)s")
    args = parser.parse_args(words)
    readme = args.recipes / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = with_table(before, table(args.recipes))
    if args.check:
        if before != after:
            sys.stderr.write(f"error: {readme}: its table is not that of the recipes; run this without --check\n")
        return int(before != after)
    readme.write_text(after, encoding="utf-8")
    return 0


def with_table(text: str, rows: str) -> str:
    """The text with another table between the two marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"got a text without {BEGIN.strip()} and {END.strip()}; expected both, on lines of their own")
    return f"{before}{BEGIN}{rows}{END}{after}"


def recipes(folder: Path) -> list[Path]:
    """All recipes, those of real pairs first."""
    found = [path for path in folder.glob("*/*.yaml") if path.parent.name not in NO_RECIPES]
    return sorted(found, key=lambda path: (path.parent.name in SEEN, path.parent.name == "papers", path))


def table(folder: Path) -> str:
    """The table in Markdown."""
    rows = [HEADS, ("---",) * len(HEADS), *(tuple(_row(folder, path)) for path in recipes(folder))]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(folder: Path, path: Path) -> Iterator[str]:
    status = SEEN.get(path.parent.name)
    name = path.relative_to(folder).as_posix()
    yield f"[`{name}`]({name})"
    if status is not None:
        config = load(path, checked=False)
        yield from (
            config.algorithm,
            _name(config.student.model),
            _teacher(config),
            _processes(config),
            "1",
            "-",
            status,
        )
        return
    config = read_recipe(path, ())
    found = plan(make_setting(config, Options()))
    nodes, peak = found.setting.nodes, found.worst.peak[1] / GIB
    yield from (config.algorithm, _name(config.student.model), _teacher(config), layout(found.setting), str(nodes))
    yield from (f"{peak:.1f}" + ("" if not found.problems else ", does not fit"), "planned")


def _name(model: str) -> str:
    return Path(model).name


def _teacher(config: Config) -> str:
    names = []
    for key, teacher in config.every_teacher().items():
        own = f"{_OWN}, {teacher.source}" if teacher.source != "external" else _name(str(teacher.model))
        if teacher.engine != "none":
            names.append(own if key == "teacher" else f"{key.removeprefix('teachers.')}: {own}")
    return "; ".join(names) or "none"


def _processes(config: Config) -> str:
    student = config.student
    sizes = {
        "TP": student.tensor_model_parallel_size,
        "CP": student.context_parallel_size,
        "PP": student.pipeline_model_parallel_size,
    }
    cut = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return f"student {cut}" if cut else "student whole"


if __name__ == "__main__":
    sys.exit(main())
