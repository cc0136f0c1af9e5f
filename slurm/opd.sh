#!/usr/bin/env bash
#SBATCH --job-name=opd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#
# sbatch [sbatch options] slurm/opd.sh RECIPE [key=value ...]
#
# Starts the run's processes on the nodes of the job, one step per role, asks them to save when SLURM wants the nodes
# back, and puts the job into the queue again where outcome.json says so. slurm/README.md is the manual.
set -euo pipefail

usage() {
    cat <<'EOT'
usage: sbatch [sbatch options] slurm/opd.sh RECIPE [key=value ...]
       slurm/submit.sh [sbatch options] RECIPE [key=value ...]        one job of a run at a time

  sbatch --nodes=2 --gpus-per-node=8 --time=4:00:00 slurm/opd.sh recipes/x.yaml run.dir=runs/x train.steps=200

Call it in the project's folder: paths are relative to where sbatch was called. Containers, interpreter and fabric are
set in slurm/env.sh. The recipe is checked before anything starts; the job ends with 2 when it cannot work.

  scancel --signal=USR1 --batch JOB      save, stop, and go on in the queue
  scancel --signal=USR2 --batch JOB      save and stop
  scancel JOB                            stop; what SLURM's KillWait leaves time for is saved
EOT
}

# A file, since no signal reaches torchrun's workers safely. It names the attempt: the next one must not obey it.
request_stop() {
    if [[ -z $run_dir ]]; then return; fi # not known yet: asked for again when it is
    (
        umask 077
        mkdir -p -- "$run_dir/control"
        printf '%s\n' "$attempt" >"$run_dir/control/stop-$attempt.tmp"
        mv -f -- "$run_dir/control/stop-$attempt.tmp" "$run_dir/control/stop"
    )
}

on_signal() {
    say "signal $1: asking $attempt to save and stop"
    if [[ $asked != USR2 ]]; then asked=$1; fi
    request_stop
}

conclude() {
    local verdict status=0
    local -a why=()
    if [[ -s $job/failed ]]; then why=("$(<"$job/failed")"); fi
    rm -rf -- "$job"
    trap '' USR1 USR2 TERM
    verdict=$(tool -m nemo_opd.reliability.requeue "$run_dir" "$attempt" "$starts" "${why[@]}") || status=$?
    case $verdict in
        requeue)
            if [[ $asked == USR2 ]]; then
                say "stopped as asked; submit the run again to go on"
                exit 75
            fi
            requeue || { say "SLURM did not requeue the job; submit the run again to go on"; exit 75; }
            ;;
        stop) exit "$status" ;;
        *) exit 70 ;;
    esac
}

main() {
    if (($# == 0)); then
        usage >&2
        printf 'error: RECIPE: got nothing; expected a recipe; name one, for example recipes/quickstart/distil.yaml\n' >&2
        exit 2
    fi
    if [[ $1 == -h || $1 == --help ]]; then
        usage
        exit 0
    fi
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        printf 'error: SLURM_JOB_ID: got nothing; expected a SLURM job; run: sbatch slurm/opd.sh RECIPE\n' >&2
        exit 2
    fi
    # sbatch runs a copy of this file from its spool folder, so nothing is found relative to the file itself.
    cd "$SLURM_SUBMIT_DIR"
    if [[ ! -f slurm/steps.sh ]]; then
        printf 'error: folder: got %s, without slurm/steps.sh; expected the project'\''s; call sbatch there\n' "$PWD" >&2
        exit 2
    fi
    # shellcheck source=slurm/steps.sh
    source slurm/steps.sh

    asked='' run_dir='' server_pid=()
    trap 'on_signal USR1' USR1
    trap 'on_signal USR2' USR2
    trap 'on_signal TERM' TERM
    read_job
    prepare -- "$@"
    case ${answer[0]} in
        done) exit 0 ;;
        held) exit 70 ;;
    esac
    run_dir=${answer[1]} plan=${answer[2]} starts=${answer[3]} job=${answer[2]%/plan.json}
    if [[ -n $asked ]]; then request_stop; fi

    # A script that waits for a foreground command hears its signals only afterwards: steps are in the background.
    say "$attempt: $run_dir on ${answer[*]:4}; logs in $run_dir/logs"
    start_servers "${answer[@]:7}"
    start_step "${answer[@]:4:3}"
    local trainer=$!
    while alive "$trainer"; do
        pause
        watch_servers
    done
    end_servers
    conclude
}

main "$@"
