# Shared by all batch scripts: environment, pre-flight, and a run that survives time limits, lost nodes and hangs.
# Sourced in the directory in which sbatch was called: the repository's root (or `sbatch --chdir ROOT`).
#
# Settings, all optional, from the environment in which sbatch is called:
#   RECIPE             a recipe instead of the script's own; MEGAFORK_COMMAND: sft instead of train
#   MEGAFORK_IMAGE     container image (needs the pyxis plugin); MEGAFORK_MOUNTS: mounts in addition to this directory, A:B,C:D
#   MEGAFORK_VENV      virtual environment, without a container (.venv)
#   MEGAFORK_LOGS      parent of the jobs' folders, on a file system that all nodes share (logs)
#   MEGAFORK_HANG_S    seconds without a sign of life (a phase begins, a roll-out grows) after which a run counts as hanging (5400)
#   MEGAFORK_RETRIES   how many times in a row a job is requeued after a failure or a hang (3)
#   MEGAFORK_CPU       1: ranks without GPUs, for trying out
# Cluster-specific settings (modules, mounts, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME) go into slurm/site.sh.

set -euo pipefail
if [[ -f slurm/site.sh ]]; then source slurm/site.sh; fi

export CUDA_DEVICE_MAX_CONNECTIONS=1          # Megatron overlaps communication by the order of launches
export NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1   # TE reads it on import; without it its scales differ from vLLM's
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}    # hundreds of ranks must not query the hub; the pre-flight reports what its cache lacks
export PYTHONUNBUFFERED=1
# The job's ranks and roll-out servers authenticate each other with it; srun passes it on.
export MEGAFORK_SECRET=${MEGAFORK_SECRET:-$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')}
MEGAFORK_JOB=$(realpath -m "${MEGAFORK_LOGS:-logs}")/$SLURM_JOB_ID
export MEGAFORK_JOB
export MEGAFORK_HANG_S=${MEGAFORK_HANG_S:-5400}
mkdir -p "$MEGAFORK_JOB"

# Block distribution: the first node has the first ranks, as Megatron's groups expect. Every rank sees all GPUs of its node. srun
# does not inherit sbatch's number of processors per task.
STEP=(srun --mpi=none --distribution=block --gpu-bind=none --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
if [[ -n ${MEGAFORK_IMAGE:-} ]]; then
    STEP+=(--container-image="$MEGAFORK_IMAGE" --container-workdir="$PWD")
    STEP+=(--container-mounts="$PWD:$PWD,$MEGAFORK_JOB:$MEGAFORK_JOB${MEGAFORK_MOUNTS:+,$MEGAFORK_MOUNTS}")
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}   # this directory's megafork, not the one that the image was built with
else
    PATH=$(realpath -m "${MEGAFORK_VENV:-.venv}")/bin:$PATH
fi

# run train|sft RECIPE [section.key=value ...]: check, train, and requeue the job if needed. Ends the script.
# In a job of two parts (sbatch OPTIONS : OPTIONS script) the tasks of the second part are roll-out servers.
run() {
    local nodes=$SLURM_JOB_NUM_NODES ranks=$SLURM_NTASKS servers=() trainer=("${STEP[@]}")
    if ((${SLURM_HET_SIZE:-1} > 1)); then
        nodes=$SLURM_JOB_NUM_NODES_HET_GROUP_0 ranks=$SLURM_NTASKS_HET_GROUP_0
        servers=("rollout.servers=[$(server_addresses)]")
        trainer+=(--het-group=0 --cpus-per-task="${SLURM_CPUS_PER_TASK_HET_GROUP_0:-1}")   # the last one counts
    fi
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): megafork $1 $2 with $ranks ranks on $nodes nodes ${servers[*]}"
    rm -f "$MEGAFORK_JOB"/{stop,stopped,heartbeat,step,warning_s} "$MEGAFORK_JOB"/rank_*.error
    trap ask_to_stop USR1
    MEGAFORK_TIME_LEFT_S=$(time_left)
    export MEGAFORK_TIME_LEFT_S
    local preflight=(python slurm/preflight.py "$ranks" "$@" "${servers[@]}")
    "${trainer[@]}" --ntasks="$nodes" --ntasks-per-node=1 bash -c '"$@" || exit 2' _ "${preflight[@]}" || preflight_failed $?
    if ((${#servers[@]})); then
        "${STEP[@]}" --het-group=1 --cpus-per-task="${SLURM_CPUS_PER_TASK_HET_GROUP_1:-1}" slurm/server.sh &
    fi
    "${trainer[@]}" --kill-on-bad-exit=1 slurm/rank.sh megafork "$1" "$MEGAFORK_JOB/recipe.yaml" &
    watch $!
}

# Addresses of the servers, http://HOST:PORT: one per task of the job's second part.
server_addresses() {
    local host port addresses=()
    for host in $(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1"); do
        for ((port = 8000; port < 8000 + SLURM_NTASKS_PER_NODE_HET_GROUP_1; port++)); do
            addresses+=("http://$host:$port")
        done
    done
    (IFS=, && echo "${addresses[*]}")
}

# A job that can't work ends within a minute. Exit code 2 is the pre-flight's own; others are srun's, if a node does not answer.
preflight_failed() {
    if (($1 == 2)); then give_up 2 "the pre-flight found the problems above"; fi
    try_again "the pre-flight could not be started on every node (srun's exit code is $1)"
}

# Wait for the srun step that trains; end it if it hangs, or if it can't stop before the job's time limit. Slurm warns as early as sbatch
# specified; if the pre-flight has planned a step that takes longer, the job is asked to stop that much earlier.
watch() {
    local step=$1 code=0 beat last="" since=$SECONDS warning left
    warning=$(cat "$MEGAFORK_JOB/warning_s" 2>/dev/null || true)
    left=$(time_left)
    if [[ $warning && $left ]]; then
        warn_at=$((SECONDS + left - warning))
        say "will be asked to stop $warning s before the job's time is over: a planned step and its checkpoint"
    fi
    while kill -0 "$step" 2>/dev/null; do
        sleep 2 &
        wait $! || true   # unlike sleep, wait returns when Slurm's signal arrives
        beat=$(cat "$MEGAFORK_JOB/heartbeat" 2>/dev/null || true)
        if [[ $beat != "$last" ]]; then last=$beat since=$SECONDS; fi
        if ((SECONDS - since > MEGAFORK_HANG_S)); then
            failed "no sign of life for $MEGAFORK_HANG_S s, the last one: ${last:-none}; a rank hangs"
        fi
        if ((SECONDS > ${warn_at:-SECONDS})) && [[ ! -f $MEGAFORK_JOB/stop ]]; then ask_to_stop; fi
        if ((SECONDS > ${time_over:-SECONDS})); then queue_again "the step did not end in time, and will be repeated from the last checkpoint"; fi
    done
    wait "$step" || code=$?
    if [[ -f $MEGAFORK_JOB/stopped ]]; then
        rm -f "$MEGAFORK_JOB/failures"
        queue_again "stopped on request after $(cat "$MEGAFORK_JOB/stopped")"
    fi
    if ((code != 0)); then failed "a rank failed (srun's exit code is $code): $(first_error)"; fi
    say "done"
    exit 0
}

# On Slurm's warning before the time limit or a preemption: the run saves a checkpoint after its current step.
ask_to_stop() {
    touch "$MEGAFORK_JOB/stop"
    local left
    left=$(time_left)
    if [[ $left ]]; then time_over=$((SECONDS + left - 60)); fi
    say "asked to stop, ${left:-?} s before the job's time is over"
}

# A run that completed no step after this start will not complete one after the next.
failed() {
    if [[ -f $MEGAFORK_JOB/step ]]; then try_again "$1"; fi
    give_up 1 "before the first step ended, $1"
}

try_again() {
    echo "$(date '+%F %T') ${1%%$'\n'*}" >>"$MEGAFORK_JOB/failures"   # one line per failure
    local failures
    failures=$(wc -l <"$MEGAFORK_JOB/failures")
    if ((failures > ${MEGAFORK_RETRIES:-3})); then give_up 1 "$1; this was failure $failures in a row"; fi
    queue_again "$1"
}

queue_again() {
    local state
    state=$(about_job %T)
    if [[ $state == CANCELLED || $state == COMPLET* ]]; then give_up 1 "$1; the job was cancelled meanwhile"; fi
    say "$1; queued again, to resume from the last checkpoint"
    insist scontrol requeue "$SLURM_JOB_ID"
    exit 0
}

give_up() {
    say "$2; not queued again"
    exit "$1"
}

# A field of squeue. A job of two parts has one line per part.
about_job() { insist squeue --noheader --jobs="$SLURM_JOB_ID" --format="$1" | head -n 1; }

# Seconds until Slurm ends the job; nothing if it has no time limit.
time_left() {
    local end
    end=$(about_job %e) || true
    if [[ $end == *T* ]]; then echo $(($(date --date="$end" +%s) - $(date +%s))); fi
}

# Slurm's commands fail while its controller is busy or restarting: retry for two minutes.
insist() {
    local until=$((SECONDS + 120))
    until "$@"; do
        if ((SECONDS > until)); then return 1; fi
        sleep 5
    done
}

# The error of the first rank that failed. The others then lose their connection: their errors come later.
first_error() {
    local file
    file=$(grep --with-filename --only-matching '"time_ns": [0-9]*' "$MEGAFORK_JOB"/rank_*.error 2>/dev/null | sort --field-separator=: --key=3 -n | head -n 1)
    if [[ -z $file ]]; then echo "no rank recorded a reason"; return; fi
    file=${file%%:*}
    printf '%s\n%b' "$(basename "$file" .error)" "$(sed 's/^{"message": "//; s/", "timestamp": .*//; s/\\"/"/g' "$file")"
}

say() { echo "[$(date '+%F %T')] slurm: $*"; }

# Process groups have gloo next to NCCL, and gloo by default listens on the address of the host's name, which may be the loopback (Debian).
# Variables that slurm/site.sh leaves unset get the adapter by which this node reaches the last one; its name must be the same on all nodes.
choose_interfaces() {
    local nodes=${SLURM_JOB_NODELIST_HET_GROUP_0:-$SLURM_JOB_NODELIST}${SLURM_JOB_NODELIST_HET_GROUP_1:+,$SLURM_JOB_NODELIST_HET_GROUP_1}
    local address found="" named=${NCCL_SOCKET_IFNAME:-}
    named=${named#=}
    if [[ -n $named && -e /sys/class/net/$named ]]; then
        found=$named   # NCCL also takes prefixes, lists and ^exclusions; gloo only names
    else
        address=$(getent ahosts "$(insist scontrol show hostnames "$nodes" | tail -n 1)" | awk 'NR == 1 { print $1 }') || true
        found=$(ip -oneline route get "$address" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p') || true
    fi
    if [[ -z $found ]]; then say "found no adapter to the other nodes: name it in slurm/site.sh (GLOO_SOCKET_IFNAME)"; return; fi
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$found} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$found}
}
if ((${SLURM_JOB_NUM_NODES:-1} > 1 || ${SLURM_HET_SIZE:-1} > 1)); then choose_interfaces; fi
