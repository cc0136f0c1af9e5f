"""A project folder from which runs are submitted, and what became of them."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.workspace import make_workspace
from tests.slurm.cluster import Cluster, until

ROOT = Path(__file__).parents[2]
STEPS = 6
SECONDS = 420.0
"""In which one attempt of a run must have come to where a test waits for it, on two cores that do other things too."""
SLOW_STEPS = "step.trained=sleep:1"
"""So that a signal arrives before the last step."""

RECIPE = f"""\
run: {{dir: runs/unnamed}}
student: {{model: student, dtype: float32}}
teacher: {{model: teacher, dtype: float32, pipeline_model_parallel_size: 2}}
data: {{path: train.jsonl, max_prompt_tokens: 96}}
rollout: {{max_new_tokens: 12, samples_per_prompt: 2}}
optimizer: {{lr: 1.0e-3}}
train: {{steps: {STEPS}, prompts_per_step: 4, micro_batch_tokens: 256}}
checkpoint: {{every: 2}}
observe: {{tensorboard: false, progress: false}}
"""


class Site:
    """``slurm/`` as it is, but for what a site sets in ``env.sh``, beside data and models."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        make_workspace(folder, head_dim=32)
        shutil.copytree(ROOT / "slurm", folder / "slurm")
        (folder / "slurm" / "env.sh").write_text(
            f"python=({sys.executable!r})\nsubmit_python=({sys.executable!r})\ncontainer=() srun_options=()\n"
            f"processes_per_node= grace=60\nexport PYTHONPATH={str(ROOT)!r} GLOO_SOCKET_IFNAME=lo\n"
        )
        (folder / "recipe.yaml").write_text(RECIPE)
        self._outputs = folder.parent / "outputs"
        self._outputs.mkdir()

    def run(self, name: str) -> Run:
        return Run(self, self.folder / "runs" / name)

    def submit(self, run: Run, *overrides: str, options: tuple[str, ...] = (), faults: str = "") -> str:
        """Submit a run over two nodes with plain sbatch; returns the job's number."""
        words = ["sbatch", "--parsable", f"--output={self._outputs}/%j", "--nodes=2", *options, "slurm/opd.sh"]
        settings = ["recipe.yaml", f"run.dir={run.folder.relative_to(self.folder)}", *overrides]
        environment = {"NEMO_OPD_FAULTS": faults} if faults else {}
        return self.cluster.call(*words, *settings, cwd=self.folder, **environment).partition(";")[0]

    def output(self, job: str) -> str:
        """What the batch script said, in all attempts."""
        path = self._outputs / job
        return path.read_text() if path.exists() else ""

    def wait(self, job: str, state: str, restarts: int = 0, seconds: float = SECONDS) -> dict[str, str]:
        """Until the job is in that state after so many restarts; returns what SLURM says of it."""
        return wait_for_job(self.cluster, job, state, restarts, seconds, lambda: self.explain(job))

    def explain(self, job: str) -> str:
        logs = sorted((self.folder / "runs").glob("*/logs/*.txt"), key=lambda path: path.stat().st_mtime)[-3:]
        parts = [str(self.cluster.job(job)), self.output(job), *(f"{p}:\n{p.read_text()[-3000:]}" for p in logs)]
        return "\n".join([*parts, self.cluster.logs()])


class Run:
    """A run folder."""

    def __init__(self, site: Site, folder: Path) -> None:
        self.site, self.folder = site, folder

    @property
    def steps(self) -> list[int]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("\n")]

    @property
    def outcome(self) -> dict[str, Any]:
        path = self.folder / "outcome.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("*"))

    @property
    def digest(self) -> str:
        """Of the trained student's weights."""
        return hashlib.sha256((self.folder / "model" / "model.safetensors").read_bytes()).hexdigest()

    def wait_for_step(self, step: int, job: str) -> None:
        """Until that step has been trained."""
        until(lambda: step in self.steps, SECONDS, f"step {step}", lambda: self.site.explain(job))


def wait_for_job(
    cluster: Cluster, job: str, state: str, restarts: int, seconds: float, explain: Callable[[], str]
) -> dict[str, str]:
    """See `Site.wait`."""

    def there() -> bool:
        found = cluster.job(job)
        return found["JobState"] == state and int(found["Restarts"]) >= restarts

    until(there, seconds, f"job that is {state} after {restarts} restarts", explain)
    return cluster.job(job)
