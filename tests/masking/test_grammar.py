import pytest

from train.data.kinds import TermKind
from train.masking.grammar import Entry, parse_mask
from train.runtime.errors import UserError

UNLIKELIHOOD, HELD = TermKind.UNLIKELIHOOD, TermKind.HELD


@pytest.mark.parametrize(
    ("text", "canonical", "entries"),
    [
        ("none", "none", []),
        (" none ", "none", []),
        ("doctags", "doctags", [Entry("doctag", "role", 0.0)]),
        ("negation-spans=exclude", "negation-spans", [Entry("negation", "role", 0.0)]),
        ("false-spans=0", "false-spans", [Entry("false", "role", 0.0)]),
        ("false-spans=0.2", "false-spans=0.2", [Entry("false", "role", 0.2)]),
        ("false-spans=1e-3", "false-spans=0.001", [Entry("false", "role", 0.001)]),
        ("correction-spans=2", "correction-spans=2", [Entry("correction", "role", 2.0)]),
        ("qualifier-spans=train", "qualifier-spans=train", [Entry("qualifier", "role", 1.0)]),
        ("false-spans=unlikelihood", "false-spans=unlikelihood", [Entry("false", "role", 1.0, UNLIKELIHOOD)]),
        (
            "false-spans=unlikelihood:0.5",
            "false-spans=unlikelihood:0.5",
            [Entry("false", "role", 0.5, UNLIKELIHOOD)],
        ),
        ("false-spans = hold", "false-spans=hold", [Entry("false", "role", 1.0, HELD)]),
        ("role:anchor=hold:2", "role:anchor=hold:2", [Entry("anchor", "role", 2.0, HELD)]),
        ("random:false=hold:0.5", "random:false=hold:0.5", [Entry("false", "random", 0.5, HELD)]),
        ("unspanned=hold:0", "unspanned", [Entry("", "unspanned", 0.0)]),
        ("role:word", "role:word", [Entry("word", "role", 0.0)]),
        ("role:a:b", "role:a:b", [Entry("a:b", "role", 0.0)]),
        ("role:false", "false-spans", [Entry("false", "role", 0.0)]),
        ("role:all", "role:all", [Entry("all", "role", 0.0)]),
        ("random:all", "random:all", [Entry("all", "random", 0.0)]),
        ("all,false-spans=train", "all,false-spans=train", [Entry("", "all", 0.0), Entry("false", "role", 1.0)]),
        ("unspanned=0.5", "unspanned=0.5", [Entry("", "unspanned", 0.5)]),
        ("random:false", "random:false", [Entry("false", "random", 0.0)]),
        ("random:false-spans=0.5", "random:false=0.5", [Entry("false", "random", 0.5)]),
        ("random:word=unlikelihood", "random:word=unlikelihood", [Entry("word", "random", 1.0, UNLIKELIHOOD)]),
        (
            "negation-spans, role:word = train",
            "negation-spans,role:word=train",
            [Entry("negation", "role", 0.0), Entry("word", "role", 1.0)],
        ),
        ("doctags,doctags=0.5", "doctags,doctags=0.5", [Entry("doctag", "role", 0.0), Entry("doctag", "role", 0.5)]),
    ],
)
def test_a_mask_is_its_entries_in_order(text, canonical, entries):
    mask = parse_mask(text)
    assert (mask.text, mask.entries) == (canonical, tuple(entries))
    assert parse_mask(mask.text) == mask


def test_unlikelihood_times_nothing_is_a_plain_zero():
    assert str(parse_mask("doctags=unlikelihood:0").entries[0].weight) == "0.0"
    assert str(parse_mask("doctags=-0.0").entries[0].weight) == "0.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("false-span", "unknown name 'false-span' (did you mean false-spans?)"),
        ("negations", "unknown name 'negations' (did you mean negation-spans?)"),
        ("doctag", "unknown name 'doctag' (did you mean doctags?)"),
        ("doctags,fasle-spans", "unknown name 'fasle-spans' (did you mean false-spans?)"),
        ("roles:x", "unknown name 'roles:x'"),
        ("xyz", "unknown name 'xyz'; the names are doctags, negation-spans, false-spans, correction-spans, qualif"),
        ("", "an entry is empty"),
        ("doctags,", "an entry is empty"),
        ("doctags,,false-spans", "an entry is empty"),
        ("=0.5", "an entry is empty"),
        ("none,doctags", "none cannot be combined"),
        ("none=0.5", "none cannot be combined"),
        ("role:", "role: does not name a role"),
        ("random:=0.5", "random: does not name a role"),
        ("doctags=-0.1", "the weight -0.1 in doctags=-0.1 must be finite and at least 0"),
        ("doctags=inf", "the weight inf in doctags=inf must be finite and at least 0"),
        ("doctags=1e999", "the weight 1e999 in doctags=1e999 must be finite and at least 0"),
        ("doctags=1e39", "the weight 1e39 in doctags=1e39 must be 0 or from 1e-30 to 1e+30"),
        ("doctags=unlikelihood:1e-46", "the weight 1e-46 in doctags=unlikelihood:1e-46 must be 0 or from"),
        ("doctags=nan", "the weight nan in doctags=nan must be finite and at least 0"),
        ("doctags=unlikelihood:-1", "the weight -1 in doctags=unlikelihood:-1 must be finite and at least 0"),
        ("doctags=unlikelihood:nan", "the weight nan in doctags=unlikelihood:nan must be finite and at least 0"),
        ("doctags=unliklihood", "'unliklihood' in doctags=unliklihood is not a treatment (did you mean unlikelihood?)"),
        ("doctags=unlikelihood:", "'' in doctags=unlikelihood: is not a treatment"),
        ("doctags=hold:-1", "the weight -1 in doctags=hold:-1 must be finite and at least 0"),
        ("doctags=hold:", "'' in doctags=hold: is not a treatment"),
        ("doctags=hodl", "'hodl' in doctags=hodl is not a treatment (did you mean hold?)"),
        ("doctags=", "'' in doctags= is not a treatment"),
        ("doctags=half", "'half' in doctags=half is not a treatment"),
    ],
)
def test_a_wrong_mask_is_told_what_is_wrong_with_it(text, message):
    with pytest.raises(UserError) as caught:
        parse_mask(text)
    assert str(caught.value).startswith(f"--mask {text!r}: {message}")
