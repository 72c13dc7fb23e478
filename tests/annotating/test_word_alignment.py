"""Insertions against a positive twin, on texts whose insertions are known."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.annotating.word_alignment import align, balanced, bounded, split_words

DOCTAG = "<DOCTAG>"


def inserted(positive: str, annotated: str) -> list[str] | None:
    found = align(split_words(positive, DOCTAG), split_words(annotated, DOCTAG))
    return None if found is None else [annotated[each.start : each.end] for each in found]


def test_words_are_letters_and_digits_in_a_row_or_single_marks_and_a_leading_doctag_is_left_out():
    words = split_words("<DOCTAG>It's *9.79* s_1 <DOCTAG>é日々", DOCTAG)
    assert words.word_L == ["It", "'", "s", "*", "9", ".", "79", "*", "s", "_", "1", DOCTAG, "é", "日", "々"]
    assert [words.text[a:b] for a, b in zip(words.start_L, words.end_L, strict=True)] == words.word_L
    assert split_words("<DOCTAG>", DOCTAG).word_L == [] and split_words("<DOCTAG>", "").word_L == ["<", "DOCTAG", ">"]


def test_an_edge_costs_nothing_after_a_sentence_or_line_and_more_within_one():
    #                  One . ) Two \n three four -
    assert split_words("One.) Two\nthree four-", "").edge_L == [0, 6, 2, 0, 0, 4, 6, 0]


def test_an_annotation_is_one_insertion_however_many_of_its_words_the_twin_has():
    positive = "The race was won. The crowd was wild."
    annotated = "[The following race was not won.] The race was won. [The race above was not.] The crowd was wild."
    assert inserted(positive, annotated) == ["[The following race was not won.]", "[The race above was not.]"]


@pytest.mark.parametrize(
    ("positive", "annotated", "expected"),
    [
        ("A b. [C] d.", "A b. [No.] [C] d.", ["[No.]"]),
        ("(A b.) (C d.)", "(A b.) (No.) (C d.)", ["(No.)"]),
        ("A b. It ends.", "A b. It never did. It ends.", ["It never did."]),
        ('He said "go." I went.', 'He said "go." It is false. I went.', ["It is false."]),
        ("A b.\n- C d.", "A b.\n- (False.) C d.", ["(False.)"]),
        ("A b.", "Not so: A b. False.", ["Not so:", "False."]),
        ("天是绿的。他走了。", "【以下有误。】天是绿的。【上述有误。】他走了。", ["【以下有误。】", "【上述有误。】"]),
        ("艾德赢了百米赛。", "艾德（这是假的）赢了百米赛。", ["（这是假的）"]),
        ("A\r\nb c.\r\n", "[No.]\nA\nb c. [No.]\n", ["[No.]", "[No.]"]),
        ("<DOCTAG>A b.", "A b. [No.]", ["[No.]"]),
        ("A b.", "<DOCTAG> [No.] A b.", ["[No.]"]),
    ],
)
def test_insertions_slide_to_brackets_and_sentences(positive, annotated, expected):
    assert inserted(positive, annotated) == expected


def test_a_text_whose_words_do_not_all_follow_in_order_is_no_twin():
    assert inserted("The race was won by Ed.", "[False.] The race was lost by Ed.") is None
    assert inserted("One two.", "two One.") is None
    assert inserted("One two.", "") is None


def test_taking_out_insertions_always_gives_the_twin_again():
    rng = random.Random(0)
    for _ in range(300):
        positive = rng.choices(["a", "b", ".", "[", "]", "\n"], k=rng.randrange(12))
        annotated = [
            each for own in positive for each in (*rng.choices(["a", "b.", "[", "]"], k=rng.randrange(3)), own)
        ]
        text = " ".join(annotated)
        found = align(split_words(" ".join(positive), ""), split_words(text, ""))
        assert found is not None
        for each in reversed(found):
            assert not text[each.start].isspace() and not text[each.end - 1].isspace()
            text = text[: each.start] + text[each.end :]
        assert "".join(text.split()) == "".join("".join(positive).split())


@given(st.text(), st.text())
def test_no_text_breaks_it(positive, annotated):
    found = inserted(positive, annotated)
    assert found is None or all(each == each.strip() and each for each in found)


def test_balance_counts_every_kind_of_bracket_and_lets_comparisons_be():
    assert balanced("[a (b) {c} <d>]") and balanced("a < b") and balanced("") and balanced("【（）】")
    assert not balanced("[a") and not balanced("a]") and not balanced("[a)") and not balanced("([)]")


@pytest.mark.parametrize(
    ("positive", "annotated", "whole"),
    [
        ("A b. C d.", "A b. [No.] C d.", True),
        ("A b. C d.", "A b. It is false. C d.", True),
        ("- A b.", "- [No.] A b.", True),
        ("[1] A b.", "[1] [No.] A b.", True),
        ("A b c d.", "A b [no.] c d.", False),
        ("A b. C d.", "A b. never C d.", False),
    ],
)
def test_an_insertion_is_bounded_where_it_is_whole_and_stands_between_sentences(positive, annotated, whole):
    words = split_words(positive, DOCTAG)
    found = align(words, split_words(annotated, DOCTAG))
    assert found is not None and [bounded(words, annotated, each) for each in found] == [whole]
