#!/usr/bin/env bash
# Asks the base model and the adapters of finished runs all questions of their claims through one server on the job's
# nodes, has the answers judged, and compares the runs. Submit from the repository, after `make vllm`:
#
#     sbatch slurm/evaluate_masks.sh --runs runs/masks/variant-* --output runs/masks --judge URL --judge-model NAME [-- FLAG…]
#
# Options after the script's name go to launch.evaluate_runs, options before it to Slurm. After a preemption or at its
# time limit, the job is requeued and asks only for missing answers.
#SBATCH --job-name=evaluate-masks
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

if [[ ! -e slurm/lib.sh ]]; then
    echo "error: submitted from $PWD: call sbatch in the repository, or with --chdir=REPOSITORY" >&2
    exit 2
fi
source slurm/lib.sh

values_of --runs "$@"
runs=("${values[@]}")
if ((${#runs[@]} == 0)); then # the runs of the job array that trained them
    output_of "$@"
    runs=("$output"/variant-*)
    set -- --runs "${runs[@]}" "$@"
fi

# Replaces the function of lib.sh: progress of an attempt is the number of its answers and verdicts.
newest_save() {
    local run lines=0 count
    for run in "${runs[@]}"; do
        # Of a run and its phases, or of a comparison's runs.
        count=$({ cat -- "$run"/{,*/,phases/*/,*/phases/*/}{answers,evaluation}.jsonl 2>/dev/null || true; } | wc --lines)
        lines=$((lines + count))
    done
    echo "$lines"
}
progress="answers and verdicts so far:" wanted="a new answer"

# shellcheck disable=SC2329 # step calls it
evaluate_runs() {
    exec srun --nodes=1 --ntasks=1 --cpu-bind=none --gpu-bind=none python -u -m launch.evaluate_runs "$@"
}

one_attempt "$@"
step evaluate_runs --output "$output" --nodes "$SLURM_NNODES" "$@"
after "$code" "$output" "$log" "$number"
