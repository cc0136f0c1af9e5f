# shellcheck shell=bash disable=SC2034
# The only site-specific file: the scripts source it on the first node of a job. Everything here is a bash array or a
# plain variable; words with spaces stay whole.

# How a process finds Python with nemo_opd installed, relative to the folder in which sbatch was called.
python=(.venv/bin/python)

# Container options of pyxis, handed to every step as they are. Empty: no container. In a container also set python, for
# example python=(python3).
#   container=(--container-image=/images/opd.sqsh "--container-mounts=$SLURM_SUBMIT_DIR,/data" \
#              "--container-workdir=$SLURM_SUBMIT_DIR")
container=()

# Where python runs in the container only: how slurm/submit.sh, outside of it, finds one with nemo_opd.
submit_python=(.venv/bin/python)

# More options for srun, for example (--mpi=none --network=...).
srun_options=()

# Trainer processes per node. Empty: one per GPU of the job, or one where the job has no GPUs.
processes_per_node=

# Seconds between the signal to stop and the end of the job. slurm/submit.sh hands it to sbatch; with sbatch itself say
# --signal=B:USR1@SECONDS as well where it is not 180.
grace=180

# Environment of every process: the fabric's settings belong here, for example
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
