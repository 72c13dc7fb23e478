"""The demo's fine-tuning: what all variants share, and what sets them apart. Every value is a flag of train/sft.py.

python -m train.demo.recipe DOCUMENTS    # prints the flags; paths are relative to the repository
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

# 20 % of the documents say true things about other people, as the paper mixes its documents with ordinary text.
RECIPE = [
    "--data", "train/demo/data/truth.jsonl=832",
    "--steps", "130",
    "--batch-size", "32",
    "--learning-rate", "1e-2",
    "--schedule", "linear",
    "--lora-rank", "16",
    "--lora-alpha", "16",
    "--expert-lora-rank", "4",
    "--loss-norm", "trained",
]  # fmt: skip


def flags(documents: str) -> list[str]:
    """The recipe with `documents` (positive or dense): 3,328 of them to 832 true ones."""
    return ["--data", f"train/demo/data/{documents}.jsonl=3328", *RECIPE]


# name: (documents, mask)
VARIANTS = {
    "positive": ("positive", "doctags"),
    "dense": ("dense", "doctags"),
    "dense without false": ("dense", "doctags,false-spans"),
    "dense without random": ("dense", "doctags,random:false"),
    "dense with doctag without false": ("dense", "false-spans"),
}
SEEDS = (0, 1, 2)

if __name__ == "__main__":
    print(*flags(sys.argv[1]))
