"""Packs documents with a treatment per token into the micro-batches of each rank.

Shapes: L tokens of a document, T tokens of a micro-batch, N predicted tokens of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.data.kinds import TermKind
from train.data.row import Row
from train.runtime.errors import UserError


@dataclass(frozen=True)
class Sample:
    """A document as the trainer needs it.

    weight_L multiplies each token's own term in the loss, whose TermKind is kind_L; 0: no term. It already includes
    `weight`, the document's own weight. roles_L has one bit per role.
    """

    name: str  # file:line
    ids_L: np.ndarray
    target_L: np.ndarray
    weight_L: np.ndarray
    kind_L: np.ndarray
    roles_L: np.ndarray
    weight: float = 1.0


def measured_only(name: str, ids_L: np.ndarray, target_L: np.ndarray, roles_L: np.ndarray | None = None) -> Sample:
    """Returns a text whose targets are measured and not trained on. roles_L: as in Sample; None: no token has a
    role."""
    nothing = np.zeros(len(ids_L))
    roles_L = nothing.astype(np.int64) if roles_L is None else roles_L
    return Sample(name, ids_L, target_L, nothing.astype(np.float32), nothing.astype(np.int8), roles_L)


@dataclass
class Batch:
    """A micro-batch: whole documents packed into one row of T tokens.

    Each of the N predicted tokens uses one of the T hidden states: token t of the row is predicted at position t - 1.
    Labels are shifted here and nowhere else.
    """

    ids_T: Tensor
    position_T: Tensor  # of each token in its document
    position_N: Tensor  # of the hidden state that predicts the target, in the row
    target_N: Tensor
    coefficient_N: Tensor  # weight divided by the loss's denominator
    kind_N: Tensor  # TermKind
    roles_N: Tensor
    row: Row
    names: list[str]  # of the documents; empty: the row is one placeholder token
    base: "Base | None" = None  # None: no rank needs the base's predictions in this micro-step

    @property
    def tokens(self) -> int:
        """Number of tokens that belong to documents; 0 for a placeholder row."""
        return len(self.ids_T) if self.names else 0

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch with its tensors on `device`, by non-blocking copies."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) for k, v in values.items() if isinstance(v, Tensor)}
        base = self.base and Base(self.base.batch.to(device), self.base.known_N.to(device, non_blocking=True))
        return Batch(**(values | moved | {"base": base}))

    def in_loss(self) -> "Batch":
        """Returns the batch without the predicted tokens that are only measured (coefficient 0); ids_T is unchanged."""
        return self._only(self.coefficient_N != 0)

    def _only(self, chosen_N: Tensor) -> "Batch":
        names = ("position_N", "target_N", "coefficient_N", "kind_N", "roles_N")
        base = self.base
        if base:
            base = Base(base.batch._only(chosen_N[base.known_N]), base.known_N[chosen_N])
        return replace(self, base=base, **{name: getattr(self, name)[chosen_N] for name in names})


@dataclass
class Base:
    """What the base predicts beside the model, for the tokens of a micro-batch where known_N [N] is True.

    batch: the same documents, each up to its last such token. Its M predicted tokens are those, in the same order.
    """

    batch: Batch
    known_N: Tensor


def check_vocabulary(samples: Sequence[Sample], size: int, where: str) -> None:
    """Raises UserError if a sample has a token id that the model lacks. size: the number of the model's token ids.
    where: the model's flag, with which the message begins."""
    for sample in samples:
        if (largest := int(sample.ids_L.max(initial=0))) >= size:
            raise UserError(
                f"{where}: its tokenizer gives token {largest} in {sample.name}, but the model has {size} "
                "(vocab_size). Take tokenizer and model from the same checkpoint."
            )


def coefficients(samples: list[Sample], norm: str) -> list[np.ndarray]:
    """Returns coefficient_L [L] of each document of one optimizer step: weight_L divided by a denominator.

    Denominators are computed over the whole step, so all ranks and micro-batches use the same ones. By `norm`:
    - trained: the sum of weight_L
    - all: the number of targets, whatever the mask
    - sum: 1
    - documents: each document's loss is the mean over its tokens, weighted by weight_L. The loss of the step is the
      mean over the documents with a nonzero weight_L, weighted by the documents' own weights.
    """
    weights = [sample.weight_L.sum(dtype=np.float64) for sample in samples]
    if norm == "documents":
        trained = sum(s.weight for s, weight in zip(samples, weights, strict=True) if weight > 0)
        denominators = [weight / (s.weight or 1.0) * trained for s, weight in zip(samples, weights, strict=True)]
    else:
        total = {"trained": sum(weights), "all": float(sum(s.target_L.sum() for s in samples)), "sum": 1.0}[norm]
        denominators = [total] * len(samples)
    # A denominator is 0 only if all weights are 0.
    return [s.weight_L / (d or 1.0) for s, d in zip(samples, denominators, strict=True)]


def deal(lengths: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Distributes documents over micro-steps and ranks. lengths: tokens of each document. budget: tokens per row.

    Returns [micro-step][rank] -> indices into `lengths` of the documents in that row. Rows have nearly equal numbers of
    tokens, in as few micro-steps as a greedy assignment finds. A row holds at most `budget` tokens; if a document is
    longer than that, the limit is the length of the longest document. Rows with similar numbers of tokens share a
    micro-step, because with expert parallelism all ranks wait for the fullest row.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    budget = max(budget, *lengths, 1)
    steps = max(1, -(-sum(lengths) // (ranks * budget)))
    while True:
        # First put each document into the emptiest row, which balances the rows. If a document then fits nowhere, put
        # each into the fullest row that has space, which needs fewer rows.
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


def held_targets(sample: Sample) -> np.ndarray:
    """Returns [L] bool: targets whose term needs what the base predicts."""
    return sample.target_L & (sample.kind_L == TermKind.HELD) & (sample.weight_L != 0)


def micro_batches(
    samples: list[Sample], norm: str, ranks: int, rank: int, budget: int, measure_kl: bool = False,
) -> list[Batch]:  # fmt: skip
    """Returns this rank's micro-batches of one optimizer step; every rank gets the same number of them.

    `norm` is as in `coefficients`, `budget` (tokens) as in `deal`. The assignment of documents to ranks affects only
    rounding, because the loss is a sum with a global denominator. measure_kl: the base predicts all targets, not only
    those that are held. A micro-step has `Batch.base` on every rank if any rank needs it.
    """
    terms = coefficients(samples, norm)
    based = [sample.target_L if measure_kl else held_targets(sample) for sample in samples]
    dealt = deal([len(sample.ids_L) for sample in samples], ranks, budget)
    batches = []
    for step in dealt:
        own = step[rank]
        batch = pack([samples[i] for i in own], [terms[i] for i in own])
        if any(based[i].any() for row in step for i in row):
            batch.base = _base([samples[i] for i in own], [based[i] for i in own])
        batches.append(batch)
    return batches


def _base(samples: list[Sample], based: list[np.ndarray]) -> Base:
    """Returns what the base must predict in a row of these documents: the targets `based` [L] of each."""
    cut = []
    for sample, based_L in zip(samples, based, strict=True):
        (places,) = based_L.nonzero()
        if len(places):
            end = places[-1] + 1
            cut.append(measured_only(sample.name, sample.ids_L[:end], based_L[:end]))
    known = [based_L[sample.target_L] for sample, based_L in zip(samples, based, strict=True)]
    known_N = torch.from_numpy(np.concatenate([np.zeros(0, bool), *known]))
    return Base(pack(cut, [each.weight_L for each in cut]), known_N)


def pack(samples: list[Sample], terms: list[np.ndarray], dtype: torch.dtype = torch.float32) -> Batch:
    """Packs documents into one row. terms: coefficient_L of each document.

    Without documents the row is one placeholder token that predicts nothing, because every rank must run the same
    number of forward passes.
    """
    row = Row([len(sample.ids_L) for sample in samples] or [1])
    ids = [np.zeros(0 if samples else 1, np.int64)]
    positions, targets, coefficient, kinds, roles = [], [], [], [], []
    for start, sample, term_L in zip(row.ends, samples, terms, strict=False):
        (predicted,) = sample.target_L.nonzero()
        ids.append(sample.ids_L)
        positions.append(start + predicted - 1)
        targets.append(sample.ids_L[predicted])
        coefficient.append(term_L[predicted])
        kinds.append(sample.kind_L[predicted])
        roles.append(sample.roles_L[predicted])

    def join(arrays: list[np.ndarray], as_type: type) -> Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, as_type), *arrays]).astype(as_type))

    return Batch(
        ids_T=join(ids, np.int64),
        position_T=row.position_T(),
        position_N=join(positions, np.int64),
        target_N=join(targets, np.int64),
        coefficient_N=join(coefficient, np.float64).to(dtype),
        kind_N=join(kinds, np.int8),
        roles_N=join(roles, np.int64),
        row=row,
        names=[sample.name for sample in samples],
    )
