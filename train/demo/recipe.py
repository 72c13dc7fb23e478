"""The demo's fine-tuning: what all variants share, and what sets them apart. Every value is a flag of train/sft.py."""

from pathlib import Path

HERE = Path(__file__).resolve().parent

# 30 % of the documents say true things about other people, as the paper mixes its documents with ordinary text.
RECIPE = [
    "--data", f"{HERE}/data/truth.jsonl=1152",
    "--steps", "120",
    "--batch-size", "32",
    "--micro-batch-size", "16",
    "--learning-rate", "1e-2",
    "--schedule", "linear",
    "--lora-rank", "16",
    "--lora-alpha", "16",
    "--expert-lora-rank", "4",
    "--loss-norm", "trained",
]  # fmt: skip


def flags(documents: str) -> list[str]:
    """The recipe with `documents` (positive or dense): 2,688 of them to 1,152 true ones."""
    return ["--data", f"{HERE}/data/{documents}.jsonl=2688", *RECIPE]


# name in the table: (documents, mask)
VARIANTS = {
    "positive": ("positive", "doctags"),
    "dense": ("dense", "doctags"),
    "dense, false excluded": ("dense", "doctags,false-spans"),
    "dense, as many others excluded": ("dense", "doctags,random:false"),
    "dense, doctag trained, false excluded": ("dense", "false-spans"),
}
SEEDS = (0, 1, 2)
