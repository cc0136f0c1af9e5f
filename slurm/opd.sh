#!/usr/bin/env bash
#SBATCH --job-name=opd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#
# sbatch [sbatch options] slurm/opd.sh RECIPE [key=value ...]
#
# Runs torchrun once per node. SLURM's variables give the rendezvous, slurm/env.sh the site's container and fabric.
# Every word reaches the processes as it was typed: arrays throughout, nothing is evaluated twice.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: sbatch [sbatch options] slurm/opd.sh RECIPE [key=value ...]

  sbatch --nodes=2 --gpus-per-node=8 --time=4:00:00 slurm/opd.sh recipes/x.yaml run.dir=runs/x train.steps=200

Call it in the project's folder: paths are relative to where sbatch was called. Containers, interpreter and fabric are
set in slurm/env.sh. The recipe is checked before anything starts; the job ends with 2 when it cannot work.
EOF
}

fail() { # KEY GOT EXPECTED WAY_OUT, in the words of nemo-opd
    printf 'error: %s: got %s; expected %s; %s\n' "$@" >&2
    exit 2
}

# What each node runs so many of: the site's choice, else one per GPU of the job, else one.
count_processes_per_node() {
    local gpus=${processes_per_node:-${SLURM_GPUS_ON_NODE:-1}}
    [[ $gpus =~ ^[1-9][0-9]*$ ]] || fail processes_per_node "$gpus" "a whole number" "set it in slurm/env.sh"
    printf '%s' "$gpus"
}

# Address of the first node. NodeAddr is what SLURM itself connects to; a node's name need not resolve.
head_address() {
    local hosts line
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    line=$(scontrol show node --oneliner "${hosts[0]}")
    if [[ $line =~ [[:space:]]NodeAddr=([^[:space:]]+) ]]; then
        printf '%s' "${BASH_REMATCH[1]}"
    else
        printf '%s' "${hosts[0]}"
    fi
}

main() {
    if (($# == 0)); then
        usage >&2
        fail RECIPE nothing "a recipe" "name one, for example recipes/quickstart/distil.yaml"
    fi
    if [[ $1 == -h || $1 == --help ]]; then
        usage
        exit 0
    fi
    [[ -n ${SLURM_JOB_ID:-} ]] || fail SLURM_JOB_ID nothing "a SLURM job" "run: sbatch slurm/opd.sh RECIPE"

    # sbatch runs a copy of this file from its spool folder, so nothing is found relative to the file itself.
    cd "$SLURM_SUBMIT_DIR"
    local -a python=(.venv/bin/python) container=() srun_options=()
    local processes_per_node=
    if [[ -f slurm/env.sh ]]; then
        # shellcheck source=slurm/env.sh
        source slurm/env.sh
    fi

    local nodes=$SLURM_JOB_NUM_NODES per_node address world port
    per_node=$(count_processes_per_node)
    address=$(head_address)
    world=$((nodes * per_node))
    port=$((20000 + SLURM_JOB_ID % 12000)) # below the ports that the kernel gives out by itself
    export NEMO_OPD_ATTEMPT="slurm-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE > per_node ? SLURM_CPUS_ON_NODE / per_node : 1))}"
    unset MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK # left over from the shell that called sbatch

    local -a check=("${python[@]}" -m nemo_opd.cli train --check "$@" "train.processes=$world")
    if ((${#container[@]})); then
        check=(srun --nodes=1 --ntasks=1 "${srun_options[@]}" "${container[@]}" "${check[@]}")
    fi
    "${check[@]}" >/dev/null # its message says what to change; `set -e` ends the job with its exit code

    # A task may use only as many cores as it asks for, and torchrun's processes all live in one task.
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
        --kill-on-bad-exit=1 "${srun_options[@]}" "${container[@]}" \
        "${python[@]}" -m torch.distributed.run \
        --nnodes="$nodes" --nproc-per-node="$per_node" \
        --rdzv-backend=c10d --rdzv-endpoint="$address:$port" --rdzv-id="$NEMO_OPD_ATTEMPT" \
        -m nemo_opd.cli train "$@"
}

main "$@"
