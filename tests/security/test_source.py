"""S1: what the package's own source may not contain, beyond the rules of tests/test_architecture.py."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_architecture import Module, calls, modules, offences

FETCHES = {"load_dataset", "snapshot_download", "hf_hub_download", "urlretrieve", "urlopen"}
"""Calls that would bring something from elsewhere, as code or as data without a revision."""
LOADERS = ("from_pretrained", "from_config")
RUNS = {"getoutput", "getstatusoutput", "create_subprocess_shell", "spawnl", "execl", "run_module", "run_path"}


def more_offences(module: Module) -> Iterator[str]:
    for called, node in calls(module):
        last, keywords = called.rpartition(".")[2], {keyword.arg: keyword.value for keyword in node.keywords}
        where = f"line {node.lineno}: {called}"
        if last in FETCHES | RUNS or called in ("torch.hub.load", "yaml.load_all", "numpy.load", "np.load"):
            yield where
        if last in LOADERS and called.startswith("Auto"):
            trust = keywords.get("trust_remote_code")
            if not (isinstance(trust, ast.Constant) and trust.value is False):
                yield f"{where} without trust_remote_code=False"
            if last == "from_pretrained" and "local_files_only" not in keywords:
                yield f"{where} without local_files_only=True"
            if called.startswith("AutoModel") and last == "from_pretrained" and "use_safetensors" not in keywords:
                yield f"{where} without use_safetensors=True"


def test_the_package_has_none() -> None:
    found = [
        f"{module.name}: {offence}"
        for module in modules().values()
        for offence in (*offences(module), *more_offences(module))
    ]
    assert found == []
    sys.stdout.write(f"S1: {len(modules())} modules, hits 0\n")


@pytest.mark.parametrize(
    "line",
    [
        "datasets.load_dataset('x')",
        "snapshot_download('x')",
        "torch.hub.load('x', 'y')",
        "subprocess.getoutput('ls')",
        "AutoConfig.from_pretrained('x', local_files_only=True)",
        "AutoConfig.from_pretrained('x', local_files_only=True, trust_remote_code=flag)",
        "AutoTokenizer.from_pretrained('x', trust_remote_code=False)",
        "AutoModelForCausalLM.from_pretrained('x', trust_remote_code=False, local_files_only=True)",
        "AutoModelForCausalLM.from_config(c)",
        "runpy.run_path('x')",
    ],
)
def test_the_rules_can_be_broken(line: str) -> None:
    assert list(more_offences(Module("x", Path("x.py"), ast.parse(line), (line,))))
