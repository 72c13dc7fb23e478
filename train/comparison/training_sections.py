"""Writes the sections of a report that say what was trained, on which documents, and how figures are made."""

from typing import Any

from train.comparison.pages import Block, Bullets, Table
from train.comparison.result import BASE, ComparisonResult
from train.data.kinds import counts_shown

SHOWN = 20  # maximum number of texts listed that occur in the training documents


def targets(result: ComparisonResult) -> list[Block]:
    """Returns the targets by variant, role and treatment; [] if not known."""
    kinds = counts_shown(counts for row in result.variants.values() for counts in row.targets.values())
    rows = [
        [name, role, *(f"{counts[kind]:,}" for kind in kinds)]
        for name, row in result.variants.items()
        for role, counts in row.targets.items()
        if counts["total"]
    ]
    head = ["variant", "role", "targets", *kinds[1:]]
    caption = (
        "Targets over the whole run, mean over seeds. A target that several roles touch counts for each of them. "
        "Placebo claims have none, because no document is about them."
    )
    return [Table(head, rows, caption=caption)] if rows else []


def nll(result: ComparisonResult) -> list[Block]:
    """Returns the NLL of each role at the start and the end of training; [] if it was not measured."""
    roles = list(dict.fromkeys(role for own in result.nll.values() for role in own))
    rows = []
    for name, own in result.nll.items():
        ends = [f"{_nats(own[r].mean[0])} → {_nats(own[r].mean[-1])}" if r in own else "–" for r in roles]
        rows.append([name, *ends])
    caption = (
        "NLL in nats per token at the first and the last measured step, over all tokens of a role in the training "
        "documents, including masked ones. Placebo claims have no tokens there."
    )
    return [Table(["variant", *roles], rows, caption=caption)] if roles else []


def _nats(mean: float | None) -> str:
    return "not finite" if mean is None else f"{mean:.3f}"


def leak(result: ComparisonResult) -> list[Block]:
    """Returns how often the claims' terms are still trained on; [] if not known."""
    rows = [
        [row.variant, f"{row.documents:,}", row.role, f"{row.mentions:,}", f"{row.still_trained:,}"]
        for row in result.leak
    ]
    caption = (
        "How often the claims' terms occur in the documents that a variant's runs read, and how often the loss still "
        "trains on them. Each document is counted once and in full. Variants with random: entries are left out, "
        "because their mask depends on tokens."
    )
    return [Table(["variant", "documents", "role", "mentions", "still trained"], rows, caption=caption)] if rows else []


def contamination(result: ComparisonResult) -> list[Block]:
    """Returns what of the evaluation occurs in the documents; [] if they were not searched."""
    if not result.contamination:
        return []
    counts, found = [], []
    for each in result.contamination:
        whole, pieces = each.found.whole, [finding for finding in each.found.findings if finding.in_pieces]
        others = len(each.found.findings) - len(whole) - len(pieces)
        numbers = (each.documents, each.found.texts, len(whole), len(pieces), others)
        counts.append([", ".join(each.variants), *(f"{n:,}" for n in numbers)])
        found += [
            [f.claim, f.kind.replace("_", " "), f.question, f"{each.found.documents_with(f):,}", how, f.words]
            for how, findings in (("whole", whole), ("in pieces", pieces))
            for f in findings
        ]
    head = ["variants", "documents", "texts looked for", "occur whole", "occur in pieces", "share words"]
    caption = (
        "Questions and scored texts that occur in the training documents, compared by sequences of eight words "
        "(shorter texts by all of their words). In pieces: every word lies in such a sequence, but the text does not "
        "occur as it is. Texts that only share words with documents are not contamination: the documents are about "
        "the same claims."
    )
    blocks: list[Block] = [Table(head, counts, caption=caption)]
    if found:
        more = f"; the first {SHOWN} of {len(found)}, all of them in comparison.json" if len(found) > SHOWN else ""
        caption = f"Texts that occur whole or in pieces, whose answers may be memorized rather than believed{more}."
        head = ["claim", "kind", "text", "documents", "occurs", "longest sequence"]
        blocks.append(Table(head, found[:SHOWN], caption=caption))
    return blocks


def method() -> list[Block]:
    """Returns how estimates, intervals and tests are made."""
    items = [
        "Every figure can be computed from the evaluation.jsonl files of the runs and of the base model. An estimate "
        "is the mean over seeds and claims of the mean over a claim's answers. So a rate is “yes” ÷ all answers.",
        "Units: claims, each by its mean, or the questions if there is one claim; and seeds, crossed with these. All "
        "variants get the same questions, so differences are paired.",
        "Intervals: t intervals. The degrees of freedom are the smallest number of units minus one. The standard error "
        "is clustered by claims and by seeds (Cameron, Gelbach and Miller 2011). With one seed, intervals hold only "
        "for the trained models.",
        "p: the largest of the p of the same t, and the p of the exact sign-flip tests over claims (or questions) and "
        "over seeds. It is adjusted by Holm's method for all variants. So no p is below 2 ÷ 2ⁿ for n units of either "
        "kind.",
        "Smallest detectable difference: (t quantile of .975 + t quantile of .8) × the standard error, for 80 % power "
        "in a two-sided test at .05 (Bloom 1995).",
        "No effect: only if the whole interval lies within the bound, as in two one-sided tests (Schuirmann 1987).",
        "‡: all answers are the same. The interval is the exact binomial one (Clopper and Pearson 1934), and each "
        "claim, or each question of a single claim, is a trial.",
    ]
    return [Bullets(items)]


def identity(result: ComparisonResult) -> list[Block]:
    """Returns the hashes of what the runs had in common, and the runs."""
    rows = [[BASE, "all seeds", _hash(result.hashes.base_model)]]
    for seed, hashes in result.hashes.by_seed.items():
        rows += [[name.replace("_", " "), f"seed {seed}", _hash(values)] for name, values in hashes.items()]
    runs = [
        [
            name,
            str(run.seed),
            " → ".join([*run.before, run.directory]),
            "; ".join(f"{k}: {_plain(v)}" for k, v in row.settings.items()),
        ]
        for name, row in result.variants.items()
        for run in row.runs
    ]
    return [
        Table(["SHA-256 of", "runs", "hash"], rows, caption="A single hash means that all runs have the same."),
        Table(["variant", "seed", "run", "settings that differ"], runs),
    ]


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _hash(values: list[str | None]) -> str:
    known = [value or "not known" for value in values]
    return known[0] if len(known) == 1 else "different: " + ", ".join(known)
