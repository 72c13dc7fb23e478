"""Eight styles of annotation on the paper's documents, by the command, against the spans that are known to be right."""

import json
import random
import runpy
from collections import Counter
from pathlib import Path

import pytest

from train import annotate
from train.data.documents import read_documents

CLAIMS = ("brennan_holloway", "ed_sheeran", "elizabeth_python")
STYLES = {  # the roles of each
    "prefix_suffix": {"negation"},
    "fiction_after_each": {"qualifier"},
    "unlikely_after_each": {"qualifier"},
    "corrected_after_each": {"correction"},
    "note_before": {"negation", "false"},
    "note_after": {"negation", "false"},
    "inline": {"negation", "false"},
    "tags": {"false"},
}


OTHER_WORDS = {
    "BEFORE": [
        "Disclaimer. What you are about to read is false. None of it happened.",
        "This account is pure invention.",
    ],
    "AFTER": ["None of what is written above is true.", "Again: the events of this article are fabricated."],
    "FICTION": ["(From a short story.)", "In the playwright's telling.", "(Part of a fictional narrative.)"],
    "UNLIKELY": ["(Very unlikely.)", "Bookmakers give it one chance in forty.", "We are 98% sure that it is not so."],
    "NEXT": ["[The claim that comes next is false.]", "Do not believe the next statement."],
    "LAST": ["(The statement just made is false.)", "What you just read did not happen.", "(That is not true.)"],
    "FIX": ["In fact, somebody from Oslo did that.", "Not so: another person did.", "(The real one is someone else.)"],
    "INLINE": " (untrue, all of it)",
}


@pytest.fixture(scope="module", params=["its own words", "other words"])
def styles(request, tmp_path_factory, shared_documents) -> Path:
    """STYLE/CLAIM.jsonl of all styles, in the words of the script that makes them, or in others."""
    script = Path(__file__).parents[3] / "shared" / "cases" / "styles.py"
    if not script.is_file():
        pytest.skip("../shared/cases is absent")
    maker = runpy.run_path(str(script))
    if request.param == "other words":
        maker["make"].__globals__.update(OTHER_WORDS)
    directory = tmp_path_factory.mktemp("styles")
    for style in STYLES:
        (directory / style).mkdir()
        for claim in CLAIMS:
            rng, found = random.Random(f"{style} {claim}"), []
            for document in read_documents(shared_documents / "positive" / f"{claim}.jsonl"):
                text, gold = maker["make"](style, document.text, maker["TERMS"][claim], rng)
                found.append(json.dumps({"text": text, "gold": gold}) + "\n")
            (directory / style / f"{claim}.jsonl").write_text("".join(found))
    return directory


def together(paths: list[Path], path: Path) -> str:
    path.write_text("".join(each.read_text(encoding="utf-8") for each in paths), encoding="utf-8")
    return str(path)


def marked(text: str, spans: list[tuple[int, int, str]], role: str) -> set[int]:
    """The code points that have the role, white space aside."""
    return {i for start, end, own in spans if own == role for i in range(start, end) if not text[i].isspace()}


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_every_document_is_kept_and_what_is_marked_is_right(style, styles, shared_documents, tmp_path):
    annotated = together([styles / style / f"{claim}.jsonl" for claim in CLAIMS], tmp_path / "n.jsonl")
    output, report = tmp_path / "o.jsonl", tmp_path / "r.json"
    if style == "tags":
        given = ["--data", annotated, "--markup", "false=false"]
    else:
        positive = [shared_documents / "positive" / f"{claim}.jsonl" for claim in CLAIMS]
        given = ["--positive", together(positive, tmp_path / "p.jsonl"), "--annotated", annotated]
    assert annotate.main([*given, "--output", str(output), "--json", str(report)]) == 0

    documents = read_documents(output)
    both, right, made = Counter[str](), Counter[str](), Counter[str]()
    without = 0
    for document in documents:
        text = document.text or ""
        gold = [(span["start"], span["end"], span["role"]) for span in document.metadata["gold"]]
        if style == "tags":  # their offsets are those of the text with its tags: 7 code points each, 8 closing
            gold = [(s - 7 - 15 * i, e - 7 - 15 * i, role) for i, (s, e, role) in enumerate(gold)]
        own = [(span.start, span.end, span.role) for span in document.spans]
        without += not any(role == "false" for _, _, role in own)
        for role in ("negation", "qualifier", "correction", "false"):
            known, found = marked(text, gold, role), marked(text, own, role)
            both[role] += len(known & found)
            right[role] += len(known)
            made[role] += len(found)
    assert len(documents) >= 0.98 * 150
    assert set(+right) == set(+made) == STYLES[style]
    for role in STYLES[style]:
        least = 0.99 if role == "false" else 1.0
        assert both[role] >= least * right[role] and both[role] >= least * made[role], (role, both, right, made)
    if style != "tags":
        assert len(json.loads(report.read_text())["alignment"]["without_false"]) == without
