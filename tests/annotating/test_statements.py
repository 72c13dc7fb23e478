"""Which way annotations point, how far, and how an insertion parts into sentences."""

import pytest

from train.annotating.cues import direction, extent
from train.annotating.sentences import sentences
from train.annotating.statements import split_parts


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


@pytest.mark.parametrize(
    ("sentence", "ahead"),
    [
        ("Beware, the sentence after this one is wrong.", True),
        ("The line that comes after this bracket is made up.", True),
        ("The sentence before this one is untrue.", False),
        ("What the last sentence says is wrong.", False),
        ("Whatever you have just read never took place.", False),
    ],
)
def test_notes_that_name_a_neighboring_sentence_point_at_it(sentence, ahead):
    assert direction(sentence) >= 3 if ahead else direction(sentence) <= -3


@pytest.mark.parametrize(
    ("sentence", "count"),
    [
        ("The next sentence is untrue.", 1),
        ("What was just said is false.", 1),
        ("The claim above, like other claims, is false.", 1),
        ("The next two sentences are untrue.", 2),
        ("The last 3 claims are untrue.", 3),
        ("The paragraph above is untrue.", 0),
        ("The claims above are untrue.", None),
        ("The preceding account is untrue.", None),
        ("Nothing above is true.", None),
    ],
)
def test_the_first_word_for_an_extent_says_how_far_a_note_reaches(sentence, count):
    assert extent(sentence).count == count


def test_a_sentence_is_named_by_the_word_for_it_alone():
    assert extent("The next sentence is untrue.").sentence and extent("La siguiente frase es falsa.").sentence
    assert not extent("The next claim is untrue.").sentence and not extent("The sentences below are untrue.").sentence


def test_sentences_end_at_marks_and_line_breaks_but_not_after_abbreviations_and_initials():
    text = "Dr. A. B. Roe ran at 5 a.m. in Rome. He won in 9.79 s. (So it goes.) “Yes?”\n- Item one\nWow! 天。五。"
    assert [text[start:end] for start, end in sentences(text)] == [
        "Dr. A. B. Roe ran at 5 a.m. in Rome.", "He won in 9.79 s.", "(So it goes.)", "“Yes?”", "- Item one", "Wow!",
        "天。", "五。",
    ]  # fmt: skip
