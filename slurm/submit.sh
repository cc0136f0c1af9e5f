#!/usr/bin/env bash
# slurm/submit.sh [--jobs=N] [sbatch options] RECIPE [key=value ...]
#
# sbatch slurm/opd.sh, with a job name that belongs to the run folder and `singleton`: of all jobs of a run one runs at a
# time. --jobs=N submits N of them, for a run that is longer than a job may be; those left over when it is done end at
# once. Options of sbatch come first, each in one word (--time=4:00:00).
set -euo pipefail

main() {
    local jobs=1 grace=180 name number
    local -a python=(.venv/bin/python) container=() srun_options=() submit_python=(.venv/bin/python) options=()
    while (($#)) && [[ $1 == -* || $1 == : ]]; do
        case $1 in
            -h | --help)
                sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
                exit 0
                ;;
            --jobs=*) jobs=${1#--jobs=} ;;
            *) options+=("$1") ;;
        esac
        shift
    done
    if (($# == 0)) || [[ ! $jobs =~ ^[1-9][0-9]*$ ]] || [[ ! -f slurm/opd.sh ]]; then
        printf 'usage, in the project'\''s folder: slurm/submit.sh [--jobs=N] [sbatch options] RECIPE [key=value ...]\n' >&2
        exit 2
    fi
    if [[ -f slurm/env.sh ]]; then
        # shellcheck source=slurm/env.sh
        source slurm/env.sh
    fi
    if ((${#container[@]})); then # not started for this
        python=("${submit_python[@]}")
    fi
    name=$("${python[@]}" -m nemo_opd.cluster.name "$@")
    for ((number = 0; number < jobs; number++)); do
        sbatch --job-name="$name" --dependency=singleton --signal="B:USR1@$grace" "${options[@]}" slurm/opd.sh "$@"
    done
}

main "$@"
