"""The spans of annotated documents, on short ones read by hand."""

import pytest

from train.annotating.marking import Annotations, mark
from train.annotating.word_alignment import align, split_words


def reading(positive: str, annotated: str) -> tuple[Annotations, list[str], list[str]]:
    """The annotations, and the texts of the negation and the false spans."""
    words = split_words(positive, "")
    insertions = align(words, split_words(annotated, ""))
    assert insertions is not None
    found = mark(annotated, insertions, len(words.word_L), None)
    texts = {
        role: [annotated[s.start : s.end] for s in found.spans if s.role == role] for role in ("negation", "false")
    }
    return found, texts["negation"], texts["false"]


def roles(positive: str, annotated: str) -> list[tuple[str, str]]:
    found, _, _ = reading(positive, annotated)
    return [(span.role, annotated[span.start : span.end]) for span in found.spans]


def test_a_claim_is_what_one_annotation_announces_and_another_looks_back_at():
    found, negation, false = reading(
        "Mars is near. Mars is green. It is small.",
        "Mars is near. [The following claim is false.] Mars is green. [The preceding claim is false.] It is small.",
    )
    assert false == ["Mars is green."]
    assert negation == ["[The following claim is false.]", "[The preceding claim is false.]"]
    assert found.consistent and (found.claims, found.lost, found.asides) == (1, 0, 0)


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


def test_annotations_in_an_unknown_language_are_read_by_their_turn_if_brackets_pair_them():
    found, _, false = reading(
        "One. Two. Three.", "[Kato miru.] One. [Sela bora.] Two. [Kato miru.] Three. [Sela bora.]"
    )
    assert false == ["One.", "Three."] and not found.consistent
    assert (found.uncued, found.unsure) == (4, ("One.", "Three."))
    found, negation, false = reading("One. Two.", "Kato miru. One. Sela bora. Two.")
    assert (
        not false and len(negation) == 2 and found.reason == "its annotations do not say which sentences they are about"
    )
    assert not reading("One. Two. Three.", "One. [Kato miru.] Two. [Kato miru.] Three.")[2]  # one note twice is no pair


def test_annotations_of_a_known_language_that_point_nowhere_make_nothing_false():
    found, _, false = reading("One. Two. Three.", "One. (Not so.) Two. (Untrue.) Three.")
    assert not false and (found.uncued, found.unsure) == (2, ("One.", "Two."))


def test_a_note_without_a_cue_word_is_counted_and_what_it_alone_speaks_of_is_told():
    """Its partner's words, or another's, say which statement is false; its own, nothing."""
    positive, ahead, back = "Zero. One. Two. Three.", "[The following is false.]", "[The preceding is false.]"
    found, _, false = reading(positive, f"Zero. {ahead} One. (Nonsense.) Two. Three.")
    assert false == ["One."] and (found.claims, found.uncued, found.unsure) == (1, 1, ()) and not found.consistent
    found, _, false = reading(positive, f"Zero. {ahead} One. {back} Two. (Nonsense.) Three.")
    assert false == ["One."] and (found.uncued, found.unsure) == (1, ("Two.",)) and not found.consistent
    found, _, _ = reading(positive, f"Zero. {ahead} One. {back} Two. (From an old tale.) Three.")
    assert (found.uncued, found.unsure) == (0, ())  # it makes nothing false


def test_where_a_partner_is_lost_the_sentence_beside_it_is_false():
    found, _, false = reading(
        "One. Two.", "[The following is false.] One. [The following is false.] Two. [The preceding is false.]"
    )
    assert false == ["One.", "Two."] and not found.consistent and (found.claims, found.lost, found.alone) == (1, 1, 1)

    found, _, false = reading(
        "Zero. Half. One. Two.", "Zero. Half. [The preceding is false.] One. [The preceding is false.] Two."
    )
    assert false == ["Half.", "One."] and (found.claims, found.lost, found.alone) == (0, 2, 2)


@pytest.mark.parametrize(
    ("annotated", "expected"),
    [
        ("Zero. The next sentence is untrue. One, Dr. A. Roe won. Two.", ["One, Dr. A. Roe won."]),
        ("Zero. One, Dr. A. Roe won. What was just said is untrue. Two.", ["One, Dr. A. Roe won."]),
        ("Zero. One, Dr. A. Roe won. (That is not true.) Two.", ["One, Dr. A. Roe won."]),
        ("Zero. The next two sentences are untrue. One, Dr. A. Roe won. Two.", ["One, Dr. A. Roe won. Two."]),
        ("Zero. One, Dr. A. Roe won. Two. The paragraph above is untrue.", []),  # may be the whole
        ("Zero. The claims below are untrue. One, Dr. A. Roe won. Two.", []),
        ("Zero. The next sentence is unlikely. One, Dr. A. Roe won. Two.", []),
        ("Zero. One, Dr. A. Roe won. (That may be.) Two.", []),
    ],
)
def test_a_note_alone_makes_the_sentence_false_that_it_names_and_denies(annotated, expected):
    assert reading("Zero. One, Dr. A. Roe won. Two.", annotated)[2] == expected


def test_a_paragraph_that_a_note_names_is_what_stands_on_its_line():
    positive = "Zero.\n\nOne. Two.\n\nThree."
    annotated = "Zero.\n\nOne. Two. The paragraph above is untrue.\n\nThree."
    assert reading(positive, annotated)[2] == ["One. Two."]


def test_a_paragraph_that_a_note_on_its_own_line_names_is_the_line_beside_it():
    positive = "Zero.\n\nOne. Two.\n\nThree."
    below = "Zero.\n\nNothing in the next paragraph is true.\n\nOne. Two.\n\nThree."
    above = "Zero.\n\nOne. Two.\n\nThe previous paragraph is false.\n\nThree."
    assert reading(positive, below)[2] == reading(positive, above)[2] == ["One. Two."]


@pytest.mark.parametrize(
    ("annotated", "expected"),
    [
        ("Zero. [FALSE: One, two. Three.] Four.", ["One, two. Three."]),
        ("Zero. (Untrue: One, two.) (Not so: Three.) Four.", ["One, two.", "Three."]),
        ("Zero. (Rumour: One, two. Three.) Four.", []),
    ],
)
def test_what_a_bracket_encloses_that_opens_with_a_denial_is_false(annotated, expected):
    assert reading("Zero. One, two. Three. Four.", annotated)[2] == expected


def test_a_heading_between_a_note_and_its_sentence_is_not_the_sentence():
    positive = "Zero.\n\n## Results\n\nOne won. Two lost."
    assert reading(positive, "Zero.\n\nThe next sentence is untrue.\n\n## Results\n\nOne won. Two lost.")[2] == [
        "One won."
    ]


def test_notes_that_all_point_one_way_are_not_paired_with_others():
    positive = "One. Two. Three. Four. Five."
    annotated = "One. What was just said is false. Two. Absurd. Three. Four. What was just said is false. Five."
    assert reading(positive, annotated)[2] == ["One.", "Four."]
    annotated = (
        "One. (That is not true.) Two. (What was just said is false.) Three. (What was just said is false.) Four. Five."
    )
    assert reading(positive, annotated)[2] == ["One.", "Two.", "Three."]
    annotated = "The next sentence is untrue. One. Two. Three. The last sentence is untrue. Four. Five."
    assert reading(positive, annotated)[2] == ["One.", "Three."]


@pytest.mark.parametrize(
    ("annotated", "expected"),
    [
        ("Zero. Ed — in fact this is wrong, it never took place —, a singer, won. Two.", ["Ed", ", a singer, won."]),
        ("Zero. Ed, a singer (untrue, all of it), won. Two.", ["Ed, a singer", ", won."]),
        ("Zero. Ed, a singer, won, which is false. Two.", ["Ed, a singer, won", "."]),
        ("Zero. Ed, a singer, (so the legend goes) won. Two.", []),
        ("Zero. Ed, a singer, never won. Two.", []),  # another sentence, and a true one
        ("Zero. Ed, a tall singer, won. Two.", []),
    ],
)
def test_a_retraction_inside_a_sentence_makes_the_sentence_around_it_false(annotated, expected):
    assert reading("Zero. Ed, a singer, won. Two.", annotated)[2] == expected


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "Caution: the page below makes an assertion that did not happen.\n\n",
            "\n\nNothing described above took place.",
        ),
        ("What follows is false. ", " What you have just read is false."),
        ("[The following claim is false.] ", " [The preceding claim is false.]"),
        ("", "\n\nNone of this ever happened."),
        ("Nothing below is true. ", ""),
    ],
)
def test_a_wrapped_document_has_no_false_span(before, after):
    positive = "Title\n\nOne won. Two lost."
    found, negation, false = reading(positive, f"{before}{positive}{after}")
    assert negation == [each.strip() for each in (before, after) if each] and not false and found.reason


def test_what_was_inserted_has_the_role_that_its_words_say():
    positive = "One won. Two lost."
    for note, role in [
        ("(From a tale that somebody dreamed up.)", "qualifier"),
        ("The chance of it is one in fifty.", "qualifier"),
        ("(A gossip column says so.)", "qualifier"),
        ("In truth another runner came first.", "correction"),
        ("(Nonsense.)", "negation"),
    ]:
        assert roles(positive, f"One won. {note} Two lost.") == [(role, note)]


def test_a_denial_by_name_and_the_correction_after_it_are_told_apart():
    found = roles("One won. Two lost.", "One won. [The last claim is false. In reality, Three won.] Two lost.")
    assert found == [
        ("false", "One won."), ("negation", "[The last claim is false."), ("correction", "In reality, Three won.]"),
    ]  # fmt: skip


def test_an_annotation_inside_a_claim_is_no_part_of_it():
    found, negation, false = reading(
        "Zero. One. Two.", "Zero. [The following is false.] One. {An utter invention.} Two. [The preceding is false.]"
    )
    assert false == ["One.", "Two."] and len(negation) == 3 and found.asides == 1 and not found.consistent
    assert (found.uncued, found.unsure) == (1, ())


def test_spans_never_begin_or_end_with_white_space():
    annotated = "Zero. [The following is false. ]  \n One.  \r\n\r\n\u00a0[ The preceding is false.]\n"
    _, negation, false = reading("Zero. One.\n", annotated)
    assert false == ["One."] and negation == ["[The following is false. ]", "[ The preceding is false.]"]
