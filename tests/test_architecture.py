"""Imports point one way, the command line stays light, and rules of style and safety that matter are tests."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "nemo_opd"

NOUNS = {"types", "config", "errors", "foreign", "processes"}
"""What everybody may import: what flows, what is set, what goes wrong, whom not to trust, who takes part."""

SCORE = {"engines.protocols", "engines.requests", "engines.exchange", "vocab", "packing"}
GENERATE = {"engines.protocols", "engines.generation", "vocab", "refit.manifest", "refit.folder"}
"""What engines have in common that score, and that write."""

PRIVATE = {"reliability.files", "reliability.redact"}
"""How files are written that others may neither read nor redirect, without secrets."""

MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "config": set(),
    "errors": set(),
    "foreign": {"errors"},
    "processes": set(),
    "packing": {"types", "rollout.seeds"},
    "algorithms": {"config", "losses"},
    "configuration": {"algorithms", "config", "errors", "foreign", "reliability.redact"},
    "vocab": {"types", "errors"},
    "losses": {"vocab", *NOUNS},
    "engines.protocols": {"types"},
    "engines.requests": {"types"},
    "engines.exchange": set(),
    "engines.generation": {"types"},
    "engines.hf": {*GENERATE, *SCORE, *NOUNS},
    "engines.megatron": {*SCORE, "reliability.faults", *NOUNS},
    "engines.vllm": {
        *(*GENERATE, *SCORE, "reliability.child", "reliability.faults", *PRIVATE, *NOUNS),
    },
    "refit": {"engines.protocols", "reliability.faults", *NOUNS},
    "checkpoint": {"engines.protocols", "reliability.faults", *NOUNS},
    "reliability": NOUNS,
    "reliability.faults": set(),
    "prompts": NOUNS,
    "verify": NOUNS,
    "teacher": {"engines.protocols", "prompts", "rollout.seeds", *NOUNS},
    "rollout": {"engines.protocols", *NOUNS},
    "stop": {"engines.protocols", "rollout", "teacher.contexts", "vocab", *NOUNS},
    "observe": {*PRIVATE, *NOUNS},
    "diagnosis": NOUNS,
    "report": {"configuration", "reliability", *NOUNS},
    "evaluate": {"engines.protocols", "reliability", "rollout", "verify", *NOUNS},
    "planning": {"configuration", *NOUNS},
    "tasks": {"prompts", *NOUNS},
    "cluster": {"configuration", "reliability", *NOUNS},
    "doctor": {
        *("cluster.plan", "configuration", "engines.protocols", "engines.vllm.settings", "planning", "prompts"),
        *("reliability.budget", "rollout", *NOUNS),
    },
    "accounts": {"checkpoint", "reliability", "rollout", *NOUNS},
    "loop": {
        *("accounts", "engines.protocols", "checkpoint", "diagnosis", "evaluate", "losses", "observe", "packing"),
        *("prompts", "refit", "reliability", "rollout", "stop", "teacher", "verify", *NOUNS),
    },
}
"""Area -> the areas it may import besides itself. An area is a module or package below nemo_opd."""

PROGRAMS = {
    "assemble",
    "resume",
    "session",
    "worker",
    "launch",
    "cli",
    "export",
    "quickstart",
    "evaluate.command",
    "evaluate.signal_command",
    "report.command",
    "planning.command",
    "planning.recipes_table",
    "doctor.command",
    "doctor.measure",
    "doctor.worker",
    "cluster.prepare",
    "cluster.name",
    "cluster.node",
    "cluster.serve",
    "cluster.announce",
}
"""Programs that put the areas together: they import what they like, and no area imports them."""

LIGHT = ("config", "errors", "foreign", "algorithms", "configuration", "cli", "launch", "worker", "reliability.outcome",
         "reliability.lock", "reliability.files", "reliability.redact", "reliability.watchdog", "reliability.requeue",
         "report", "doctor.bounds", "planning", "cluster.plan", "cluster.prepare", "cluster.name",
         "cluster.node", "cluster.announce")  # fmt: skip
"""Read before a run starts, so they import nothing heavy."""
HEAVY = {"torch", "nemo", "megatron", "transformers", "vllm", "datasets", "pyarrow", "numpy", "tensorboard"}

ONLY_IN = {"megatron": "engines.megatron", "vllm": "engines.vllm", "nemo": "losses"}
"""Outside packages that one area alone may import."""

MAY_UNPICKLE = "engines.megatron.restricted"
"""Megatron's checkpoints have pickles in them: this module reads them on a machine that cannot call anything."""

FUNCTION_LINES = 60
FILE_LINES = 450
LONG_BY_NATURE = {"config"}
"""The schema is one file, so that every default is found in one place."""


@dataclass(frozen=True)
class Module:
    """One file of the package, parsed."""

    name: str
    """Below the package: ``engines.hf.generator``; a package's own file has the package's name."""
    path: Path
    tree: ast.Module
    lines: tuple[str, ...]

    @functools.cached_property
    def imports(self) -> set[str]:
        """Full names of what it imports anywhere, except for type checkers only."""
        return set(_imports(self.tree, PACKAGE, anywhere=True))

    @functools.cached_property
    def imports_at_once(self) -> set[str]:
        """Full names of what it imports as soon as it is imported itself."""
        return set(_imports(self.tree, PACKAGE, anywhere=False))


def _imports(node: ast.AST, package: str, *, anywhere: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        elif anywhere or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _imports(child, package, anywhere=anywhere)


@functools.cache
def modules() -> dict[str, Module]:
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        text = path.read_text()
        found[name] = Module(name, path, ast.parse(text), tuple(text.splitlines()))
    return found


def ours(names: set[str]) -> set[str]:
    """The modules of this package among full names of imported things (``nemo_opd.types.Prompt`` -> ``types``)."""
    found = set()
    for name in names:
        if not name.startswith(f"{PACKAGE}."):
            continue
        inner = name.removeprefix(f"{PACKAGE}.")
        while inner and inner not in modules():
            inner = inner.rpartition(".")[0]
        found.add(inner or "__init__")
    return found


def area(name: str) -> str:
    """The longest key of MAY_IMPORT or PROGRAMS that the module is in; itself where there is none."""
    keys = [key for key in (*MAY_IMPORT, *PROGRAMS) if name == key or name.startswith(f"{key}.")]
    return max(keys, key=len, default=name)


def allowed(importer: str, imported: str) -> bool:
    into = {area(importer), *MAY_IMPORT[area(importer)]}
    return any(imported == key or imported.startswith(f"{key}.") for key in into) and area(imported) not in PROGRAMS


def reached(name: str) -> dict[str, str]:
    """Modules that importing `name` imports at once, directly or not, each with the one that asks for it."""
    reason, waiting = {name: ""}, [name]
    while waiting:
        current = waiting.pop()
        packages = {current.rpartition(".")[0]} - {""}
        for imported in ours(modules()[current].imports_at_once) | packages:
            if imported not in reason and imported in modules():
                reason[imported] = current
                waiting.append(imported)
    return reason


def test_every_module_has_a_place() -> None:
    homeless = [name for name in modules() if area(name) not in {*MAY_IMPORT, *PROGRAMS, "__init__", "engines"}]
    assert homeless == [], "add the area to MAY_IMPORT with the arrows it needs, or to PROGRAMS"


def test_imports_point_one_way() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name, module in modules().items()
        if area(name) in MAY_IMPORT
        for imported in sorted(ours(module.imports))
        if imported != "__init__" and not allowed(name, imported)
    ]
    assert wrong == []


def test_no_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path[path.index(name) :], name))
        if name not in done:
            for imported in ours(modules()[name].imports_at_once) - {name, "__init__"}:
                inside = imported.startswith(f"{name}.") or name.startswith(f"{imported}.")  # a package's own list
                if not inside:
                    visit(imported, (*path, name))
            done.add(name)

    for name in modules():
        visit(name, ())


def test_the_loop_reaches_no_engine() -> None:
    reason = reached("loop")
    engines = [f"{name} (from {reason[name]})" for name in reason if re.match(r"engines\.(?!protocols)", name)]
    assert engines == []


@pytest.mark.parametrize("package", ONLY_IN)
def test_one_area_alone_imports(package: str) -> None:
    importers = [
        name
        for name, module in modules().items()
        if any(imported.partition(".")[0] == package for imported in module.imports) and area(name) != ONLY_IN[package]
    ]
    assert importers == []


@pytest.mark.parametrize("name", LIGHT)
def test_what_runs_before_a_run_reaches_nothing_heavy(name: str) -> None:
    members = [module for module in modules() if module == name or module.startswith(f"{name}.")]
    assert members
    for member in members:
        for reached_name, asker in reached(member).items():
            heavy = {imported.partition(".")[0] for imported in modules()[reached_name].imports_at_once} & HEAVY
            assert heavy == set(), f"{member} reaches {reached_name} (from {asker}), which imports {heavy}"


def test_nothing_heavy_is_really_imported() -> None:
    """The same, asked of the interpreter: also what our light dependencies bring along."""
    names = [
        f"{PACKAGE}.{module}" for module in modules() if any(module == n or module.startswith(f"{n}.") for n in LIGHT)
    ]
    code = f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\n"
    code += f"heavy = sorted({HEAVY!r} & set(sys.modules))\nsys.exit(', '.join(heavy) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def calls(module: Module) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the dotted name of what is called (``""`` for anything else than a name)."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            parts, function = [], node.func
            while isinstance(function, ast.Attribute):
                parts.append(function.attr)
                function = function.value
            yield ".".join(reversed([*parts, function.id])) if isinstance(function, ast.Name) else "", node


def offences(module: Module) -> Iterator[str]:
    """Lines that no module of the package may have."""
    unsafe = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    for imported in module.imports:
        if imported.partition(".")[0] in unsafe and (imported, module.name) != ("pickle", MAY_UNPICKLE):
            yield f"imports {imported}"
    for called, node in calls(module):
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        where = f"line {node.lineno}: "
        if called in {"print", "eval", "exec", "compile", "os.system", "os.popen", "breakpoint", "__import__"}:
            yield f"{where}{called}"
        if called in {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}:
            yield f"{where}{called}: read through nemo_opd.configuration.strict_yaml"
        if called.startswith("pickle.") and called.removeprefix("pickle.") in {"load", "loads", "Unpickler"}:
            yield f"{where}{called}"
        if called == "torch.load" and not _is(keywords.get("weights_only"), True):
            yield f"{where}torch.load without weights_only=True"
        for name in ("shell", "trust_remote_code", "allow_pickle"):
            if name in keywords and not _is(keywords[name], False):
                yield f"{where}{name} that may be true"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield f"line {node.lineno}: bare except"
            elif _is_broad(node) and "#" not in module.lines[node.lineno - 1]:
                yield f"line {node.lineno}: a broad except without its reason beside it"


def _is_broad(handler: ast.ExceptHandler) -> bool:
    """Does it swallow everything? One that ends in `raise` swallows nothing."""
    last = handler.body[-1]
    passes_on = isinstance(last, ast.Raise) and last.exc is None
    return bool(re.search(r"\b(Base)?Exception\b", ast.unparse(handler.type or handler))) and not passes_on


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_module_prints_evaluates_or_unpickles() -> None:
    assert [
        f"{module.path.relative_to(ROOT)}: {offence}" for module in modules().values() for offence in offences(module)
    ] == []


@pytest.mark.parametrize(
    "line",
    [
        "print('x')",
        "eval('1')",
        "import pickle",
        "pickle.loads(data)",
        "from torch import nn; import dill as d",
        "def f():\n    import marshal",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "yaml.load('x', Loader)",
        "try:\n    x()\nexcept:\n    pass",
        "try:\n    x()\nexcept Exception:\n    pass",
        "try:\n    x()\nexcept (ValueError, BaseException) as error:\n    pass",
        "os.system('ls')",
    ],
)
def test_the_rules_can_be_broken(line: str) -> None:
    assert list(offences(Module("x", Path("x.py"), ast.parse(line), tuple(line.splitlines()))))


@pytest.mark.parametrize(
    "line",
    [
        "model.eval()",
        "re.compile('x')",
        "torch.load('x', weights_only=True)",
        "subprocess.run(['ls'], shell=False)",
        "try:\n    x()\nexcept BaseException:\n    close()\n    raise",
        "try:\n    x()\nexcept Exception:  # a plug-in's error is logged, whatever it is\n    pass",
    ],
)
def test_the_rules_let_pass(line: str) -> None:
    assert not list(offences(Module("x", Path("x.py"), ast.parse(line), tuple(line.splitlines()))))


def test_a_public_module_class_and_function_says_what_it_is() -> None:
    silent = []
    for module in modules().values():
        if module.lines and not ast.get_docstring(module.tree):
            silent.append(str(module.path.relative_to(ROOT)))
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                silent.append(f"{module.path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert silent == []


def test_functions_fit_on_a_screen_and_a_file_has_one_subject() -> None:
    """A smell, not a law: where more is right, raise the limit and say why."""
    long = []
    for module in modules().values():
        if len(module.lines) > FILE_LINES and module.name not in LONG_BY_NATURE:
            long.append(f"{module.path.relative_to(ROOT)}: {len(module.lines)} lines")
        for node in ast.walk(module.tree):
            if (
                isinstance(node, ast.FunctionDef)
                and (length := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES
            ):
                long.append(f"{module.path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines")
    assert long == []
