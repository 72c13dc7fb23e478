"""Reads, tokenizes and treats all documents of a run: everything that is known before any model weight is read."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from train.config.settings import Settings
from train.data.batches import Sample
from train.data.documents import LARGEST, SMALLEST, Document, read_documents
from train.data.findings import NO_TARGET, SKIPPED, Findings
from train.data.kinds import COUNTED, COUNTS, TermKind
from train.data.sampling import Order
from train.data.tokenizer import Tokenizer
from train.data.tokens import TokenizedDocument, tokenize_documents
from train.masking.grammar import Mask, parse_mask
from train.masking.treatment import treat
from train.runtime.errors import UserError

MAX_ROLES = 62  # one bit each of an int64
BESIDE_ROLES = ("all", "unspanned")  # keys of the summary beside the roles


@dataclass
class Corpus:
    """All documents of a run.

    samples: in the order of --data and of their lines. roles: names of the bits of roles_L as in the summary, where a
    role called `all` or `unspanned` is role:all or role:unspanned.
    """

    samples: list[Sample]
    roles: list[str]
    order: Order
    documents: dict[str, int]  # numbers of those read, truncated, dropped, skipped
    dropped: dict[str, list[int]]  # path -> lines of the documents that are dropped or skipped
    findings: Findings
    counts: list[Counter] = field(repr=False)  # for each document: (role, kind) -> number of targets

    def tokens(self, start: int, stop: int) -> dict[str, dict[str, int]]:
        """Returns role -> numbers of total, trained, excluded, unlikelihood, held and straddling targets in the
        documents [start, stop) of the stream. A token that several roles touch counts for each; `unspanned` counts
        tokens that no role touches."""
        seen = Counter(self.order.documents(start, stop).tolist())
        sums: Counter = Counter()
        for number, times in seen.items():
            for key, count in self.counts[number].items():
                sums[key] += times * count
        kinds = (*COUNTS, "straddling")
        return {role: {kind: sums[role, kind] for kind in kinds} for role in (*BESIDE_ROLES, *self.roles)}


@dataclass
class TokenizedFile:
    """The tokenized documents of a file, and the findings about all of its rows."""

    documents: list[TokenizedDocument]
    findings: Findings


def read_corpus(
    settings: Settings, tokenizer: Tokenizer, show: bool, known: dict[str, TokenizedFile] | None = None
) -> Corpus:
    """Reads, tokenizes and treats the documents of --data. Raises UserError for any mistake in them or in --mask.

    show: with a progress bar. known: path -> documents tokenized before, for settings that differ from these only in
    the treatment of documents. Files that are missing from it are added.
    """
    mask, known = parse_mask(settings.mask), {} if known is None else known
    _tokenize_files(settings, tokenizer, show, known)
    files = [known[source.path] for source in settings.sources()]
    roles = sorted({span.role for file in files for each in file.documents for span in each.document.all_spans})
    shown = shown_roles(roles, "--data")
    _check_roles(mask, roles, settings.doctag)
    seen, dropped, findings = dict.fromkeys(("read", "truncated", "dropped", "skipped"), 0), {}, Findings()
    samples: list[Sample] = []
    counts: list[Counter] = []
    sizes, cut_away = [], 0
    for source, file in zip(settings.sources(), files, strict=True):
        findings.include(file.findings)
        lines = [line for _, line, _ in file.findings.places.get(SKIPPED, ())]
        seen["read"] += len(file.documents)
        seen["skipped"] += len(lines)
        before = len(samples)
        for whole in file.documents:
            # a copy, so that what the treatment caches on it does not stay in memory
            tokenized = _fit(replace(whole), settings, seen)
            if tokenized is None:
                lines.append(whole.document.line)
                continue
            if whole.target_L.any() and not tokenized.target_L.any():
                findings.add(NO_TARGET, whole.document.path, whole.document.line, "cut away by --max-tokens")
                cut_away += 1
            sample, count = _treated(tokenized, mask, settings, source.weight, roles, shown)
            samples.append(sample)
            counts.append(count)
        if lines:
            dropped[source.path] = sorted(lines)
        sizes.append(len(samples) - before)
        if not sizes[-1]:
            raise UserError(
                f"--data {source.path}: every document is longer than --max-tokens {settings.max_tokens} and "
                "--long-documents drop leaves none; raise --max-tokens, or use --long-documents truncate."
            )
    _check_targets(samples, findings, settings, cut_away)
    order = Order(sizes, [source.count for source in settings.sources()], settings.seed)
    return Corpus(samples, shown, order, seen, dropped, findings, counts)


def _tokenize_files(settings: Settings, tokenizer: Tokenizer, show: bool, known: dict[str, TokenizedFile]) -> None:
    """Reads and tokenizes the files of --data that are not in `known`, and adds them to it."""
    read = {}
    for path in {source.path: None for source in settings.sources() if source.path not in known}:
        findings = Findings()
        read[path] = read_documents(path, settings.marker, settings.bad_rows, findings), findings
    total = sum(len(documents) for documents, _ in read.values())
    with tqdm(total=total, desc="tokenizing", unit="doc", disable=not (show and total), mininterval=0.5) as bar:
        for path, (documents, findings) in read.items():
            tokenized = tokenize_documents(
                documents, tokenizer, findings, settings.bad_rows, add_bos=settings.bos, add_eos=settings.eos,
                each=bar.update,
            )  # fmt: skip
            known[path] = TokenizedFile(tokenized, findings)


def _check_targets(samples: list[Sample], findings: Findings, settings: Settings, cut_away: int) -> None:
    """Raises UserError if nothing is trained."""
    files = ", ".join(source.path for source in settings.sources())
    if not any(sample.target_L.any() for sample in samples):
        if cut_away:
            raise UserError(
                f"--max-tokens {settings.max_tokens}: truncates everything that is trained on in {files}: in "
                f"{cut_away:,} documents it begins after this many tokens. Raise it."
            )
        raise UserError(
            f"--data {files}: holds nothing to predict: no chat has a message that is trained on (of the assistant, or "
            'with "train": true). Give other documents.' + "".join(f" {line}." for line in findings.lines())
        )
    if not any(sample.weight_L.any() for sample in samples):
        raise UserError(
            f"--mask {settings.mask}: nothing is left to train on in {files}; every target is excluded, or has the "
            "weight 0. Mask fewer roles, or give weights above 0."
        )
    if not any((sample.weight_L[sample.kind_L != TermKind.HELD] != 0).any() for sample in samples):
        raise UserError(
            f"--mask {settings.mask}: all that is left in the loss of {files} is held to the base, so nothing would "
            "change the model. Train on some tokens too."
        )


def documents_taken(settings: Settings, order: Order) -> int:
    """Returns the number of documents that a run takes from the endless stream."""
    return settings.steps * settings.batch_size or order.epoch_length * settings.epochs


def documents_drawn(settings: Settings, dropped: Mapping[str, Sequence[int]]) -> list[tuple[Document, int]]:
    """Returns the documents that a run trains on, each once and with how often, in the order of --data and of their
    lines. These are not all documents if a file has more than its COUNT, or if the steps end early.

    dropped: as in Corpus. Raises UserError as read_documents does.
    """
    documents: list[Document] = []
    sizes = []
    for source in settings.sources():
        left_out = set(dropped.get(source.path, ()))
        found = read_documents(source.path, settings.marker, settings.bad_rows)
        own = [each for each in found if each.line not in left_out]
        documents += own
        sizes.append(len(own))
    order = Order(sizes, [source.count for source in settings.sources()], settings.seed)
    numbers, times = np.unique(order.documents(0, documents_taken(settings, order)), return_counts=True)
    return [(documents[number], int(count)) for number, count in zip(numbers, times, strict=True)]


def shown_roles(roles: Sequence[str], flag: str) -> list[str]:
    """Returns the names under which results show roles, as in Corpus. Raises UserError, which begins with `flag`, for
    more than MAX_ROLES."""
    if len(roles) > MAX_ROLES:
        raise UserError(f"{flag}: {len(roles)} roles; at most {MAX_ROLES} are supported.")
    return [f"role:{role}" if role in BESIDE_ROLES else role for role in roles]


def _check_roles(mask: Mask, roles: list[str], doctag: str) -> None:
    for entry in mask.entries:
        if entry.role and entry.role not in roles:
            raise UserError(
                f"--mask {entry.name}: no document has a span of role {entry.role!r}; the roles in --data are "
                f"{', '.join(roles) or 'none'}. Give documents with such spans, or another mask."
                + (f" (No document starts with --doctag {doctag}.)" if entry.role == "doctag" else "")
            )


def _fit(tokenized: TokenizedDocument, settings: Settings, seen: dict[str, int]) -> TokenizedDocument | None:
    """Applies --long-documents to a document and counts it in `seen`. Returns None if the document is dropped. Raises
    UserError if it is too long and --long-documents is error."""
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
    tokenized: TokenizedDocument, mask: Mask, settings: Settings, factor: float, roles: list[str], shown: list[str]
) -> tuple[Sample, Counter]:
    """Returns the document with its treatment, times its source's weight (`factor`), and its number of targets by (role
    as shown, kind). Raises UserError if its weights are too small or too large."""
    treatment, document = treat(tokenized, mask, settings.seed), tokenized.document
    target_L, weight_L = tokenized.target_L, treatment.weight_L.astype(np.float64) * factor
    if settings.chat_weight == "chat" and document.messages is not None:
        # counts all targets, so that leaving some out by mask or weight does not change the others
        weight_L = weight_L / max(1, target_L.sum())
    size_L = weight_L[weight_L != 0]
    if len(size_L) and not SMALLEST <= size_L.min() <= size_L.max() <= LARGEST:
        raise UserError(
            f"{document.where}: its weights by mask, document, message and --data come to {size_L.min():g} to "
            f"{size_L.max():g}; they must be 0 or from {SMALLEST:.0e} to {LARGEST:.0e}, as losses are fp32. "
            "Use less extreme weights."
        )
    weight_L = weight_L.astype(np.float32)
    roles_L, spanned_L = np.zeros(len(target_L), dtype=np.int64), np.zeros(len(target_L), dtype=bool)
    counts: Counter = Counter()
    kinds = {"total": target_L, "excluded": weight_L == 0} | {
        counted: (weight_L != 0) & (treatment.kind_L == kind) for kind, counted in COUNTED.items()
    }
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
    name = f"{Path(document.path).name}:{document.line}"
    weight = document.weight * factor
    return Sample(name, tokenized.ids_L, target_L, weight_L, treatment.kind_L, roles_L, weight), counts
