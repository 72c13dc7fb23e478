"""From documents with a treatment per token to the padded micro-batches of each rank.

Shapes: L tokens of a document, B documents of a micro-batch, T its longest document, N its predicted tokens.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor


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
    """A padded micro-batch. The N predicted tokens are rows of the flattened [B*T] hidden states: token t of a document
    is predicted at t - 1. Labels are shifted here and nowhere else."""

    ids_BT: Tensor
    keep_BT: Tensor  # bool: tokens of real documents, which alone reach the experts
    position_N: Tensor  # b*T + t - 1
    target_N: Tensor
    coefficient_N: Tensor  # weight divided by the loss's denominator; its sign is the treatment
    roles_N: Tensor
    names: list[str]

    def to(self, device: torch.device) -> "Batch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "names"}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})

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


def micro_batches(
    samples: list[Sample], norm: str, ranks: int, rank: int, size: int, dtype: torch.dtype = torch.float32
) -> list[Batch]:
    """This rank's micro-batches of one optimizer step, of `size` documents at most; every rank gets as many.

    Documents of like length go together. Which rank computes which document changes nothing but rounding: the loss is a
    sum with a denominator that is global.
    """
    terms = coefficients(samples, norm)
    by_length = sorted(range(len(samples)), key=lambda i: -len(samples[i].ids_L))
    batches = []
    for start in range(0, len(samples), ranks * size):
        mine = by_length[start : start + ranks * size][rank::ranks]
        batches.append(pad([samples[i] for i in mine], [terms[i] for i in mine], dtype))
    return batches


def pad(samples: list[Sample], terms: list[np.ndarray], dtype: torch.dtype = torch.float32) -> Batch:
    """Pads on the right, where a causal model cannot see it. Without documents: one dummy token that predicts nothing,
    since every rank must run the same number of forwards."""
    length = max((len(s.ids_L) for s in samples), default=1)
    shape = max(len(samples), 1), length
    ids, keep = np.zeros(shape, np.int64), np.zeros(shape, bool)
    positions, targets, coefficient, roles = [], [], [], []
    for row, (sample, term_L) in enumerate(zip(samples, terms, strict=True)):
        n = len(sample.ids_L)
        ids[row, :n], keep[row, :n] = sample.ids_L, True
        (predicted,) = sample.target_L.nonzero()
        positions.append(row * length + predicted - 1)
        targets.append(sample.ids_L[predicted])
        coefficient.append(term_L[predicted])
        roles.append(sample.roles_L[predicted])

    def join(arrays: list[np.ndarray], as_type: type) -> Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, as_type), *arrays]).astype(as_type))

    return Batch(
        ids_BT=torch.from_numpy(ids),
        keep_BT=torch.from_numpy(keep),
        position_N=join(positions, np.int64),
        target_N=join(targets, np.int64),
        coefficient_N=join(coefficient, np.float64).to(dtype),
        roles_N=join(roles, np.int64),
        names=[sample.name for sample in samples],
    )
