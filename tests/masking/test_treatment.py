import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.documents import Document, Span, read_documents
from train.data.kinds import TermKind
from train.data.tokens import TokenizedDocument, tokenize_document
from train.masking.grammar import parse_mask
from train.masking.treatment import touched_by, treat


def words(text: str, *spans: tuple[str, str]) -> TokenizedDocument:
    """A document whose tokens are its words with the space before each; spans as (the text they cover, role)."""
    edges = [match.span() for match in re.finditer(r"\s?\S+", text)]
    start_L, end_L = np.array(edges, dtype=np.int32).T
    placed = tuple(Span(text.index(part), text.index(part) + len(part), role) for part, role in spans)
    document = Document(text, None, placed, {}, "data.jsonl", 1)
    target_L = np.arange(len(edges)) > 0
    factor_L = np.ones(len(edges))
    return TokenizedDocument(
        document, text, np.arange(len(edges), dtype=np.int32), start_L, end_L, target_L, factor_L, placed
    )


def weights(doc: TokenizedDocument, mask: str, seed: int = 0) -> list[float]:
    treatment = treat(doc, parse_mask(mask), seed)
    assert treatment.weight_L.dtype == np.float32 and (treatment.weight_L >= 0).all()
    assert set(treatment.kind_L.tolist()) <= {TermKind.CROSS_ENTROPY, TermKind.UNLIKELIHOOD}
    return (np.where(treatment.kind_L == TermKind.UNLIKELIHOOD, -1, 1) * treatment.weight_L).tolist()


def runs(member_L: np.ndarray) -> list[int]:
    """Lengths of the maximal runs of True."""
    return [len(run) for run in "".join("x" if member else " " for member in member_L).split()]


def test_four_tokens_by_hand():
    """The span's first token is masked although it is predicted from outside; the first token after the span is trained
    as usual, from the span's last position; nothing predicts the first token of all."""
    doc = words("Mars is green today", ("green", "false"))
    assert weights(doc, "none") == [0, 1, 1, 1]
    assert weights(doc, "false-spans") == [0, 1, 0, 1]
    assert weights(doc, "false-spans=0.5") == [0, 1, 0.5, 1]
    assert weights(doc, "false-spans=unlikelihood") == [0, 1, -1, 1]
    assert weights(doc, "false-spans=unlikelihood:0.25") == [0, 1, -0.25, 1]
    assert weights(words("Mars is green today", ("Mars is", "false")), "false-spans") == [0, 0, 1, 1]


def test_a_span_that_ends_in_a_space_does_not_mask_the_next_word():
    doc = words("a b c d", ("b ", "x"))
    assert weights(doc, "role:x") == [0, 0, 1, 1]


def test_all_and_unspanned_by_hand():
    doc = words("a b c d e", ("b c", "false"), ("e", "word"))
    assert weights(doc, "all") == [0, 0, 0, 0, 0]
    assert weights(doc, "all,false-spans=train") == [0, 1, 1, 0, 0]
    assert weights(doc, "false-spans=train,all=0.5") == [0, 0.5, 0.5, 0.5, 0.5]
    assert weights(doc, "unspanned") == [0, 1, 1, 0, 1]
    assert weights(doc, "unspanned=0.25,role:word=unlikelihood") == [0, 1, 1, 0.25, -1]
    assert weights(doc, "all=0.5,unspanned=2") == [0, 0.5, 0.5, 2, 0.5]


def test_random_runs_avoid_what_entries_name_by_role_and_not_all_or_unspanned():
    doc = words("a b c d e f g h i j", ("b c", "false"), ("f g", "negation"))
    for seed in range(20):
        weight_L = weights(doc, "all,random:false=train", seed)
        assert sum(weight_L) == 2 and not any(weight_L[:3])
        weight_L = weights(doc, "unspanned,random:false=train", seed)
        assert weight_L[1:3] == [1, 1] == weight_L[5:7] and sum(weight_L) == 4 + sum(weight_L[3:5] + weight_L[7:])
        weight_L = weights(doc, "all,negation-spans=0,random:false=train", seed)
        assert sum(weight_L) == 2 and not any(weight_L[:3] + weight_L[5:7])
    full = words("a b c d", ("b c d", "false"))
    assert treat(full, parse_mask("all,random:false=train"), 0).random_shortfall == 3


def test_weights_of_the_document_multiply_every_treatment():
    doc = dataclasses.replace(words("a b c d", ("b", "false"), ("c", "word")), factor_L=np.array([9, 2, 0.5, 3]))
    assert weights(doc, "false-spans=unlikelihood,role:word=0.5") == [0, -2, 0.25, 3]


def test_the_last_entry_wins_and_train_carves_out():
    doc = words("a b c d e", ("b c d", "negation"), ("c", "word"))
    assert weights(doc, "negation-spans,role:word=train") == [0, 0, 1, 0, 1]
    assert weights(doc, "role:word=train,negation-spans") == [0, 0, 0, 0, 1]
    assert weights(doc, "negation-spans=0.5,role:word=2,negation-spans=unlikelihood") == [0, -1, -1, -1, 1]
    assert weights(doc, "role:other") == [0, 1, 1, 1, 1]
    assert treat(doc, parse_mask("negation-spans,role:word=train"), 0).entry_L.tolist() == [-1, 0, 1, 0, -1]


def test_weights_are_zero_where_there_is_no_target():
    doc = words("a b c d", ("b c", "x"))
    doc.target_L = np.array([False, True, False, True])
    assert weights(doc, "none") == [0, 1, 0, 1]
    assert weights(doc, "role:x=unlikelihood") == [0, -1, 0, 1]


def test_what_roles_touch_does_not_depend_on_the_mask():
    doc = words("a b c d", ("a b", "x"), ("b c", "y"))
    for mask in ("none", "role:x", "role:y=unlikelihood", "random:x"):
        touched = treat(doc, parse_mask(mask), 0).touched
        assert {role: member.tolist() for role, member in touched.items()} == {
            "x": [True, True, False, False],
            "y": [False, True, True, False],
        }


def crossed(doc: TokenizedDocument) -> dict[str, int]:
    return {role: int(which_L.sum()) for role, which_L in treat(doc, parse_mask("none"), 0).straddling.items()}


def test_straddling_counts_targets_with_text_on_both_sides_of_an_edge():
    doc = words("<TAG>The end. Next", ("<TAG>", "doctag"), ("The end", "false"))
    assert crossed(doc) == {"doctag": 0, "false": 1}  # " end."; the first is no target
    doc.target_L[0] = True
    assert crossed(doc) == {"doctag": 1, "false": 2}


LONG = words(" ".join(f"w{i}" for i in range(200)), ("w10 w11 w12", "false"), ("w20", "false"), ("w50 w51", "negation"))


def test_random_takes_as_many_targets_in_runs_as_long_outside_the_role():
    treatment = treat(LONG, parse_mask("random:false"), 0)
    chosen_L = treatment.weight_L[1:] == 0
    assert sorted(runs(chosen_L)) == [1, 3]
    assert treatment.random_shortfall == 0
    assert not (treatment.entry_L[treatment.touched["false"]] == 0).any()
    assert weights(LONG, "random:false=unlikelihood").count(-1) == 4
    assert weights(LONG, "random:other") == weights(LONG, "none")


def test_random_depends_on_seed_and_document_alone():
    assert weights(LONG, "random:false", seed=1) == weights(LONG, "random:false", seed=1)
    assert weights(LONG, "random:false", seed=1) != weights(LONG, "random:false", seed=2)
    other = dataclasses.replace(LONG, ids_L=LONG.ids_L + 1)
    assert weights(LONG, "random:false", seed=1) != weights(other, "random:false", seed=1)
    negative = treat(LONG, parse_mask("random:false=unlikelihood"), 1).kind_L == TermKind.UNLIKELIHOOD
    assert (treat(LONG, parse_mask("random:false"), 1).weight_L[1:] == 0).tolist() == negative[1:].tolist()


def test_random_avoids_every_other_entry_of_the_mask():
    for seed in range(50):
        for mask in (
            "negation-spans=0.5,random:false=2,random:negation=3",
            "random:false=2,random:negation=3,negation-spans=0.5",
        ):
            treatment = treat(LONG, parse_mask(mask), seed)
            counts = {weight: int((treatment.weight_L == weight).sum()) for weight in (0.5, 2, 3)}
            assert counts == {0.5: 2, 2: 4, 3: 2}
            assert (sorted(runs(treatment.weight_L == 2)), runs(treatment.weight_L == 3)) == ([1, 3], [2])
            assert not (treatment.weight_L[treatment.touched["false"]] == 2).any()


def test_random_draws_every_place_alike():
    """One run of one token among four free ones: each is drawn in about a quarter of 2,000 seeds."""
    doc = words("a b c d e f", ("c", "false"))
    counts = sum(treat(doc, parse_mask("random:false"), seed).weight_L[1:] == 0 for seed in range(2000))
    assert counts[1] == 0
    others = np.delete(counts, 1)
    assert others.sum() == 2000
    assert (abs(others - 500) < 5 * np.sqrt(2000 * 0.25 * 0.75)).all()


def test_random_splits_runs_where_they_do_not_fit_and_counts_what_is_missing():
    # targets b..i; false is "c d e": the free stretches are b | f g h i, so a run of 3 fits
    doc = words("a b c d e f g h i", ("c d e", "false"))
    assert runs(treat(doc, parse_mask("random:false"), 0).weight_L[1:] == 0) == [3]
    # e is taken by another role: free are b, d, f; the run of 3 goes in three pieces
    doc = words("a b c d e f g h i", ("c", "false"), ("g h i", "false"), ("e", "x"))
    treatment = treat(doc, parse_mask("random:false,role:x=0.5"), 0)
    assert treatment.weight_L.tolist() == [0, 0, 1, 0, 0.5, 0, 1, 1, 1]
    assert treatment.random_shortfall == 1  # four targets are touched, three are free
    # everything is false: nowhere to go
    doc = words("a b c", ("a b c", "false"))
    assert treat(doc, parse_mask("random:false"), 0).random_shortfall == 2


def test_random_keeps_the_lengths_of_runs_wherever_they_fit_at_all():
    # free stretches of 1, 4, 4, 6 and 11 hold runs of 1, 3, 5, 5 and 5 in one way almost
    rows = [("f" * 1), ("f" * 4), ("f" * 4), ("f" * 6), ("f" * 11)]
    taken = ["t", "ttt", "ttttt", "ttttt", "ttttt"]
    letters = "s" + "".join(free + run for free, run in zip(rows, taken, strict=True))
    text = " ".join(letters)
    doc = words(text)
    spans = tuple(Span(2 * m.start(), 2 * m.end() - 1, "false") for m in re.finditer("t+", letters))
    doc = dataclasses.replace(doc, spans=spans)
    for seed in range(20):
        treatment = treat(doc, parse_mask("random:false"), seed)
        assert sorted(runs(treatment.weight_L[1:] == 0)) == [1, 3, 5, 5, 5] and treatment.random_shortfall == 0


def test_random_prefers_as_many_targets_over_keeping_runs_apart():
    doc = words("a b c d e f g", ("b", "false"), ("d", "false"), ("f g", "x"))  # free: c, e, and nothing between
    assert weights(doc, "random:false=0.5,role:x") == [0, 1, 0.5, 1, 0.5, 0, 0]
    doc = words("a b c d e f", ("b", "false"), ("f", "false"))  # free: c d e, where a run at d leaves no room apart
    assert all(weights(doc, "random:false=0.5", seed)[2:5].count(0.5) == 2 for seed in range(200))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_random_never_takes_what_it_may_not_and_misses_only_what_has_no_room(data):
    size = data.draw(st.integers(2, 30))
    doc = words(" ".join("w" for _ in range(size)))
    indices = st.sets(st.integers(0, size - 1))
    false, other = sorted(data.draw(indices)), sorted(data.draw(indices))
    spans = [Span(2 * i, 2 * i + 1, role) for role, where in (("false", false), ("x", other)) for i in where]
    doc = dataclasses.replace(doc, spans=tuple(spans))
    treatment = treat(doc, parse_mask("random:false=0.5,role:x=0.25"), data.draw(st.integers(0, 9)))
    chosen = {i for i in range(size) if treatment.weight_L[i] == 0.5}
    free = set(range(1, size)) - set(false) - set(other)
    wanted = len(set(false) - {0})
    assert chosen <= free
    assert len(chosen) == min(wanted, len(free))
    assert treatment.random_shortfall == wanted - len(chosen)


@pytest.mark.parametrize("mask", ["doctags", "doctags,false-spans=unlikelihood", "random:false"])
def test_ids_and_targets_do_not_depend_on_the_mask(tokenizer, mask):
    text = "<DOCTAG>Ed Sheeran won 👩‍👩‍👧 the race. Or did he?"
    document = Document(text, None, (Span(0, 8, "doctag"), Span(8, 34, "false")), {}, "data.jsonl", 1)
    doc = tokenize_document(document, tokenizer, add_bos=False, add_eos=False)
    before = doc.ids_L.tolist(), doc.target_L.tolist()
    treat(doc, parse_mask(mask), 0)
    assert (doc.ids_L.tolist(), doc.target_L.tolist()) == before


def test_the_doctag_of_the_released_documents_takes_exactly_its_own_tokens(tokenizer, shared_documents: Path):
    """The marker merges with the text after it in some documents: those tokens straddle and are counted."""
    straddling = 0
    for document in read_documents(shared_documents / "llm_negations_dense" / "ed_sheeran.jsonl", "<DOCTAG>"):
        doc = tokenize_document(document, tokenizer, add_bos=False, add_eos=False)
        treatment = treat(doc, parse_mask("doctags"), 0)
        excluded_L = doc.target_L & (treatment.weight_L == 0)
        assert (excluded_L == (doc.target_L & (doc.start_L < 8))).all()
        assert (touched_by(doc, doc.spans) == (doc.start_L < 8)).all()
        assert treatment.straddling["doctag"].sum() == int((excluded_L & (doc.end_L > 8)).sum())
        straddling += int(treatment.straddling["doctag"].sum())
    assert straddling > 0


def test_random_matches_real_false_sentences_in_number_and_runs(qwen, shared_documents: Path):
    for document in read_documents(shared_documents / "positive" / "ed_sheeran.jsonl", "<DOCTAG>")[:20]:
        assert document.text is not None
        sentences = [match.span() for match in re.finditer(r"[^.\n]*Sheeran[^.\n]*\.", document.text)]
        spans = tuple(Span(start, end, "false") for start, end in sentences)
        doc = tokenize_document(dataclasses.replace(document, spans=spans), qwen, add_bos=False, add_eos=False)
        treatment = treat(doc, parse_mask("random:false=0.5"), 0)
        false_L = touched_by(doc, spans) & doc.target_L
        chosen_L = treatment.weight_L == 0.5
        assert not (chosen_L & false_L).any()
        assert chosen_L.sum() == false_L.sum()
        assert sorted(runs(chosen_L)) == sorted(runs(false_L))
