# shellcheck shell=bash
# What opd.sh and teacher.sh have in common. Arrays throughout: no word is evaluated twice.

fail() { # KEY GOT EXPECTED WAY_OUT, in the words of nemo-opd
    printf 'error: %s: got %s; expected %s; %s\n' "$@" >&2
    exit 2
}

say() { printf '%s %s\n' "$(date +%FT%T)" "$*" >&2; }

# Settings of the site, and what SLURM says of this job: attempt, port, components, cpus, per_node.
read_job() {
    python=(.venv/bin/python) container=() srun_options=()
    processes_per_node='' grace=180
    if [[ -f slurm/env.sh ]]; then
        # shellcheck source=slurm/env.sh
        source slurm/env.sh
    fi
    attempt=slurm-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    port=$((20000 + SLURM_JOB_ID % 12000)) # below the ports that the kernel gives out by itself
    per_node=$(count_processes_per_node)
    components=() cpus=()
    if [[ -n ${SLURM_HET_SIZE:-} ]]; then
        local number list share
        for ((number = 0; number < SLURM_HET_SIZE; number++)); do
            list=SLURM_JOB_NODELIST_HET_GROUP_$number share=SLURM_JOB_CPUS_PER_NODE_HET_GROUP_$number
            components+=("$(addresses "${!list}")")
            cpus+=("$(least "${!share:-$SLURM_CPUS_ON_NODE}")")
        done
    else
        components=("$(addresses "$SLURM_JOB_NODELIST")")
        cpus=("$(least "${SLURM_JOB_CPUS_PER_NODE:-$SLURM_CPUS_ON_NODE}")")
    fi
    export NEMO_OPD_ATTEMPT=$attempt NEMO_OPD_GRACE=$grace
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cpus[0] > per_node ? cpus[0] / per_node : 1))}"
    local end
    if end=$(end_time); then export NEMO_OPD_END_TIME=$end; fi
    unset MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK # left over from the shell that called sbatch
}

# What each node runs so many of: the site's choice, else one per GPU of the job, else one.
count_processes_per_node() {
    local gpus=${processes_per_node:-${SLURM_GPUS_ON_NODE:-1}}
    [[ $gpus =~ ^[1-9][0-9]*$ ]] || fail processes_per_node "$gpus" "a whole number" "set it in slurm/env.sh"
    printf '%s' "$gpus"
}

# NODE=ADDRESS,... of a list of nodes. NodeAddr is what SLURM itself connects to; a node's name need not resolve.
addresses() {
    local line found=
    while IFS= read -r line; do
        [[ $line =~ ^NodeName=([^[:space:]]+) ]] || continue
        found+=,${BASH_REMATCH[1]}=
        if [[ $line =~ [[:space:]]NodeAddr=([^[:space:]]+) ]]; then found+=${BASH_REMATCH[1]}; else found+=${BASH_REMATCH[1]}; fi
    done < <(scontrol show node --oneliner "$1")
    printf '%s' "${found#,}"
}

# The least number of "8(x2),4": a step gives all its tasks the same number of cores.
least() {
    local part number least=
    local -a parts
    IFS=, read -ra parts <<<"$1"
    for part in "${parts[@]}"; do
        number=${part%%(*}
        [[ -z $least || $number -lt $least ]] && least=$number
    done
    printf '%s' "$least"
}

# When SLURM kills the job, in seconds since 1970; fails where the job has no limit.
end_time() {
    local text
    text=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e 2>/dev/null) || return 1
    date --date="${text%%$'\n'*}" +%s 2>/dev/null
}

# Python in the container where there is one, on the first node, beside steps that run there.
tool() {
    local -a command=("${python[@]}" "$@")
    if ((${#container[@]})); then
        command=(srun --nodes=1 --ntasks=1 --overlap "${srun_options[@]}" "${container[@]}" "${command[@]}")
    fi
    "${command[@]}"
}

# Asks what this job is to do. The answer is in the array `answer`; ends the job where the recipe cannot work.
prepare() { # [--service] -- RECIPE [key=value ...]
    local -a parts=()
    local part file
    for part in "${components[@]}"; do parts+=(--component "$part"); done
    file=$(mktemp)
    tool -m nemo_opd.cluster.prepare --attempt "$attempt" --port "$port" --per-node "$per_node" "${parts[@]}" "$@" \
        >"$file" || { status=$?; rm -f "$file"; exit "$status"; } # its message says what to change
    mapfile -d '' -t answer <"$file"
    rm -f "$file"
}

# Starts a step of one task per node in the background; its process is `$!`.
start_step() { # ROLE COMPONENT NODE,NODE,...
    local role=$1 component=$2 list=$3
    local -a names where=()
    IFS=, read -ra names <<<"$list"
    if ((${#components[@]} > 1)); then where=(--het-group="$component"); fi
    where+=(--nodes="${#names[@]}" --ntasks="${#names[@]}" --ntasks-per-node=1 --nodelist="$list")
    # A task may use only as many cores as it asks for, and all processes of a node live in one task.
    where+=(--cpus-per-task="${cpus[component]}" --kill-on-bad-exit=1 --job-name="$role")
    srun "${where[@]}" "${srun_options[@]}" "${container[@]}" \
        "${python[@]}" -m nemo_opd.cluster.node "$plan" "$role" &
}

alive() { kill -0 "$1" 2>/dev/null; }

# A second, or less when a signal comes. `wait -n` for a step would not do: older versions of bash miss one that has
# just ended, and wait for ever.
pause() {
    sleep 1 &
    wait "$!" || true
}

# Server steps: server_role, server_pid and server_starts by number. One that ends is started again, three times.
start_servers() { # ROLE COMPONENT NODES ...
    server_step=() server_pid=() server_starts=()
    while (($#)); do
        start_step "$1" "$2" "$3"
        server_step+=("$1 $2 $3") server_pid+=($!) server_starts+=(1)
        shift 3
    done
}

watch_servers() {
    local i role component list
    for i in "${!server_pid[@]}"; do
        if alive "${server_pid[i]}" || [[ -n $asked ]]; then continue; fi
        read -r role component list <<<"${server_step[i]}"
        if ((server_starts[i] > 3)); then
            say "the $role servers on $list ended ${server_starts[i]} times; they are not started again"
            printf '%s\n' "the $role servers on $list ended ${server_starts[i]} times; see $run_dir/logs" >"$job/failed"
            unset 'server_pid[i]'
        else
            say "the $role servers on $list ended and are started again"
            start_step "$role" "$component" "$list"
            server_pid[i]=$! server_starts[i]=$((server_starts[i] + 1))
        fi
    done
}

end_servers() {
    local pid waited=0
    : >"$job/ended"
    for pid in "${server_pid[@]}"; do
        while alive "$pid" && ((waited++ < 40)); do sleep 0.5; done
        if alive "$pid"; then kill -TERM "$pid"; fi # srun then kills its step
    done
}

# SLURM may be ending or requeueing this job itself (scancel, PreemptMode): then it is not ours to requeue.
requeue() {
    local line
    line=$(scontrol show job --oneliner "$SLURM_JOB_ID") || return 1
    if [[ $line != *" JobState=RUNNING "* ]]; then
        say "SLURM is ending this job itself; not requeued from here"
        return 0
    fi
    scontrol requeue "$SLURM_JOB_ID"
}
