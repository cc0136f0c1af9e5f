#!/usr/bin/env bash
#SBATCH --job-name=opd-teacher
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#
# sbatch [sbatch options] slurm/teacher.sh FOLDER RECIPE [key=value ...]
#
# The recipe's teachers on servers that outlive its runs, on all nodes of the job. Once they listen, FOLDER/settings holds
# the overrides with which runs find them, one per line; FOLDER/key is what their requests carry.
set -euo pipefail

on_signal() {
    say "signal $1: the servers end"
    asked=$1
}

main() {
    if (($# < 2)) || [[ -z ${SLURM_JOB_ID:-} ]]; then
        printf 'usage: sbatch [sbatch options] slurm/teacher.sh FOLDER RECIPE [key=value ...]\n' >&2
        exit 2
    fi
    cd "$SLURM_SUBMIT_DIR"
    # shellcheck source=slurm/steps.sh
    source slurm/steps.sh
    local folder=$1
    shift

    asked='' server_pid=()
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
    read_job
    prepare --service -- "$@" "run.dir=$folder"
    run_dir=${answer[1]} plan=${answer[2]} job=${answer[2]%/plan.json}
    start_servers "${answer[@]:4}"
    tool -m nemo_opd.cluster.announce "$plan" &
    while ((${#server_pid[@]})) && [[ -z $asked ]]; do
        pause
        watch_servers
    done
    rm -f -- "$run_dir/settings"
    end_servers
    rm -rf -- "$job"
    trap '' USR1 TERM
    case $asked in
        USR1) requeue ;; # the time is over: it stands again, on other nodes perhaps, when SLURM has some
        TERM) exit 0 ;;
        *) exit 70 ;;
    esac
}

main "$@"
