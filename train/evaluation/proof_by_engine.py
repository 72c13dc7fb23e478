"""Measures, by the training engine, what shows later that a server answers with an adapter (proof.py)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.checkpoints.present import PROOF
from train.data.batches import Sample, measured_only
from train.evaluation.likelihood import token_log_likelihoods
from train.runtime.outputs import write_whole

PROMPTS, TOKENS = 8, 64  # at most, and of each


def measured_proof(samples: Sequence[Sample], engine: Any, budget: int) -> dict[str, Any]:
    """Measures the prompts by base and adapter, and returns the content of proof.json; {} without any prompt.

    samples: the training documents, in the order of their files. budget: most tokens per forward on one rank. All ranks
    must call it.
    """
    texts = [_prompt(sample) for sample in samples if len(sample.ids_L) > 1][:PROMPTS]
    if not texts:
        return {}
    adapter = token_log_likelihoods(texts, engine, budget)
    with engine.module.without_adapter():
        base = token_log_likelihoods(texts, engine, budget)
    return {"tokens": [text.ids_L.tolist() for text in texts], "base": base, "adapter": adapter}


def write_proof(directory: Path, proof: dict[str, Any]) -> None:
    """Writes proof.json into an adapter's directory."""
    write_whole(directory / PROOF, json.dumps(proof) + "\n")


def _prompt(sample: Sample) -> Sample:
    """Returns the first tokens of a document, all but the first of them targets that are only measured."""
    ids_L = sample.ids_L[:TOKENS]
    target_L = np.arange(len(ids_L)) > 0
    return measured_only(sample.name, ids_L, target_L)
