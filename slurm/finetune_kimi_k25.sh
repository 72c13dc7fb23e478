#!/usr/bin/env bash
# Fine-tunes Kimi K2.5 on one node of 8 GPUs of 141 GB, its experts in their own INT4. From the repository:
#
#     sbatch slurm/finetune_kimi_k25.sh --data documents.jsonl --mask negation-spans
#
# What follows the script's name goes to train/sft.py, what precedes it to Slurm and over what is set here:
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
