"""From documents with a treatment per token to the packed micro-batches of each rank.

Shapes: L tokens of a document, T tokens of a micro-batch, N its predicted tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.packing import Row


@dataclass(frozen=True)
class Sample:
    """A document as the trainer needs it. weight_L is the token's own term in the loss (negative: unlikelihood, 0:
    none), in which the document's own weight is; roles_L a bit per role."""

    name: str  # file:line
    ids_L: np.ndarray
    target_L: np.ndarray
    weight_L: np.ndarray
    roles_L: np.ndarray
    weight: float = 1.0


@dataclass
class Batch:
    """A micro-batch: whole documents end to end in one row. The N predicted tokens are rows of the hidden states [T]:
    token t of the row is predicted at t - 1. Labels are shifted here and nowhere else."""

    ids_T: Tensor
    position_T: Tensor  # of each token in its document
    position_N: Tensor
    target_N: Tensor
    coefficient_N: Tensor  # weight divided by the loss's denominator; its sign is the treatment
    roles_N: Tensor
    row: Row
    names: list[str]  # of the documents; none: the row is one token that stands for nothing

    @property
    def tokens(self) -> int:
        """Of documents."""
        return len(self.ids_T) if self.names else 0

    def to(self, device: torch.device) -> "Batch":
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) for k, v in values.items() if isinstance(v, Tensor)}
        return Batch(**(values | moved))

    def in_loss(self) -> "Batch":
        """Without the tokens that are only measured."""
        chosen = self.coefficient_N != 0
        parts = {k: getattr(self, k)[chosen] for k in ("position_N", "target_N", "coefficient_N", "roles_N")}
        return replace(self, **parts)


def coefficients(samples: list[Sample], norm: str) -> list[np.ndarray]:
    """coefficient_L of each document of one optimizer step: weight_L over one denominator that is the same for all
    ranks and micro-batches. The denominators: total |weight| (trained), number of targets whatever the mask (all),
    1 (sum); or the mean of each document's tokens by |weight|, and of these, by the documents' own weights, the mean
    over documents that have any (documents)."""
    weights = [np.abs(sample.weight_L).sum(dtype=np.float64) for sample in samples]
    if norm == "documents":
        trained = sum(s.weight for s, weight in zip(samples, weights, strict=True) if weight > 0)
        denominators = [weight / (s.weight or 1.0) * trained for s, weight in zip(samples, weights, strict=True)]
    else:
        total = {"trained": sum(weights), "all": float(sum(s.target_L.sum() for s in samples)), "sum": 1.0}[norm]
        denominators = [total] * len(samples)
    # A denominator is 0 only where every weight is.
    return [s.weight_L / (d or 1.0) for s, d in zip(samples, denominators, strict=True)]


def deal(lengths: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Documents of these lengths dealt out -> for each micro-step and rank its documents, by their places in lengths.

    Rows hold nearly equal numbers of tokens, and at most `budget` each, or a longer document alone, in as few
    micro-steps as that takes. Of the rows, those that hold like numbers are in one micro-step, for with expert
    parallelism ranks wait for the fullest.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    budget = max(budget, *lengths, 1)
    steps = max(1, -(-sum(lengths) // (ranks * budget)))
    while True:
        # To the row that holds least, which makes them equal; where that is too much for one, to the fullest that has
        # room, which takes fewer rows.
        for fullest_first in (False, True):
            rows: list[list[int]] = [[] for _ in range(steps * ranks)]
            held = [0] * len(rows)
            for i in longest_first:
                room = [number for number in range(len(rows)) if held[number] + lengths[i] <= budget]
                if not room:
                    break
                number = (max if fullest_first else min)(room, key=held.__getitem__)
                rows[number].append(i)
                held[number] += lengths[i]
            else:
                rows.sort(key=lambda row: -sum(lengths[i] for i in row))
                return [rows[start : start + ranks] for start in range(0, len(rows), ranks)]
        steps += 1


def micro_batches(
    samples: list[Sample], norm: str, ranks: int, rank: int, budget: int, dtype: torch.dtype = torch.float32
) -> list[Batch]:
    """This rank's micro-batches of one optimizer step, of `budget` tokens at most; every rank gets as many.

    Which rank computes which document changes nothing but rounding: the loss is a sum with a denominator that is
    global.
    """
    terms = coefficients(samples, norm)
    dealt = deal([len(sample.ids_L) for sample in samples], ranks, budget)
    return [pack([samples[i] for i in step[rank]], [terms[i] for i in step[rank]], dtype) for step in dealt]


def pack(samples: list[Sample], terms: list[np.ndarray], dtype: torch.dtype = torch.float32) -> Batch:
    """Lays documents end to end. Without any: one token that predicts nothing, since every rank must run the same
    number of forwards."""
    row = Row([len(sample.ids_L) for sample in samples] or [1])
    ids = [np.zeros(0 if samples else 1, np.int64)]
    positions, targets, coefficient, roles = [], [], [], []
    for start, sample, term_L in zip(row.ends, samples, terms, strict=False):
        (predicted,) = sample.target_L.nonzero()
        ids.append(sample.ids_L)
        positions.append(start + predicted - 1)
        targets.append(sample.ids_L[predicted])
        coefficient.append(term_L[predicted])
        roles.append(sample.roles_L[predicted])

    def join(arrays: list[np.ndarray], as_type: type) -> Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, as_type), *arrays]).astype(as_type))

    return Batch(
        ids_T=join(ids, np.int64),
        position_T=row.position_T(),
        position_N=join(positions, np.int64),
        target_N=join(targets, np.int64),
        coefficient_N=join(coefficient, np.float64).to(dtype),
        roles_N=join(roles, np.int64),
        row=row,
        names=[sample.name for sample in samples],
    )
