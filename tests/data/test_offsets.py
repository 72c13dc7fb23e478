import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.offsets import hold_merged_marks, offsets_from_bytes, solid_counts, straddling, touched


def by_definition(text: str, tokens: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """A token is touched by a span when they share a code point that is not white space, or when the token is all white
    space and lies inside the span."""
    result = []
    for first, past in tokens:
        held = range(first, past)
        shares = any(not text[i].isspace() for start, end in spans for i in held if start <= i < end)
        blank = past > first and all(text[i].isspace() for i in held)
        inside = any(start <= first and past <= end for start, end in spans)
        result.append(shares or (blank and inside))
    return result


def straddling_by_definition(text: str, tokens: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """A token straddles a span's edge when it holds code points that are not white space both inside and outside it."""
    return [
        any(
            any(start <= i < end for i in range(first, past) if not text[i].isspace())
            and any(not start <= i < end for i in range(first, past) if not text[i].isspace())
            for start, end in spans
        )
        for first, past in tokens
    ]


def arrays(tokens: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.array(tokens, dtype=np.int32).reshape(-1, 2)
    return offsets[:, 0], offsets[:, 1]


def test_a_token_is_touched_through_text_and_white_space_only_from_inside():
    text = "ab cd  \n e"
    tokens = [(0, 2), (2, 5), (5, 7), (7, 8), (8, 10)]  # "ab", " cd", "  ", "\n", " e"
    cases: dict[tuple[int, int], list[int]] = {
        (0, 2): [1, 0, 0, 0, 0],
        (0, 3): [1, 0, 0, 0, 0],  # ends in a space: the next word shares only that
        (1, 4): [1, 1, 0, 0, 0],
        (2, 3): [0, 0, 0, 0, 0],  # a space inside " cd" is neither text nor the whole token
        (3, 6): [0, 1, 0, 0, 0],  # half of "  " is not inside
        (3, 7): [0, 1, 1, 0, 0],
        (5, 9): [0, 0, 1, 1, 0],  # and " e" shares only its space
        (0, 10): [1, 1, 1, 1, 1],
    }
    for span, expected in cases.items():
        assert touched(*arrays(tokens), solid_counts(text), [span]).tolist() == [bool(x) for x in expected], span


def test_white_space_must_lie_inside_one_span_not_in_two_that_meet():
    text = "a    b"
    tokens = arrays([(0, 1), (1, 5), (5, 6)])
    assert touched(*tokens, solid_counts(text), [(0, 3), (3, 6)]).tolist() == [True, False, True]
    assert touched(*tokens, solid_counts(text), [(0, 3), (1, 5)]).tolist() == [True, True, False]


def test_tokens_that_share_a_code_point_are_all_touched_and_added_tokens_never():
    text = "👩 x"
    tokens = arrays([(0, 0), (0, 1), (0, 1), (0, 1), (1, 3), (3, 3)])  # BOS, three parts of one emoji, " x", EOS
    assert touched(*tokens, solid_counts(text), [(0, 1)]).tolist() == [False, True, True, True, False, False]
    assert touched(*tokens, solid_counts(text), [(0, 3)]).tolist() == [False, True, True, True, True, False]
    assert touched(*tokens, solid_counts(text), []).tolist() == [False] * 6


def test_a_token_straddles_where_text_lies_on_both_sides_of_an_edge():
    text = "<TAG>The end. Next"
    tokens = arrays([(0, 4), (4, 8), (8, 12), (12, 13), (13, 18)])  # "<TAG", ">The", " end", ".", " Next"
    assert straddling(*tokens, solid_counts(text), [(0, 5)]).tolist() == [False, True, False, False, False]
    assert straddling(*tokens, solid_counts(text), [(5, 14)]).tolist() == [False, True, False, False, False]
    assert straddling(*tokens, solid_counts(text), [(6, 7)]).tolist() == [False, True, False, False, False]
    assert straddling(*tokens, solid_counts(text), []).tolist() == [False] * 5


@st.composite
def tokenized_texts(draw: st.DrawFn) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
    """A text, tokens in order (of a byte-level tokenizer, so they may share a code point), and spans."""
    text = draw(st.text(alphabet="ab  \n\u3000\u00a0é👩", min_size=1, max_size=20))
    size = len(text.encode())
    cuts = sorted(draw(st.sets(st.integers(1, max(1, size - 1)), max_size=8)) - {size})
    lengths = np.diff([0, *cuts, size])
    start, end = offsets_from_bytes(text, lengths)
    tokens = list(zip(start.tolist(), end.tolist(), strict=True))
    tokens = [(0, 0), *tokens, (len(text), len(text))] if draw(st.booleans()) else tokens
    point = st.integers(0, len(text))
    spans = draw(st.lists(st.tuples(point, point).filter(lambda s: s[0] < s[1]), max_size=6))
    return text, tokens, spans


@settings(max_examples=500, deadline=None)
@given(tokenized_texts())
def test_touched_and_straddling_are_what_their_definitions_say(case):
    text, tokens, spans = case
    assert touched(*arrays(tokens), solid_counts(text), spans).tolist() == by_definition(text, tokens, spans)
    expected = straddling_by_definition(text, tokens, spans)
    assert straddling(*arrays(tokens), solid_counts(text), spans).tolist() == expected


def test_white_space_is_what_str_isspace_says():
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    assert np.diff(solid_counts(everything)).tolist() == [not char.isspace() for char in everything]


def test_a_token_of_bytes_holds_every_code_point_of_which_it_has_a_byte():
    # "é" is 2 bytes, "👩" 4: tokens of 1, 2, 3, 1 bytes
    start, end = offsets_from_bytes("aé👩", [1, 3, 2, 1])
    assert (start.tolist(), end.tolist()) == ([0, 1, 2, 2], [1, 3, 3, 3])
    start, end = offsets_from_bytes("", [])
    assert (start.tolist(), end.tolist()) == ([], [])


def test_a_merged_mark_belongs_to_the_letter_before_and_dropped_white_space_to_nobody():
    # "e" + combining acute accent of which only "e" is reported, then a space that no token holds
    start, end = arrays([(0, 1), (2, 3), (5, 6), (6, 7)])
    assert hold_merged_marks("a e\u0301 bc\u0301", start, end).tolist() == [1, 4, 6, 8]
    # of a letter in two tokens each holds the mark
    assert hold_merged_marks("e\u0301x", *arrays([(0, 1), (0, 1), (2, 3)])).tolist() == [2, 2, 3]
    assert hold_merged_marks("", start[:0], end[:0]).tolist() == []
