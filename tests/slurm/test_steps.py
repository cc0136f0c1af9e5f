"""The words of slurm/steps.sh in a heterogeneous job, with a shell in the place of a trainer and of servers."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.site import ROOT, SECONDS, wait_for_job

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
