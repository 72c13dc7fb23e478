"""Says what the documents of a comparison's runs hold: the claims' terms that are still trained on, and what of the
evaluation occurs in them."""

import dataclasses
import json
import re
from collections import Counter
from statistics import fmean

from train.annotating.leaks import leaks
from train.annotating.texts import texts
from train.claims.claim import Claim
from train.claims.contamination import check
from train.claims.releases import claim_id
from train.comparison.compared import ComparedVariant, Mentions, RunResult, SearchedDocuments
from train.config.settings import Settings
from train.corpus import documents_drawn
from train.data.documents import Document
from train.masking.grammar import parse_mask
from train.runtime.patterns import Pattern

# Settings that decide which documents are read.
SELECTING = ("data", "doctag", "bad_rows", "steps", "epochs", "batch_size", "seed")
CLAIM_KEYS = ("claim", "fact_name")  # in a document's metadata: the claim that it is about


def by_part(variants: list[ComparedVariant]) -> dict[str, list[RunResult]]:
    """Returns the runs of each variant by its name; of a variant with phases, those of each phase, whose name is then
    a part of the key."""
    parts: dict[str, list[RunResult]] = {}
    for variant in variants:
        for i in range(len(variant.runs[0].parts)):
            phase = variant.phases[i] if variant.phases else f"phase {i + 1}"
            name = f"{variant.name}: {phase}" if variant.runs[0].phases else variant.name
            parts[name] = [run.parts[i] for run in variant.runs]
    return parts


Drawn = list[tuple[Document, int]]
"""The documents that a run was trained on, and how often each."""


def documents_of(parts: dict[str, list[RunResult]]) -> dict[str, list[Drawn]]:
    """Returns {variant or phase: the documents of each of its runs}. Raises UserError if they cannot be read."""
    read: dict[str, Drawn] = {}
    found: dict[str, list[Drawn]] = {}
    for name, runs in parts.items():
        for run in runs:
            settings = Settings(**{key: run.settings[key] for key in SELECTING if key in run.settings})
            if run.summary.get("steps", 0) < run.summary.get("steps_of_schedule", 0):  # --stop-after
                settings = dataclasses.replace(settings, steps=run.summary["steps"])
            dropped = run.summary.get("dropped") or {}
            key = json.dumps([dataclasses.asdict(settings), dropped], sort_keys=True)
            read[key] = read.get(key) or documents_drawn(settings, dropped)
            found.setdefault(name, []).append(read[key])
    return found


def mentions_trained(
    parts: dict[str, list[RunResult]], claims: list[Claim], drawn: dict[str, list[Drawn]]
) -> dict[str, float]:
    """Returns {variant: how many mentions of the claims' terms a run trains on}, the mean over its runs; a document
    that a run reads several times counts as often. Leaves out variants with random: entries, as leak_rows does. {} if
    no claim has patterns."""
    claims = [claim for claim in claims if claim.patterns]
    found = {}
    for name, runs in parts.items() if claims else ():
        mask = parse_mask(runs[0].settings.get("mask", "none"))
        if any(entry.random for entry in mask.entries):
            continue
        trained: Counter[str] = Counter()
        for claim in claims:
            patterns = [Pattern(pattern) for pattern in claim.patterns]
            for row in leaks(about(claim, each_once(drawn[name])), patterns, mask)["documents"]:
                trained[row["document"]] += row["trained"]
        found[name] = fmean(sum(times * trained[d.where] for d, times in own) for own in drawn[name])
    return found


def each_once(runs: list[Drawn]) -> list[Document]:
    """Returns the documents of several runs, each once."""
    return list({document.where: document for own in runs for document, _ in own}.values())


def contamination_rows(claims: list[Claim], documents: dict[str, list[Document]]) -> list[SearchedDocuments]:
    """Returns, for each set of documents, which variants were trained on it, and what of the evaluation occurs in
    it."""
    sets: dict[frozenset[str], list[str]] = {}
    for name, own in documents.items():
        sets.setdefault(frozenset(document.where for document in own), []).append(name)
    return [SearchedDocuments(names, len(places), check(claims, documents[names[0]])) for places, names in sets.items()]


def leak_rows(
    parts: dict[str, list[RunResult]], claims: list[Claim], documents: dict[str, list[Document]]
) -> list[Mentions]:
    """Returns how often the claims' terms occur in the documents of each variant or phase, and how often they are
    trained on; one row per variant or phase, and role. Returns [] if no claim has patterns. Leaves out those with
    random: entries, because which mentions those mask depends on tokens."""
    claims = [claim for claim in claims if claim.patterns]
    rows = []
    for name, runs in parts.items() if claims else ():
        mask = parse_mask(runs[0].settings.get("mask", "none"))
        if any(entry.random for entry in mask.entries):
            continue
        roles: dict[str, list[int]] = {}
        for claim in claims:
            patterns = [Pattern(pattern) for pattern in claim.patterns]
            found = leaks(about(claim, documents[name]), patterns, mask)
            for role, counts in found["roles"].items():
                both = roles.setdefault(role, [0, 0])
                both[0] += counts["mentions"]
                both[1] += counts["trained"]
        for role, (mentions, still) in roles.items():
            rows.append(Mentions(name, len(documents[name]), role, mentions, still))
    return rows


def about(claim: Claim, documents: list[Document]) -> list[Document]:
    """Returns the documents whose metadata say that they are about the claim; all documents if none says what it is
    about."""
    own = [d for d in documents if claim.id in (claim_id(str(d.metadata.get(key))) for key in CLAIM_KEYS)]
    said = any(key in document.metadata for document in documents for key in CLAIM_KEYS)
    return own if said else documents


def unmentioned(claims: list[Claim], documents: list[Document]) -> list[str]:
    """Returns the ids of the claims that no document mentions. A document mentions a claim if it is about it and
    contains one of its terms: a match of the claim's patterns or, without patterns, its subject. Without both, being
    about it is enough."""

    def mentioned(claim: Claim) -> bool:
        terms = claim.patterns or ((re.escape(claim.subject),) if claim.subject else ())
        patterns = [Pattern(term) for term in terms]
        return any(
            not patterns or any(pattern.is_in(text) for pattern in patterns)
            for document in about(claim, documents)
            for text, _, _ in texts(document)
        )

    return [claim.id for claim in claims if not mentioned(claim)]
