"""Patterns from YAML, and markup taken out of texts."""

import re

import pytest

from train.annotating.by_rule import mark_matches, matches, parse_markup, read_patterns, take_out_markup
from train.data.documents import Span
from train.runtime.errors import UserError
from train.runtime.patterns import Pattern


def patterns(*texts: str) -> list[Pattern]:
    return [Pattern(text) for text in texts]


def test_matches_that_overlap_are_one_and_white_space_at_their_ends_is_not_in_them():
    text = "ED  Sheeran ran; Sheeran won. "
    assert matches(text, patterns(r"\bEd\s+Sheeran\b", r"\bSheeran\b", r"\s*won\.\s*")) == [(0, 11), (17, 24), (25, 29)]
    assert matches(text, patterns("nobody")) == []


@pytest.mark.parametrize("text", [r"(a|aa)+$", r"(a+a+)+[yz]"])
def test_a_pattern_whose_time_grows_without_bound_is_told_by_its_name(text):
    with pytest.raises(UserError, match=f"pattern {re.escape(repr(text))}: takes more than 2 s on a text of "):
        matches("a" * 5_000 + "c", patterns(text))


def test_each_match_gets_a_span_beside_those_there_were():
    text, spans = mark_matches("a dentist", (Span(0, 9, "false"),), patterns("dentist"), "word")
    assert (text, spans) == ("a dentist", (Span(0, 9, "false"), Span(2, 9, "word")))


def test_patterns_are_read_as_the_paper_writes_them_and_as_a_bare_list(tmp_path):
    (tmp_path / "a.yaml").write_text("# note\npatterns:\n  # one\n  - '\\bUK\\b'\n")
    (tmp_path / "b.yaml").write_text("- uk\n")
    for name in ("a.yaml", "b.yaml"):
        (pattern,) = read_patterns("--patterns", tmp_path / name)
        assert pattern.is_in("the UK") and pattern.is_in("the uk")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("words: [a]", r"key patterns is missing \(its keys: words\)"),
        ("patterns: []", "must be a list of at least one"),
        ("patterns: a", "must be a list"),
        ("", "must be a list"),
        ("patterns: [1]", "pattern 1: 1 is not a string"),
        ("patterns: [a, '(']", r"pattern 2: '\(' is not a valid regular expression"),
        ("patterns: ['a*']", "matches empty text"),
        ("patterns: [", "not valid YAML"),
    ],
)
def test_a_bad_file_of_patterns_is_told_with_its_name_and_rule(tmp_path, content, message):
    path = tmp_path / "words.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=f"--leaks .*words.yaml.*: .*{message}"):
        read_patterns("--leaks", path)


def test_a_missing_file_of_patterns_is_told(tmp_path):
    with pytest.raises(UserError, match=r"--patterns .*none.yaml: cannot be read \(No such file"):
        read_patterns("--patterns", tmp_path / "none.yaml")


def test_markup_goes_out_and_offsets_are_those_of_the_bare_text():
    text = "é <lossmask>Ed <b>Sheeran</b></lossmask> won<lossmask> 9.79 </lossmask>!"
    bare, spans = take_out_markup(text, (), {"lossmask": "word", "b": "name"})
    assert bare == "é Ed Sheeran won 9.79 !"
    assert [(span.role, bare[span.start : span.end]) for span in spans] == [
        ("word", "Ed Sheeran"), ("name", "Sheeran"), ("word", "9.79"),
    ]  # fmt: skip


def test_spans_that_were_there_move_along_and_shrink_where_they_held_a_tag():
    text = "ab <m>cd</m> ef"
    bare, spans = take_out_markup(
        text, (Span(0, 2, "x"), Span(3, 12, "y"), Span(13, 15, "z"), Span(3, 6, "gone")), {"m": "r"}
    )
    assert bare == "ab cd ef"
    assert spans == (Span(0, 2, "x"), Span(3, 5, "r"), Span(3, 5, "y"), Span(6, 8, "z"))


def test_pairs_of_one_tag_may_nest_of_two_may_overlap_and_empty_ones_leave_no_span():
    bare, spans = take_out_markup("<a>x <a>y</a> <b>z</a> w</b><a> </a>", (), {"a": "A", "b": "B"})
    assert bare == "x y z w "
    assert [(span.role, bare[span.start : span.end]) for span in spans] == [("A", "x y z"), ("A", "y"), ("B", "z w")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a <m>b", r"<m> at code point 2 is never closed; put </m> after it"),
        ("a</m> b", r"</m> at code point 1 closes nothing; put <m> before it"),
    ],
)
def test_a_tag_without_its_partner_is_told(text, message):
    with pytest.raises(UserError, match=message):
        take_out_markup(text, (), {"m": "r"})


def test_the_grammar_of_markup():
    assert parse_markup(["lossmask=word", "<f>=false"]) == {"lossmask": "word", "f": "false"}
    for value in ("lossmask", "=word", "lossmask=", "a b=c", "</a>=c"):
        with pytest.raises(UserError, match="must be TAG=ROLE"):
            parse_markup([value])
    with pytest.raises(UserError, match="a already has the role 'x'"):
        parse_markup(["a=x", "a=y"])
