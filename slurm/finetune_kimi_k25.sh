#!/usr/bin/env bash
# Fine-tunes Kimi K2.5 on one node of 8 GPUs of 141 GB, with experts in their INT4. Submit from the repository:
#
#     sbatch slurm/finetune_kimi_k25.sh --data documents.jsonl --mask negation-spans
#
# Options after the script's name go to train/sft.py. Options before it go to Slurm, and override those set here:
# sbatch --nodes=2 --time=12:00:00 slurm/finetune_kimi_k25.sh …
#SBATCH --job-name=finetune-kimi-k25
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

attempt --recipe train/recipes/models/kimi-k2.5.yaml "$@"
