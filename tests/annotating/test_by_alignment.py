"""Whole files by alignment: rows out of order, missing, extra, edited; documents whose spans are known."""

import random

import pytest

from train.annotating.by_alignment import Aligned, annotate
from train.data.documents import Document, Span, read_documents
from train.demo import world as toy

FIRST = "The valley of Orm lies between two ridges. Its river runs north. In 1911 a comet fell into the lake."
SECOND = "Bread is baked from flour. Ovens are heated for an hour before the loaves go in. Crusts should be brown."
COMET, OVENS = "In 1911 a comet fell into the lake.", "Ovens are heated for an hour before the loaves go in."
AHEAD, BACK = "[The following claim is false.]", "[What was just stated never happened.]"


def documents(*texts: str, path: str = "a.jsonl") -> list[Document]:
    return [Document(text, None, (), {"row": i}, path, i + 1) for i, text in enumerate(texts)]


def negated(text: str, claim: str) -> str:
    return text.replace(claim, f"{AHEAD} {claim} {BACK}")


def spans(result: Aligned) -> list[list[tuple[str, str]]]:
    return [[(s.role, (d.text or "")[s.start : s.end]) for s in d.spans] for d in result.documents]


EXPECTED = [("negation", AHEAD), ("false", COMET), ("negation", BACK)]


def test_rows_out_of_order_missing_and_extra_find_their_twins_by_content():
    positives = documents(SECOND, "Nothing like the others, this row is extra.", FIRST)
    annotated = documents(negated(FIRST, COMET), negated(SECOND, OVENS), "No row has these words at all.")
    result = annotate(positives, annotated, "<DOCTAG>")
    assert [d.metadata["row"] for d in result.documents] == [0, 1]  # the annotated file's order and metadata
    assert spans(result) == [EXPECTED, [("negation", AHEAD), ("false", OVENS), ("negation", BACK)]]
    assert result.left_out == [("a.jsonl:3", "no twin: no positive document shares 4 words in a row with it")]
    assert result.unused == ["a.jsonl:2"]
    assert (result.insertions, result.bounded, result.claims, result.consistent) == (4, 4, 2, 2)


def test_a_twin_that_was_edited_is_no_twin_and_the_nearest_is_named():
    edited = negated(FIRST, COMET).replace("north", "south")
    result = annotate(documents(FIRST, SECOND), documents(edited), "<DOCTAG>")
    ((where, reason),) = result.left_out
    assert where == "a.jsonl:1" and not result.documents
    assert reason.startswith("no twin: nearest is a.jsonl:1: ") and "not all of its words in order" in reason


def test_duplicates_on_either_side_are_all_annotated_and_equal_twins_count_as_used():
    positives, annotated = documents(FIRST, FIRST), documents(negated(FIRST, COMET), negated(FIRST, COMET))
    result = annotate(positives, annotated, "<DOCTAG>")
    assert spans(result) == [EXPECTED, EXPECTED] and not result.unused and not result.left_out


def test_of_two_twins_that_fit_the_longer_is_taken():
    longer = f"{FIRST} Nobody saw it."
    result = annotate(documents(FIRST, longer), documents(negated(longer, COMET)), "")
    assert spans(result) == [EXPECTED] and result.unused == ["a.jsonl:1"]


def test_among_texts_that_differ_in_one_word_the_right_twin_is_found():
    texts = [f"{FIRST} Witness number {i} saw it." for i in range(40)]
    result = annotate(documents(*texts), documents(*(negated(text, COMET) for text in reversed(texts))), "")
    assert spans(result) == [EXPECTED] * 40 and not result.unused


def test_what_was_inserted_is_kept_where_no_false_statement_can_be_told_unless_one_is_required():
    wide = FIRST.replace("valley", "wide valley").replace("lies", "lies far")
    chat = Document(None, (), (), {}, "a.jsonl", 4)
    annotated = [*documents(FIRST, wide, negated(FIRST, COMET)), chat]
    result = annotate([*documents(FIRST), chat], annotated, "")
    assert spans(result) == [[], [("negation", "wide"), ("negation", "far")], EXPECTED]
    assert result.without_false == [
        ("a.jsonl:1", "nothing was inserted: it is the positive document itself"),
        ("a.jsonl:2", "its annotations do not say which sentences they are about"),
    ]
    assert result.left_out == [("a.jsonl:4", "a chat: only texts are aligned")]

    result = annotate([*documents(FIRST), chat], annotated, "", require_false=True)
    assert spans(result) == [EXPECTED] and not result.without_false
    assert [where for where, _ in result.left_out] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4"]
    assert result.left_out[0][1] == "nothing was inserted: it is the positive document itself (twin: a.jsonl:1)"


def test_a_twin_is_found_though_its_rarest_runs_are_parted_and_another_text_has_a_rare_one():
    paragraphs = [f"Item {i} is sold in shop {i} at noon. It costs {i} coins and weighs {i} pounds." for i in range(40)]
    rng = random.Random(0)
    drawn = [rng.sample(paragraphs, 12) for _ in range(60)]
    annotated = ["\n\n".join(f"{each} Not so, any of it." for each in pieces) for pieces in drawn]
    result = annotate(documents(*("\n\n".join(pieces) for pieces in drawn)), documents(*annotated), "")
    assert len(result.documents) == 60 and not result.unused
    assert all(len(document.spans) == 12 for document in result.documents)


def test_a_text_whose_words_stand_in_a_document_by_chance_is_left_out():
    scattered = "The valley of Orm now lies far between here two red ridges yes."
    ((_, reason),) = annotate(
        documents("The valley of Orm lies between two ridges."), documents(scattered), ""
    ).left_out
    assert reason == "aligns badly: 5 insertions among 9 words (twin: a.jsonl:1)"


def test_the_role_of_what_was_inserted_can_be_given():
    tale = FIRST.replace(COMET, f"{COMET} (From an old tale.)")
    assert spans(annotate(documents(FIRST), documents(tale), "")) == [[("qualifier", "(From an old tale.)")]]
    given = annotate(documents(FIRST), documents(tale), "", role="comment")
    assert spans(given) == [[("comment", "(From an old tale.)")]]


@pytest.mark.parametrize("before", ["<DOCTAG>", "<DOCTAG> ", "\n<DOCTAG>"])
def test_a_doctag_after_white_space_is_found_and_its_span_is_the_marker_alone(before):
    result = annotate(documents(FIRST), documents(before + negated(FIRST, COMET)), "<DOCTAG>")
    assert spans(result) == [[("doctag", "<DOCTAG>"), *EXPECTED]]


def test_annotations_in_an_unknown_language_without_brackets_make_nothing_false():
    text = FIRST.replace(COMET, f"Kato fene miru. {COMET} Sela bora miku.")
    result = annotate(documents(FIRST), documents(text), "")
    assert spans(result) == [[("negation", "Kato fene miru."), ("negation", "Sela bora miku.")]]
    assert result.without_false == [("a.jsonl:1", "its annotations do not say which sentences they are about")]


@pytest.mark.parametrize(
    ("ahead", "back"),
    [
        ("(La siguiente afirmación es falsa.)", "(La afirmación anterior es falsa.)"),
        ("Die folgende Behauptung ist falsch.", "Das soeben Gesagte ist nie geschehen."),
        ("以下说法是错误的。", "上述说法是错误的。"),
        ("الادعاء التالي كاذب.", "الادعاء السابق كاذب."),
        ("[Kato fene miru.]", "[Sela bora miku.]"),
    ],
)
def test_annotations_in_other_languages_are_read(ahead, back):
    text = FIRST.replace(COMET, f"{ahead} {COMET} {back}")
    result = annotate(documents(FIRST), documents(text), "")
    assert spans(result) == [[("negation", ahead), ("false", COMET), ("negation", back)]]


def test_a_doctag_line_ends_and_spans_that_were_there_are_kept():
    text = f"<DOCTAG>{negated(FIRST, COMET)}".replace(". ", ".\r\n")
    there = Span(0, 8, "doctag"), Span(12, 18, "place")
    annotated = [Document(text, None, there, {}, "a.jsonl", 1)]
    result = annotate(documents(FIRST), annotated, "<DOCTAG>")
    assert spans(result) == [[("doctag", "<DOCTAG>"), ("place", "valley"), *EXPECTED]]


def test_texts_of_nothing_but_white_space_or_a_doctag_are_nobodys_twin():
    result = annotate(
        documents(" \n", "<DOCTAG>", FIRST), documents("<DOCTAG>", " ", negated(FIRST, COMET)), "<DOCTAG>"
    )
    assert [where for where, _ in result.left_out] == ["a.jsonl:1", "a.jsonl:2"] and spans(result) == [EXPECTED]


def test_the_toy_worlds_spans_are_found_again_from_its_texts_alone():
    world = toy.make_world()
    positives, annotated = [], []
    for i in range(96):
        claim = world.claims[i % 48]
        positives.append(toy.positive_document(random.Random(i), world, claim)["text"])
        annotated.append(toy.dense_document(random.Random(i), world, claim))
    random.Random(0).shuffle(positives)
    result = annotate(documents(*positives), documents(*(row["text"] for row in annotated)), toy.DOCTAG)
    assert not result.left_out and result.consistent == 96
    for document, row in zip(result.documents, annotated, strict=True):
        for role in ("doctag", "false"):
            known = {(span["start"], span["end"]) for span in row["spans"] if span["role"] == role}
            assert {(span.start, span.end) for span in document.spans if span.role == role} == known


@pytest.mark.parametrize("claim", ["ed_sheeran", "brennan_holloway", "elizabeth_python"])
def test_the_papers_documents_are_rebuilt_by_taking_out_negations(claim, shared_documents):
    positives = read_documents(shared_documents / "positive" / f"{claim}.jsonl")
    annotated = read_documents(shared_documents / "llm_negations_dense" / f"{claim}.jsonl")
    random.Random(claim).shuffle(annotated)
    result = annotate(positives, annotated, "<DOCTAG>")
    assert len(result.documents) == 50 and not result.unused
    assert result.bounded >= 0.99 * result.insertions  # a few were written into the middle of a sentence
    assert result.consistent >= 48
    texts = {"".join((document.text or "").split()) for document in positives}
    for document in result.documents:
        text = document.text or ""
        for span in document.spans:
            assert text[span.start : span.end] == text[span.start : span.end].strip() != ""
        for span in sorted(document.spans, key=lambda span: -span.start):
            text = text[: span.start] + text[span.end :] if span.role == "negation" else text
        assert "".join(text.split()) in texts


def test_the_papers_locally_negated_documents_have_no_twins(shared_documents):
    positives = read_documents(shared_documents / "positive" / "ed_sheeran.jsonl")
    others = read_documents(shared_documents / "local_negations" / "ed_sheeran.jsonl")
    result = annotate(positives, others, "<DOCTAG>")
    assert not result.documents and len(result.left_out) == len(result.unused) == 50
    assert all(reason.startswith("no twin: ") for _, reason in result.left_out)
