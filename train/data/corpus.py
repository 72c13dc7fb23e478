"""All documents of a run, tokenized and with their treatment: everything that is known before a weight is read."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from train.data.batches import Sample
from train.data.documents import Document, read_documents
from train.data.sampling import Order
from train.data.tokenizer import TokenizedDocument, Tokenizer, tokenize_document
from train.errors import UserError
from train.masking.grammar import Mask, parse_mask
from train.masking.treatment import treat
from train.settings import Settings

MAX_ROLES = 62  # one bit each of an int64
BESIDE_ROLES = ("all", "unspanned")  # keys of the summary beside the roles


@dataclass
class Corpus:
    """samples: the documents in the order of --data and of their lines. roles: names of the bits of roles_L, as the
    summary has them: a role called `all` or `unspanned` is role:all or role:unspanned there."""

    samples: list[Sample]
    roles: list[str]
    order: Order
    documents: dict[str, int]  # read, truncated, dropped
    dropped: dict[str, list[int]]  # path -> lines of the documents that are dropped
    counts: list[Counter] = field(repr=False)  # of each document, (role, what) -> targets

    def tokens(self, start: int, stop: int) -> dict[str, dict[str, int]]:
        """role -> total, trained, excluded, unlikelihood, straddling targets of the stream's documents start..stop.
        A token that several roles touch counts for each; `unspanned` are those that none touches."""
        seen = Counter(self.order.documents(start, stop).tolist())
        sums: Counter = Counter()
        for number, times in seen.items():
            for key, count in self.counts[number].items():
                sums[key] += times * count
        kinds = ("total", "trained", "excluded", "unlikelihood", "straddling")
        return {role: {kind: sums[role, kind] for kind in kinds} for role in (*BESIDE_ROLES, *self.roles)}


def read_corpus(
    settings: Settings, tokenizer: Tokenizer, show: bool, known: dict[str, list[TokenizedDocument]] | None = None
) -> Corpus:
    """Reads, tokenizes and treats the documents of --data. UserError for anything wrong in them or in --mask. known:
    path -> its documents, tokenized before for other settings that differ in what is done with them alone; gets those
    that it lacks."""
    mask, known = parse_mask(settings.mask), {} if known is None else known
    sources = [
        (path, [each.document for each in known.get(path, ())] or read_documents(path, settings.doctag or None), count)
        for path, count in settings.sources()
    ]
    documents = [document for _, source, _ in sources for document in source]
    roles = sorted({span.role for document in documents for span in _spans(document)})
    shown = [f"role:{role}" if role in BESIDE_ROLES else role for role in roles]
    _check_roles(mask, roles)
    samples: list[Sample] = []
    counts: list[Counter] = []
    sizes: list[int] = []
    dropped: dict[str, list[int]] = {}
    seen = {"read": len(documents), "truncated": 0, "dropped": 0}
    with tqdm(total=len(documents), desc="tokenizing", unit="doc", disable=not show, mininterval=0.5) as bar:
        for path, source, _ in sources:
            before, whole = len(samples), known.setdefault(path, [])
            for number, document in enumerate(source):
                if number == len(whole):
                    whole.append(tokenize_document(document, tokenizer, add_bos=settings.bos, add_eos=settings.eos))
                # of a copy, so that what is worked out for its treatment is not kept with it
                if (tokenized := _fit(replace(whole[number]), settings, seen)) is not None:
                    sample, count = _treated(tokenized, mask, settings, roles, shown)
                    samples.append(sample)
                    counts.append(count)
                else:
                    dropped.setdefault(path, []).append(document.line)
                bar.update()
            sizes.append(len(samples) - before)
            if not sizes[-1]:
                raise UserError(
                    f"--data {path}: every document is longer than --max-tokens {settings.max_tokens} and "
                    "--long-documents drop leaves none; raise --max-tokens, or use --long-documents truncate."
                )
    if not any(sample.target_L.any() for sample in samples):
        raise UserError(
            f"--data {', '.join(path for path, *_ in sources)}: holds nothing to predict: no document has two tokens, "
            'or no chat a message that is trained on (of the assistant, or with "train": true). Give other documents.'
        )
    if not any(sample.weight_L.any() for sample in samples):
        raise UserError(
            f"--mask {settings.mask}: nothing is left to train on in {', '.join(path for path, *_ in sources)}; every "
            "target is excluded. Mask fewer roles."
        )
    order = Order(sizes, [count for *_, count in sources], settings.seed)
    return Corpus(samples, shown, order, seen, dropped, counts)


def documents_taken(settings: Settings, order: Order) -> int:
    """How many documents of the endless stream a run takes."""
    return settings.steps * settings.batch_size or order.epoch_length * settings.epochs


def documents_read(settings: Settings, dropped: Mapping[str, Sequence[int]]) -> list[Document]:
    """The documents that a run trains on, each once, in the order of --data and of their lines: where a file has more
    than its COUNT, or steps end early, not all of them. dropped: as Corpus has it."""
    documents: list[Document] = []
    sizes, counts = [], []
    for path, count in settings.sources():
        left_out = set(dropped.get(path, ()))
        own = [each for each in read_documents(path, settings.doctag or None) if each.line not in left_out]
        documents += own
        sizes.append(len(own))
        counts.append(count)
    order = Order(sizes, counts, settings.seed)
    return [documents[number] for number in np.unique(order.documents(0, documents_taken(settings, order)))]


def _spans(document: Document) -> list[Any]:
    return [*document.spans, *(span for message in document.messages or () for span in message.spans)]


def _check_roles(mask: Mask, roles: list[str]) -> None:
    if len(roles) > MAX_ROLES:
        raise UserError(f"--data: {len(roles)} roles; at most {MAX_ROLES} can be told apart.")
    for entry in mask.entries:
        if entry.role not in roles:
            raise UserError(
                f"--mask {entry.name}: no document has a span of role {entry.role!r}; the roles in --data are "
                f"{', '.join(roles) or 'none'}. Give documents with such spans, or another mask."
                + (" (--doctag MARKER makes a leading marker a doctag span.)" if entry.role == "doctag" else "")
            )


def _fit(tokenized: TokenizedDocument, settings: Settings, seen: dict[str, int]) -> TokenizedDocument | None:
    """The document as --long-documents has it, and `seen` counted up; None where it is dropped."""
    if len(tokenized.ids_L) <= settings.max_tokens:
        return tokenized
    if settings.long_documents == "error":
        raise UserError(
            f"{tokenized.document.where}: {len(tokenized.ids_L)} tokens, more than --max-tokens {settings.max_tokens}; "
            "raise it, or use --long-documents truncate or drop."
        )
    if settings.long_documents == "drop":
        seen["dropped"] += 1
        return None
    seen["truncated"] += 1
    return tokenized.truncated(settings.max_tokens)


def _treated(
    tokenized: TokenizedDocument, mask: Mask, settings: Settings, roles: list[str], shown: list[str]
) -> tuple[Sample, Counter]:
    """The document with its treatment, and its targets by (role as shown, what)."""
    treatment = treat(tokenized, mask, settings.seed)
    target_L, weight_L = tokenized.target_L, treatment.weight_L
    if settings.chat_weight == "chat" and tokenized.document.messages is not None:
        weight_L = weight_L / (np.abs(weight_L).sum() or np.float32(1))
    roles_L, spanned_L = np.zeros(len(target_L), dtype=np.int64), np.zeros(len(target_L), dtype=bool)
    counts: Counter = Counter()
    kinds = {"total": target_L, "trained": weight_L > 0, "excluded": weight_L == 0, "unlikelihood": weight_L < 0}
    members, crossing_L = {"all": target_L}, np.zeros_like(target_L)
    for role, touched_L in treatment.touched.items():
        bit = roles.index(role)
        roles_L |= touched_L.astype(np.int64) << bit
        spanned_L |= touched_L
        members[shown[bit]] = touched_L
        crossing_L |= treatment.straddling[role]
        counts[shown[bit], "straddling"] = int(treatment.straddling[role].sum())
    members["unspanned"] = ~spanned_L
    for name, which_L in members.items():
        for kind, kind_L in kinds.items():
            counts[name, kind] = int((which_L & target_L & kind_L).sum())
    counts["all", "straddling"] = int(crossing_L.sum())
    counts["all", "random_shortfall"] = treatment.random_shortfall
    counts["all", "unended"] = tokenized.unended
    document = tokenized.document
    name = f"{Path(document.path).name}:{document.line}"
    return Sample(name, tokenized.ids_L, target_L, weight_L, roles_L), counts
