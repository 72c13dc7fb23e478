#!/usr/bin/env bash
# Trains the variants of a recipe, each as a task of a job array, and then compares them. Submit from the repository:
#
#     sbatch slurm/compare_masks.sh
#     sbatch --array=0-5 slurm/compare_masks.sh --recipe EXPERIMENT.yaml MODEL.yaml --output DIR
#     sbatch slurm/compare_masks.sh --output DIR --evaluate --judge URL --judge-model NAME
#
# The array must have one task per variant of the recipe. Options after the script's name go to train/sft.py; without
# --recipe it uses train/recipes/masks.yaml and Qwen3.5-397B-A17B. Options before the script's name go to Slurm. Options
# after --evaluate go to slurm/evaluate_masks.sh, which then replaces the report: it asks, judges and compares the
# variants.
#SBATCH --job-name=compare-masks
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append

if [[ ! -e slurm/lib.sh ]]; then
    echo "error: submitted from $PWD: call sbatch in the repository, or with --chdir=REPOSITORY" >&2
    exit 2
fi
source slurm/lib.sh

evaluate=() of_training=("$@")
for ((i = 0; i < $#; i++)); do
    if [[ ${of_training[i]} == --evaluate ]]; then
        evaluate=("${of_training[@]:i+1}")
        if ((${#evaluate[@]} == 0)); then
            echo "error: --evaluate: give the options of slurm/evaluate_masks.sh: --judge URL and --judge-model NAME, …" >&2
            exit 2
        fi
        set -- "${of_training[@]:0:i}"
        break
    fi
done

values_of --recipe "$@"
recipes=("${values[@]}")
if ((${#recipes[@]} == 0)); then
    recipes=(train/recipes/masks.yaml train/recipes/models/qwen3.5-397b.yaml)
    set -- --recipe "${recipes[@]}" "$@"
fi
output_of "$@"

# Ignores recipes that cannot be read: train/sft.py reports what is wrong with them.
names='import sys; from train.config.recipe import merged; from train.config.settings import Settings'
names+='; print(*merged(sys.argv[1:], Settings).variants, sep="\n")'
variants=$(python -c "$names" "${recipes[@]}" 2>/dev/null | grep --count .) || variants=0
if ((variants && SLURM_ARRAY_TASK_MAX >= variants)); then
    echo "error: --array: has task $SLURM_ARRAY_TASK_MAX, but the recipe has $variants variants; give 0-$((variants - 1))" >&2
    exit 2
fi

submitted=$output/report-of-$SLURM_ARRAY_JOB_ID
if ((SLURM_ARRAY_TASK_ID == SLURM_ARRAY_TASK_MIN)) && [[ ! -e $submitted ]]; then
    # Starts when all variants are done. If one of them fails for good, Slurm cancels this job. Slurm's variables of this
    # task, such as its number in the array, are not those of the next job, which would inherit them.
    mapfile -t own < <(compgen -e | grep '^SLURM_' | grep --invert-match --line-regexp SLURM_CONF)
    report=(
        env "${own[@]/#/--unset=}" sbatch --job-name="$SLURM_JOB_NAME-report"
        --dependency="afterok:$SLURM_ARRAY_JOB_ID" --kill-on-invalid-dep=yes
        --partition="$SLURM_JOB_PARTITION" ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"}
        ${SLURM_JOB_QOS:+--qos="$SLURM_JOB_QOS"} ${SLURM_JOB_RESERVATION:+--reservation="$SLURM_JOB_RESERVATION"}
    )
    # shellcheck disable=SC2329 # patiently calls it
    submit() {
        if ((${#evaluate[@]})); then
            "${report[@]}" --nodes="$SLURM_NNODES" ${SLURM_GPUS_PER_NODE:+--gpus-per-node="$SLURM_GPUS_PER_NODE"} \
                --output="${output//%/%%}/evaluate-%j.out" slurm/evaluate_masks.sh \
                --recipe "${recipes[@]}" --output "$output" "${evaluate[@]}"
            return
        fi
        "${report[@]}" --time=1:00:00 --output=/dev/null <<END
#!/usr/bin/env bash
exec >$(printf %q "$output")/report.log 2>&1
PATH=$(printf %q "$PATH")
exec python train/compare.py --runs $(printf %q "$output")/variant-* --recipe $(printf '%q ' "${recipes[@]}") \
    --output $(printf %q "$output")
END
    }
    mkdir -p -- "$output"
    if patiently submit; then
        touch -- "$submitted"
    else
        echo "Slurm refused the report's job: run train/compare.py --runs yourself when all variants are done"
    fi
fi
attempt --wandb-group "$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID" "$@" --variant "$SLURM_ARRAY_TASK_ID" \
    --output "$output/variant-$SLURM_ARRAY_TASK_ID"
