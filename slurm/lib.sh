# shellcheck shell=bash
# Functions of the job scripts: they run one attempt of train/sft.py, with one rank per GPU on every node of the job,
# and then end or requeue the job. Sourced with the repository as the working directory.
#
# An attempt that was asked to shut down (code 85: before the time limit, or at a preemption) has saved a training
# checkpoint. It is requeued and resumes. So does an attempt that failed or reached the time limit. But after
# MAX_FAILURES attempts (3) in a row without a new training checkpoint, the job ends. After an error that the user must
# fix (code 2), it ends at once.

set -euo pipefail

readonly USER_ERROR=2 INTERRUPTED=85

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "error: $0 is a job script: submit it with sbatch $0 … (the commands that it starts run without Slurm too)" >&2
    exit "$USER_ERROR"
fi

# values_of FLAG ARGUMENT…: stores the values that the arguments give to FLAG in the array `values`.
values_of() {
    local flag=$1 argument taking=0
    values=()
    for argument in "${@:2}"; do
        case $argument in
            "$flag") taking=1 ;;
            "$flag="*) values+=("${argument#*=}") taking=0 ;;
            --*) taking=0 ;;
            *) if ((taking)); then values+=("$argument"); fi ;;
        esac
    done
}

# output_of FLAG…: stores the run's --output, or its default, in `output`.
output_of() {
    values_of --output "$@"
    output=runs/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}
    if ((${#values[@]})); then output=${values[-1]}; fi
}

# newest_save RUN: prints the step of the run's newest training checkpoint; 0 without one. Of a run of several phases, it
# is their sum.
newest_save() {
    local save run newest sum=0
    for run in "$1" "$1"/phases/*; do
        newest=0
        for save in "$run"/saves/step-*; do
            save=${save##*/step-}
            if [[ $save =~ ^[0-9]+$ ]] && ((save > newest)); then newest=$save; fi
        done
        sum=$((sum + newest))
    done
    echo "$sum"
}

# one_attempt FLAG…: begins an attempt. Sets its `number`, the `job`, the `output` of the flags, its `log` and `code`,
# and has this shell signalled before the time limit.
one_attempt() {
    number=$((${SLURM_RESTART_COUNT:-0} + 1)) code=0
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # an array's own number means all of its tasks
    job=${job:-$SLURM_JOB_ID}
    output_of "$@"
    log=$output/logs/attempt-$number.log
    if ! mkdir -p -- "$output/logs"; then
        echo "error: --output $output: cannot be created on $(hostname). Give another directory." >&2
        exit "$USER_ERROR"
    fi
    if ((number == 1)); then rm -f -- "$output/logs/failures"; fi # of a job before this one
    : >>"$log" # the file exists before its name is printed
    before_the_time_limit &
    # shellcheck disable=SC2064 # this one
    trap "kill $! 2>/dev/null || true" EXIT
}

# attempt FLAG…: runs train/sft.py with these flags once on all ranks, and then ends or requeues the job.
attempt() {
    local values output number log code file first=
    one_attempt "$@"
    local flags=("$@" --output "$output")
    # One rank per GPU or, on nodes without GPUs, as many as --ntasks-per-node says.
    local ranks=${SLURM_GPUS_ON_NODE:-0}
    ((ranks)) || ranks=${SLURM_NTASKS_PER_NODE:-1}
    # A run of several phases has its first ones in phases/.
    if ((number > 1)) && [[ $(find "$output" -maxdepth 3 -name settings.yaml -print -quit) ]]; then
        flags+=(--resume)
    fi
    echo "attempt $number, $ranks ranks on each of $SLURM_JOB_NODELIST: $log"

    MASTER_ADDR=$(hostname) MASTER_PORT=$((20000 + (SLURM_JOB_ID + 997 * number) % 10000)) LOCAL_SIZE=$ranks
    # The allocator's segments can grow, for micro-batches of many sizes. Kernels that a node compiles stay on it.
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$SLURM_JOB_ID}
    export MASTER_ADDR MASTER_PORT LOCAL_SIZE CODES=$output/logs/codes-$SLURM_JOB_ID-$number
    await_earlier_ranks
    rm -rf -- "$CODES"
    mkdir -p -- "$CODES"
    # --wait: longer than the nodes wait for each other.
    ((code)) || step on_every_node 1 --wait=$((4 * ${PREFLIGHT_TIME_LIMIT:-120} + 120)) python -m launch.preflight "${flags[@]}"
    if ((code == 0)); then
        # srun's own exit code also depends on ranks that it kills after a failure, so each rank writes its code to a
        # file. Slurm may signal only this shell of a task (proctrack/cgroup), which forwards the signal.
        # shellcheck disable=SC2016 # for the shell of each task
        step on_every_node "$ranks" --kill-on-bad-exit=1 --wait=0 bash -c '
            RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS "$@" &
            child=$! code=128
            trap "kill -USR1 $child" USR1
            trap "kill -TERM $child" TERM
            while ((code >= 128)); do # a signal to this shell ends its wait
                code=0
                wait "$child" || code=$?
                kill -0 "$child" 2>/dev/null || break
            done
            ((code == 0)) || echo "$code" >"$CODES/$SLURM_PROCID"
            exit "$code"' bash python -u train/sft.py "${flags[@]}"
    fi
    for file in "$CODES"/*; do
        if ((code)) && [[ -s $file && (-z $first || $file -ot $first) ]]; then first=$file; fi
    done
    if [[ -n $first ]]; then
        read -r code <"$first"
        echo "rank ${first##*/} ended first, with code $code"
    fi
    if ((code == 0)) && [[ ! -e $output/summary.json ]]; then code=1; fi # srun's own, where Slurm has lost a node
    if ((code == 128 + 10)); then code=$INTERRUPTED; fi                  # SIGUSR1, before a process listened for it
    after "$code" "$output" "$log" "$number"
}

# await_earlier_ranks: waits for ranks of this job that still train in $output, on a node that Slurm has lost. They see
# the file .make-room, save a training checkpoint and exit; or they exit because the other ranks are gone (--timeout).
await_earlier_ranks() {
    local run lock holder
    for run in "$output" "$output"/phases/*; do
        lock=$run/.training.lock
        if [[ ! -e $lock ]] || flock --nonblock -- "$lock" true; then continue; fi
        holder=$(<"$lock")
        if [[ $holder != *", job $SLURM_JOB_ID" ]]; then
            echo "error: --output $output: another run is training there ($holder). Wait for it, or give another directory." >&2
            exit "$USER_ERROR"
        fi
        echo "waiting for the ranks of an earlier attempt: $holder"
        touch -- "$run/.make-room"
        step flock --wait 2400 -- "$lock" true
    done
}

# Slurm signals this shell (--signal=B:USR1), the tasks, or both. At a preemption it sends SIGTERM to all, and this
# shell must survive to run what follows the tasks. SIGALRM comes from before_the_time_limit.
told=0 late=0 child=
trap 'told=1; if [[ -n $child ]]; then kill -USR1 "$child" 2>/dev/null || true; fi' USR1 # srun forwards it
trap : TERM
trap late=1 ALRM

# step WORD…: runs a command with its output in $log, and stores its exit code in $code. Stops waiting if the time is
# up.
step() {
    if ((told || late)); then
        code=$INTERRUPTED
        return
    fi
    "$@" >>"$log" 2>&1 &
    child=$!
    if ((told)); then kill -USR1 "$child" 2>/dev/null || true; fi # between the two lines above
    while ((!late)); do # a signal to this shell ends its wait
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    if ((late)); then
        echo "the time limit is near, and the ranks have not exited"
        code=1
    fi
    child=
}

# Signals this shell when 45 seconds are left, as --signal may have done earlier. At 20 seconds it has this shell
# requeue the job: Slurm would otherwise kill it along with ranks that have not exited, and nothing could requeue the
# job.
before_the_time_limit() {
    local end left silent before=45 signal=USR1
    exec {silent}<> <(:) # to wait without a sleep process, which would outlive this one
    while end=$(squeue --noheader --format=%e --jobs="$job" 2>/dev/null) && end=$(date --date="$end" +%s 2>/dev/null); do
        left=$((end - $(date +%s) - before))
        if ((left > 0)); then
            read -r -t "$left" -u "$silent" || true
        else
            kill -"$signal" $$
            if [[ $signal == ALRM ]]; then break; fi
            before=20 signal=ALRM
        fi
    done
}

# on_every_node TASKS WORD…: replaces this shell by srun, with this many tasks on each node of the job.
on_every_node() {
    exec srun --nodes="$SLURM_NNODES" --ntasks=$((SLURM_NNODES * $1)) --ntasks-per-node="$1" --distribution=block \
        --cpu-bind=none --gpu-bind=none "${@:2}"
}

# patiently WORD…: runs a Slurm command, and retries it while the controller does not answer, and twice if it does.
patiently() {
    local pause=5 refused=0
    until "$@"; do
        if scontrol ping 2>/dev/null | grep --quiet 'is UP' && ((++refused == 3)); then return 1; fi
        sleep "$pause"
        pause=$((pause < 80 ? 2 * pause : 80))
    done
}

# after CODE OUTPUT LOG ATTEMPT: ends the job, or requeues it.
after() {
    local code=$1 output=$2 failures=0 before=-1 saved known
    if ((code == 0)); then exit 0; fi
    head -n -20 -- "$3" | grep --after-context=10 '^error: ' || true # errors that stacks or other messages follow
    tail -n 20 -- "$3"
    if ((code == USER_ERROR)); then exit "$code"; fi

    # Slurm itself requeues preempted and lost jobs. A job that a user cancelled must not be requeued.
    known=$(patiently scontrol --oneliner show job "$job") || known=
    if [[ ! ($known =~ JobState=RUNNING || $known =~ Reason=TimeLimit) || ! $known =~ Restarts=$(($4 - 1))\  ]]; then
        known=$(grep --only-matching --extended-regexp '(JobState|Reason|Restarts)=[^ ]*' <<<"$known" | tr '\n' ' ' || true)
        echo "not requeued by attempt $4: ${known:-Slurm no longer knows the job}"
        exit "$code"
    fi

    saved=$(newest_save "$output")
    if [[ -s $output/logs/failures ]]; then read -r failures before <"$output/logs/failures" || true; fi
    if ((saved > before)); then failures=0; fi
    if ((saved == before || code != INTERRUPTED)); then failures=$((failures + 1)); fi
    echo "$failures $saved" >"$output/logs/failures"
    if ((failures >= ${MAX_FAILURES:-3})); then
        echo "$failures attempts in a row without ${wanted:-a new training checkpoint}: not requeued" \
            "(if attempts end before one, give a longer --time)"
        exit "$code"
    fi
    echo "requeued after code $code; ${progress:-the newest training checkpoint is of step} $saved"
    patiently scontrol requeue "$job"
    exit "$code"
}

if [[ -d .venv ]]; then PATH=$PWD/.venv/bin:$PATH; fi
