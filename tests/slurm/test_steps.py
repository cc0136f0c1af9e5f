"""The words of slurm/steps.sh in a heterogeneous job, with a shell in the place of a trainer and of servers."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.site import ROOT, SECONDS, Site, wait_for_job

JOB = """\
#!/bin/bash
#SBATCH --requeue --open-mode=append
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/steps.sh
asked='' plan=PLAN
read_job
printf '%s\\n' "${components[*]}, $(( NEMO_OPD_END_TIME - $(date +%s) > 500 ))"
start_step rollout 1 n2
start_step trainer 0 n1
wait
if ((${SLURM_RESTART_COUNT:-0} == 0)); then
    trap '' TERM
    requeue
fi
"""


DOCTOR = """\
import json, sys
from pathlib import Path
from nemo_opd.configuration.load import load
from nemo_opd.doctor.slurm import slurm_findings
for row in slurm_findings(load(Path("recipe.yaml"), sys.argv[1:])):
    sys.stdout.write(row.to_json() + chr(10))
"""


@pytest.mark.parametrize(
    ("overrides", "options", "wrong"),
    [
        ((), (), {}),
        (
            ("student.tensor_model_parallel_size=4",),
            ("--no-requeue",),
            {"slurm: nodes and processes: train.processes": "fail", "slurm: requeue": "warn"},
        ),
    ],
    ids=["fits", "does not"],
)
def test_what_the_preflight_finds_in_a_job(
    site: Site, cluster: Cluster, tmp_path: Path, overrides: tuple[str, ...], options: tuple[str, ...], wrong: Any
) -> None:
    (tmp_path / "look.py").write_text(DOCTOR)
    export = f"export PYTHONPATH={shlex.quote(str(ROOT))}"
    command = shlex.join([sys.executable, str(tmp_path / "look.py"), *overrides])
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\n{export}\n{command} > {shlex.quote(str(tmp_path / 'rows'))}\n")
    given = ["--parsable", "--time=10", "--nodes=2", "--output=/dev/null", "--requeue", *options]
    job = cluster.call("sbatch", *given, str(tmp_path / "job.sh"), cwd=site.folder).partition(";")[0]
    wait_for_job(cluster, job, "COMPLETED", restarts=0, seconds=SECONDS, explain=cluster.logs)
    rows = {row["name"]: row for row in map(json.loads, (tmp_path / "rows").read_text().splitlines())}
    assert {name: row["verdict"] for name, row in rows.items() if row["verdict"] != "ok"} == wrong
    assert len(rows) == 4 and rows["slurm: end of the job"]["found"] == "limit 00:10:00"
    assert rows["slurm: last save, s"]["bound"] == "at most 60"
    assert wrong or rows["slurm: nodes and processes"]["found"] == "2 x 1 = 2"


def test_roles_of_a_heterogeneous_job_which_is_requeued_as_a_whole(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    shutil.copy(ROOT / "slurm" / "steps.sh", tmp_path / "slurm")
    (tmp_path / "slurm" / "env.sh").write_text("python=(bash fake.sh)\n")
    (tmp_path / "fake.sh").write_text('printf "%s\\n" "$* on $SLURMD_NODENAME: $NEMO_OPD_ATTEMPT"\n')
    (tmp_path / "job.sh").write_text(JOB)
    component = ["--nodes=1", "--ntasks-per-node=1"]
    options = ["--parsable", "--time=10", "--output=out", *component, ":", *component]
    job = cluster.call("sbatch", *options, "job.sh", cwd=tmp_path).partition(";")[0]
    wait_for_job(cluster, job, "COMPLETED", restarts=1, seconds=SECONDS, explain=lambda: (tmp_path / "out").read_text())
    said = [line for line in (tmp_path / "out").read_text().splitlines() if not line.startswith("slurmstepd")]
    assert sorted(said) == sorted(
        [
            *["n1=127.0.0.1 n2=127.0.0.1, 1"] * 2,
            *(f"-m nemo_opd.cluster.node PLAN trainer on n1: slurm-{job}-{number}" for number in range(2)),
            *(f"-m nemo_opd.cluster.node PLAN rollout on n2: slurm-{job}-{number}" for number in range(2)),
        ]
    )
