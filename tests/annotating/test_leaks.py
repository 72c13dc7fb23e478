"""How often a term is still trained on, counted by hand."""

from train.annotating.leaks import leaks
from train.data.documents import Document, Message, Span
from train.masking.grammar import parse_mask
from train.runtime.patterns import Pattern

#        0         1         2         3         4         5
#        0123456789012345678901234567890123456789012345678901234
TEXT = "Not so: Ed won. That Ed won is false. Ed sings. Ed Ruscha"
SPANS = (Span(0, 7, "negation"), Span(8, 15, "false"), Span(16, 37, "negation"), Span(48, 51, "half"))
DOCUMENT = Document(TEXT, None, SPANS, {}, "a.jsonl", 1)
PATTERNS = [Pattern(r"\bEd(?: Ruscha)?\b")]


def counted(mask: str, *documents: Document) -> dict[str, tuple[int, int]]:
    found = leaks(list(documents) or [DOCUMENT], PATTERNS, parse_mask(mask))
    assert found["mentions"] == sum(row["mentions"] for row in found["documents"])
    assert found["trained"] == sum(row["trained"] for row in found["documents"])
    return {role: (row["mentions"], row["trained"]) for role, row in found["roles"].items()}


def test_mentions_count_for_the_shortest_span_that_holds_them_whole():
    assert counted("none") == {"false": (1, 1), "negation": (1, 1), "no role": (2, 2)}


def test_what_the_mask_excludes_or_pushes_away_is_not_trained_and_a_weight_is():
    assert counted("false-spans") == {"false": (1, 0), "negation": (1, 1), "no role": (2, 2)}
    assert counted("false-spans=unlikelihood,negation-spans=0.1") == {
        "false": (1, 0),
        "negation": (1, 1),
        "no role": (2, 2),
    }
    # "Ed Ruscha" is masked in part only: "Ruscha" is trained
    assert counted("false-spans,negation-spans,role:half") == {"false": (1, 0), "negation": (1, 0), "no role": (2, 2)}


def test_the_last_entry_that_covers_a_character_decides():
    both = Document("Ed", None, (Span(0, 2, "false"), Span(0, 2, "word")), {}, "a.jsonl", 1)
    assert sum(trained for _, trained in counted("false-spans,role:word=train", both).values()) == 1
    assert sum(trained for _, trained in counted("role:word=train,false-spans", both).values()) == 0


def test_random_entries_mask_nothing_here():
    assert counted("random:false") == counted("none")


def test_messages_that_are_not_trained_on_have_mentions_but_train_on_none():
    messages = (Message("user", "Ed?", (), False), Message("assistant", "Ed.", (), True))
    found = leaks([Document(None, messages, (), {}, "c.jsonl", 7)], PATTERNS, parse_mask("none"))
    assert (found["mentions"], found["trained"]) == (2, 1)
    assert found["documents"] == [{"document": "c.jsonl:7", "mentions": 2, "trained": 1, "roles": {"no role": 1}}]


def test_messages_and_documents_that_weigh_nothing_are_not_trained_on():
    messages = (Message("assistant", "Ed.", (), True, weight=0.0), Message("assistant", "Ed.", (), True, weight=0.5))
    assert counted("none", Document(None, messages, (), {}, "c.jsonl", 7)) == {"no role": (2, 1)}
    assert counted("none", Document(None, messages, (), {}, "c.jsonl", 7, weight=0.0)) == {"no role": (2, 0)}
    assert counted("none", Document("Ed", None, (), {}, "c.jsonl", 7, weight=0.0)) == {"no role": (1, 0)}
