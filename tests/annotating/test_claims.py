"""Which annotations announce and which look back, on short documents read by hand."""

import pytest

from train.annotating.alignment import align, split_words
from train.annotating.claims import Annotations, read, split_parts
from train.annotating.cues import direction


def reading(positive: str, annotated: str) -> tuple[Annotations, list[str], list[str]]:
    """The annotations, and the texts of the negation and the false spans."""
    words = split_words(positive, "")
    insertions = align(words, split_words(annotated, ""))
    assert insertions is not None
    found = read(annotated, insertions, len(words.word_L))
    texts = {
        role: [annotated[s.start : s.end] for s in found.spans if s.role == role] for role in ("negation", "false")
    }
    return found, texts["negation"], texts["false"]


@pytest.mark.parametrize(
    ("sentence", "ahead"),
    [
        ("The following claim is false.", True),
        ("Do not accept the statement below.", True),
        ("What follows never happened, whatever was said above.", True),
        ("The next sentence is a lie.", True),
        ("False claim:", True),
        ("What was just stated is untrue.", False),
        ("The preceding claim is false, as is what follows from it.", False),
        ("Nothing in the sentence you just read took place.", False),
        ("That was false.", False),
        ("La siguiente afirmación es falsa.", True),
        ("L'affirmation précédente est fausse.", False),
        ("Die folgende Behauptung ist falsch.", True),
        ("Das soeben Gesagte ist nie geschehen.", False),
        ("Следующее утверждение ложно.", True),
        ("以下说法是错误的。", True),
        ("上記の主張は誤りです。", False),
        ("الادعاء التالي كاذب.", True),
    ],
)
def test_the_first_word_that_points_says_the_direction(sentence, ahead):
    assert direction(sentence) > 0 if ahead else direction(sentence) < 0


def test_a_sentence_that_points_nowhere_has_no_direction():
    assert direction("The claimed medal is an invention.") == 0 and direction("Kato fene miru.") == 0


def test_parts_are_brackets_and_sentences_and_the_sentences_of_a_bracket_belong_together():
    text = "Not so. [One. Two.] {Three (3.1 m)}\n“Four?” 五。六。"
    parts = split_parts(text, 0, len(text))
    assert [text[part.start : part.end] for part in parts] == [
        "Not so.", "[One.", "Two.]", "{Three (3.1 m)}", "“Four?”", "五。", "六。",
    ]  # fmt: skip
    assert [part.kind for part in parts] == ["", "[", "[", "{", "", "", ""]
    assert [part.joined for part in parts] == [False, False, True, False, False, False, False]


def test_a_claim_is_what_one_annotation_announces_and_another_looks_back_at():
    found, negation, false = reading(
        "Mars is near. Mars is green. It is small.",
        "Mars is near. [The following claim is false.] Mars is green. [The preceding claim is false.] It is small.",
    )
    assert false == ["Mars is green."]
    assert negation == ["[The following claim is false.]", "[The preceding claim is false.]"]
    assert found.consistent and (found.claims, found.lost, found.uncued) == (1, 0, 0)


def test_annotations_that_stand_together_are_told_apart():
    _, negation, false = reading(
        "One. Two. Three.",
        "The claim below is false. One. What was just stated is false. It never was. The following claim is false. No "
        "proof exists. Two. <The claim above is false.> (What follows is false.) Three. (What was just said is false.)",
    )
    assert false == ["One.", "Two.", "Three."]
    assert negation == [
        "The claim below is false.", "What was just stated is false. It never was.",
        "The following claim is false. No proof exists.", "<The claim above is false.>", "(What follows is false.)",
        "(What was just said is false.)",
    ]  # fmt: skip


def test_a_claim_may_be_a_list_a_table_or_several_paragraphs():
    claim = "Winners:\n\n1. Ed\n2. Al\n\n| a | b |\n|---|---|"
    _, _, false = reading(f"Intro.\n\n{claim}", f"Intro.\n\n[The following is false.] {claim} [The above is false.]")
    assert false == [claim]


def test_what_a_blank_line_sets_off_at_either_end_is_about_the_whole():
    positive = "Title\n\nOne. Two.\n\nBye."
    before, after = "The claims in the document below are false. None happened.", "The document above is wholly false."
    found, negation, false = reading(positive, f"{before}\n\n{positive}\n\n{after}")
    assert negation == [before, after] and not false and found.consistent

    found, negation, false = reading(
        "One. Two.", f"{before}\n\n[The following is false.] One. [The preceding is false.] Two.\n\n{after}"
    )
    assert negation == [before, "[The following is false.]", "[The preceding is false.]", after]
    assert false == ["One."] and found.consistent

    _, negation, false = reading("One. Two.", "[The following is false.]\n\nOne. [The preceding is false.] Two.")
    assert negation == ["[The following is false.]", "[The preceding is false.]"] and false == ["One."]


def test_annotations_that_point_nowhere_are_read_by_their_turn_and_counted():
    found, _, false = reading(
        "One. Two. Three.", "[Kato miru.] One. [Sela bora.] Two. [Kato miru.] Three. [Sela bora.]"
    )
    assert false == ["One.", "Three."] and found.consistent
    assert (found.uncued, found.unbracketed) == (4, 0)
    found, _, false = reading("One. Two.", "Kato miru. One. Sela bora. Two.")
    assert (found.uncued, found.unbracketed) == (2, 2)


def test_where_a_partner_is_lost_a_single_sentence_is_the_claim_and_of_several_none_is():
    found, _, false = reading(
        "One. Two.", "[The following is false.] One. [The following is false.] Two. [The preceding is false.]"
    )
    assert false == ["One.", "Two."] and not found.consistent and (found.lost, found.mended) == (1, 1)

    found, _, false = reading(
        "Zero. Half. One. Two.", "Zero. Half. [The preceding is false.] One. [The preceding is false.] Two."
    )
    assert false == ["One."] and (found.claims, found.lost, found.mended) == (0, 2, 1)


def test_an_annotation_inside_a_claim_is_no_part_of_it():
    found, negation, false = reading(
        "One. Two.", "[The following is false.] One. {An utter invention.} Two. [The preceding is false.]"
    )
    assert false == ["One.", "Two."] and len(negation) == 3 and found.asides == 1 and not found.consistent


def test_spans_never_begin_or_end_with_white_space():
    annotated = "[The following is false. ]  \n One.  \r\n\r\n\u00a0[ The preceding is false.]\n"
    _, negation, false = reading(" One.\n", annotated)
    assert false == ["One."] and negation == ["[The following is false. ]", "[ The preceding is false.]"]
