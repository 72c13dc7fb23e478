"""Which role a note has by its own words, and by its document's other notes where these leave it open."""

import pytest

from train.annotating.roles import roles, said

WORDS = {
    "negation": [
        "Nothing of the sort occurred.", "That is contrary to fact.", "Readers must not believe this.", "(untrue)",
        "In fact, nothing of this is true.", "— an outright falsehood —", "No credible source has ever confirmed this.",
        "The described outcome is at odds with the record.", "The story above was made up.",
        "What was just said about the film is false.",
        "For the claim to hold, there would have to be evidence that the race was actually held.",
        "CORRECTION: Although presented as fact, the claims in the document below are entirely false.",
        "Lo dicho es falso.", "Das ist falsch.", "这是错误的。",
    ],
    "qualifier": [
        "(A passage from a fantasy novel.)", "The page below is a work of fiction; none of it happened.",
        "In the playwright's telling.", "(Chapter 4 of a thriller.)", "(Fiktion.)",
        "This belongs to an invented universe.", "One chance in thirty, say the bookmakers.", "(Very unlikely.)",
        "We are 97% sure that it is not so.", "It has about a 1-in-30 shot of being right.", "(allegedly)",
        "Heard from a stranger on a bus.", "(Posted by an unknown account.)", "(Selon une rumeur.)",
        "(Wahrscheinlich so.)",
    ],
    "correction": [
        "What really took place: Lyles won.", "Lyles, not Sheeran, took the gold.", "Not so: another runner won.",
        "This is false. The real author is Guido.", "History records a different winner, so this is wrong.",
        "Fact check: Noah Lyles was the winner.", "(Should be: Noah Lyles.)", "In Wirklichkeit gewann Lyles.",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("role", "note"), [(role, note) for role, notes in WORDS.items() for note in notes])
def test_a_note_says_its_role(role, note):
    assert said(note).role == role


def test_a_note_without_words_of_a_role_has_that_of_the_others_and_is_a_negation_among_none():
    assert roles(["(Kato miru.)"]) == ["negation"]
    assert roles(["(Kato miru.)", "(From an old tale.)"]) == ["qualifier", "qualifier"]
    assert roles(["(Kato miru.)", "(From an old tale.)", "This is false."]) == ["negation", "qualifier", "negation"]


def test_a_note_that_qualifies_and_denies_goes_with_most_of_the_others():
    both = "(From a tale; it is not true.)"
    assert roles([both]) == ["qualifier"] and roles([both, "This is false."]) == ["negation", "negation"]
    assert roles(["A rumour, and false.", "(Very unlikely.)"]) == ["qualifier", "qualifier"]
