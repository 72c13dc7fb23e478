# shellcheck shell=bash
# What the job scripts share: one attempt at a run of train/sft.py, a rank a GPU of every node of the job, and what comes
# after it. Sourced with the repository as the working directory.
#
# An attempt that made room (code 85: it was told to end before the time limit, or preempted, and has saved) is requeued
# and goes on. So is one that failed or reached the time limit, but MAX_FAILURES attempts (3) in a row without a new save
# end the job. What the user must mend (code 2) is not tried again.

set -euo pipefail

readonly USER_ERROR=2 INTERRUPTED=85

# values_of FLAG ARGUMENT…: those that the arguments give to FLAG, in the array `values`.
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

# output_of FLAG…: the run's --output, or its default, in `output`.
output_of() {
    values_of --output "$@"
    output=runs/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}
    if ((${#values[@]})); then output=${values[-1]}; fi
}

# newest_save RUN: the number of the step of its newest save; 0 without one.
newest_save() {
    local save newest=0
    for save in "$1"/saves/step-*; do
        save=${save##*/step-}
        if [[ $save =~ ^[0-9]+$ ]] && ((save > newest)); then newest=$save; fi
    done
    echo "$newest"
}

# attempt FLAG…: train/sft.py with these flags, once, on all ranks; then the end of the job, or another attempt.
attempt() {
    local values output number=$((${SLURM_RESTART_COUNT:-0} + 1)) code=0 file first=
    output_of "$@"
    local flags=("$@" --output "$output") log=$output/logs/attempt-$number.log
    # A rank a GPU or, on nodes without any, as many as --ntasks-per-node says.
    local ranks=${SLURM_GPUS_ON_NODE:-0}
    ((ranks)) || ranks=${SLURM_NTASKS_PER_NODE:-1}
    if ((number > 1)) && [[ -e $output/settings.yaml ]]; then flags+=(--resume); fi
    if ! mkdir -p -- "$output/logs"; then exit "$USER_ERROR"; fi
    echo "attempt $number, $ranks ranks on each of $SLURM_JOB_NODELIST: $log"
    # Slurm signals the tasks, and at a preemption this shell too, which must go on to what comes after them.
    trap : TERM

    MASTER_ADDR=$(hostname) MASTER_PORT=$((20000 + (SLURM_JOB_ID + 997 * number) % 10000)) LOCAL_SIZE=$ranks
    export MASTER_ADDR MASTER_PORT LOCAL_SIZE CODES=$output/logs/attempt-$number.codes
    rm -rf -- "$CODES"
    mkdir -- "$CODES"
    if ((number == 1)); then rm -f -- "$output/logs/failures"; fi # of a job before this one
    # --wait: once one node has given its verdict, the others have it too, or never will.
    on_every_node 1 --wait=60 python -m launch.preflight "${flags[@]}" >>"$log" 2>&1 || code=$?
    # A node that Slurm lost may still train there, until its ranks miss the others (--timeout).
    if ((code == 0 && number > 1)) && ! flock --nonblock -- "$output/.training.lock" true; then
        echo "waiting for the ranks of an earlier attempt: $(<"$output/.training.lock")"
        flock --wait 3600 -- "$output/.training.lock" true || echo "they have not left: going on" >&2
    fi
    if ((code == 0)); then
        # srun's own code mixes in those of the ranks that it ends when one fails: so each writes down its own. Slurm may
        # signal only this shell of a task (proctrack/cgroup), which passes it on.
        # shellcheck disable=SC2016 # for the shell of each task
        on_every_node "$ranks" --kill-on-bad-exit=1 --wait=0 bash -c '
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
            exit "$code"' bash python -u train/sft.py "${flags[@]}" >>"$log" 2>&1 || code=$?
    fi
    for file in "$CODES"/*; do
        if [[ -s $file && (-z $first || $file -ot $first) ]]; then first=$file; fi
    done
    if [[ -n $first ]]; then
        read -r code <"$first"
        echo "rank ${first##*/} ended first, with code $code"
    fi
    after "$code" "$output" "$log"
}

# on_every_node TASKS WORD…: srun with so many tasks on each node of the job.
on_every_node() {
    srun --nodes="$SLURM_NNODES" --ntasks=$((SLURM_NNODES * $1)) --ntasks-per-node="$1" --distribution=block \
        --cpu-bind=none --gpu-bind=none "${@:2}"
}

# patiently WORD…: a command of Slurm, again where its controller does not answer for a while.
patiently() {
    local pause
    for pause in 5 10 20 40 80; do
        "$@" && return
        sleep "$pause"
    done
    "$@"
}

# after CODE OUTPUT LOG: ends the job, or requeues it.
after() {
    local code=$1 output=$2 failures=0 before=-1 saved job=$SLURM_JOB_ID
    if ((code == 0)); then exit 0; fi
    head -n -20 -- "$3" | grep --after-context=10 '^error: ' || true # what stacks or other ranks' messages follow
    tail -n 20 -- "$3"
    if ((code == USER_ERROR)); then exit "$code"; fi

    # An array's own number is one of its tasks' too, but means all of them.
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    # What Slurm preempts or loses, it requeues by itself; and what a user cancels must not come back.
    case $(patiently squeue --noheader --format=%T/%r --jobs="$job") in
        RUNNING/* | */TimeLimit) ;;
        *) exit "$code" ;;
    esac

    saved=$(newest_save "$output")
    if [[ -s $output/logs/failures ]]; then read -r failures before <"$output/logs/failures"; fi
    if ((saved > before)); then failures=0; fi
    if ((saved == before || code != INTERRUPTED)); then failures=$((failures + 1)); fi
    echo "$failures $saved" >"$output/logs/failures"
    if ((failures >= ${MAX_FAILURES:-3})); then
        echo "$failures attempts in a row without a new save: not tried again (attempts that end before one want a longer --time)"
        exit "$code"
    fi
    echo "requeued after code $code; the newest save is of step $saved"
    patiently scontrol requeue "$job"
    exit "$code"
}

if [[ -d .venv ]]; then PATH=$PWD/.venv/bin:$PATH; fi
