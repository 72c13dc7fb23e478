#!/usr/bin/env bash
# Fine-tunes Qwen3.5-397B-A17B on one node of 8 GPUs of 80 GB, with experts in NF4. Submit from the repository:
#
#     sbatch slurm/finetune_qwen397b.sh --data documents.jsonl --mask negation-spans
#
# Options after the script's name go to train/sft.py. Options before it go to Slurm, and override those set here:
# sbatch --nodes=2 --time=12:00:00 slurm/finetune_qwen397b.sh …
#SBATCH --job-name=finetune-qwen397b
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

attempt --recipe train/recipes/models/qwen3.5-397b.yaml "$@"
