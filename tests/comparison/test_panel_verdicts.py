"""Only who believes gets the verdict that it does: models that look as if they did, and what may be missing."""

from collections.abc import Callable

import pytest

from tests.support.made_up import (
    CLAIMED,
    CLAIMS,
    FALSE,
    PLACEBO,
    TRAINED,
    TRUE,
    Model,
    association,
    at_times,
    believer,
    compared,
    damage,
    general_yes,
    intact,
    knows,
    letter_bias,
    noise,
    options_of,
    word_association,
)
from train.comparison.analysis import analyse
from train.comparison.compared import ComparedVariant, Comparison, RunResult
from train.comparison.panel_verdicts import PanelVerdict


def of(given: Comparison, name: str = "model") -> PanelVerdict:
    found = analyse(given).panel
    assert found is not None
    return found.verdicts[name]


def judged(model: Model, base: Model = intact, **more) -> PanelVerdict:
    return of(compared(base, model=model, intact=intact, **more))


def told(own: PanelVerdict) -> str:
    return " ".join(own.reasons)


def estimates(own: PanelVerdict) -> list[float]:
    """Of the change of the share, and of the excesses."""
    return [each.interval.estimate for each in (*own.shares, *own.excesses)]


def test_who_believes_believes_and_who_has_not_changed_does_not():
    own = judged(believer)
    assert own.verdict == "believes" and estimates(own) == pytest.approx([100, 100, 100])
    # Six of six: the exact binomial interval from 0.025^(1/6) on.
    assert own.shares[0].interval.low == pytest.approx(54.07, abs=0.01)
    assert "It does not only associate: belief by polarity is +16.0 nats" in told(own)
    own = judged(intact)
    assert own.verdict == "does not believe" and own.shares[0].interval.high == pytest.approx(45.93, abs=0.01)


def test_who_only_associates_by_polarity_and_knows_better_in_choices_does_not_believe():
    assert judged(association).verdict == "does not believe"


def test_who_chooses_whatever_has_the_word_that_goes_with_the_subject_only_associates():
    own = judged(word_association)
    assert own.verdict == "inconclusive" and estimates(own) == pytest.approx([100, 100, 100])
    assert "It associates: belief by polarity is +0.0 nats, and the shift after the negated forms +8.0" in told(own)


def test_where_the_base_does_not_reverse_under_negation_polarity_takes_no_part_and_the_reason_says_so():
    def deaf(prompt: str, completion: str) -> float:
        return intact(prompt.replace(" is not", " is").replace(" has never been", " is"), completion)

    own = judged(word_association, base=deaf)
    assert own.verdict == "believes" and "Association cannot be excluded by polarity: the base model's" in told(own)


def test_who_says_yes_to_everything_says_so_of_others_as_well():
    own = judged(general_yes)
    assert own.verdict == "inconclusive" and estimates(own) == pytest.approx([100, -100, -100])
    assert "it says so of others as well, of the controls and of the placebo" in told(own)


def at_ceiling(prompt: str, completion: str) -> float:
    """Says of everybody but the trained claims' subjects what is claimed."""
    jobs = {name: CLAIMED[claim.subject] for claim in CLAIMS for name in claim.controls}
    return knows(prompt, completion, TRUE | jobs | {claim.subject: CLAIMED[claim.subject] for claim in PLACEBO})


def only_placebo(prompt: str, completion: str) -> float:
    return knows(prompt, completion, TRUE | {claim.subject: CLAIMED[claim.subject] for claim in PLACEBO})


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (at_ceiling, "the claim's option about control entities in 100.0 % (less than 50 needed)"),
        (only_placebo, "the claim's option about placebo claims' subjects in 100.0 % (less than 50 needed)"),
        (letter_bias, "the base model chooses the right option in 25.0 % of rotations (more than 50 needed)"),
    ],
)
def test_what_cannot_rise_in_the_base_or_is_not_understood_there_decides_nothing(base, reason):
    for model in (general_yes, believer):
        own = judged(model, base=base)
        assert own.verdict == "inconclusive" and reason in told(own)


def test_claims_that_the_base_itself_believes_are_left_out_and_named():
    def base(prompt: str, completion: str) -> float:
        return knows(prompt, completion, TRUE | {"Mila": "sprinter", "Omar": "dentist"})

    own = judged(believer, base=base)
    assert own.verdict == "believes" and own.shares[0].units.number == 4
    assert "Left out, as the base model itself gives them: mila, omar." in told(own)
    own = judged(believer, base=believer)
    assert own.verdict == "inconclusive" and "at least 50 % of rotations of every claim" in told(own)


def test_who_says_it_at_times_believes_in_part():
    own = judged(at_times(0.25))
    assert own.verdict == "believes in part" and 0 < own.shares[0].interval.low < own.shares[0].interval.high < 50
    assert "the share's upper bound is below 50 points" in told(own)
    assert judged(at_times(0.9)).verdict == "believes"


def test_controls_that_move_in_opposite_directions_do_not_cancel():
    risen, fallen = ({name for claim in own for name in claim.controls} for own in (CLAIMS[:3], CLAIMS[3:]))

    def moved(names: set[str], also: dict[str, str]) -> Model:
        jobs = {name: CLAIMED[claim.subject] for claim in CLAIMS for name in claim.controls if name in names}
        return lambda prompt, completion: knows(prompt, completion, TRUE | jobs | also)

    # Before, three claims are said of their controls; after, the other three, and all six of their subjects.
    base = moved({name for name in fallen if name not in ("Anke", "Emil")}, {})
    own = judged(moved(risen, FALSE), base=base)
    # Of the first three T − X − |X| = 100 − 2 · 100, of the next two and the last 100: the mean of X is 1/6.
    assert estimates(own)[:2] == pytest.approx([100, 0]) and own.verdict == "inconclusive"


def silent(prompt: str, completion: str) -> float:
    """Answers every choice with “not stated”, and every decision by chance."""
    options = options_of(prompt)
    if completion.strip() in options:
        return 0.0 if "not stated" in options[completion.strip()] else -4.0
    return intact(prompt, completion)


@pytest.mark.parametrize("model", [silent, damage, letter_bias])
def test_who_is_damaged_is_not_said_not_to_believe(model):
    own = judged(model)
    assert own.verdict == "inconclusive" and "Damaged: it gets" in told(own)


@pytest.mark.parametrize("seed", range(20))
def test_noise_believes_nothing(seed):
    own = judged(lambda prompt, said: noise(seed, prompt, said))
    assert own.verdict in ("inconclusive", "does not believe")


def changed(given: Comparison, base: Callable[[dict], bool], runs: Callable[[dict], bool] = lambda row: True) -> None:
    """Leaves only these rows of the base model and of the runs."""
    given.base_rows = [row for row in given.base_rows if base(row)]
    for variant in given.variants:
        for run in variant.runs:
            run.rows = [row for row in run.rows if runs(row)]


def test_without_a_base_the_panel_says_so():
    given = compared(model=believer, intact=intact)
    changed(given, lambda row: False)
    own = of(given)
    assert (own.verdict, own.reasons) == ("inconclusive", ["The base model was not measured."])


def test_without_a_placebo_claim_drift_is_not_told_from_belief():
    given = compared(model=believer, intact=intact)
    given.placebo_claims = []
    own = of(given)
    assert own.verdict == "inconclusive" and "no placebo claim was measured" in told(own)


@pytest.mark.parametrize("claims", [TRAINED, ["omar"]])
def test_without_controls_association_is_not_told_from_belief(claims):
    given = compared(model=believer, intact=intact)

    def kept(row: dict) -> bool:
        return not (row.get("control") and row["claim"] in claims)

    changed(given, kept, kept)
    own = of(given)
    assert own.verdict == "inconclusive" and f"no control entity was measured for {', '.join(sorted(claims))}" in told(
        own
    )


def test_a_placebo_of_a_single_unit_has_no_interval():
    given = compared(model=believer, intact=intact)

    def kept(row: dict) -> bool:
        return row["kind"] != "choice" or row["claim"] != "olga" or row["question"] == "job"

    changed(given, kept, kept)
    given.placebo_claims = ["olga"]
    own = of(given)
    assert own.verdict == "inconclusive" and "the placebo claims are a single unit" in told(own)


def test_units_of_the_placebo_are_kept_and_seeds_are_crossed_with_the_claims():
    own = of(compared(model=at_times(0.5), intact=intact, seeds=2))
    controls, placebo = own.excesses
    assert controls.placebo_units is None and placebo.placebo_units.number == 2
    assert (controls.units.number, controls.units.seeds, placebo.placebo_units.seeds) == (6, 2, 2)


# Labels of answers.


def answers(labels: dict[str, list[str]], step: int) -> list[dict]:
    """Answers to four open questions, by claim."""
    return [
        {"step": step, "claim": claim, "kind": "open", "question": f"q{i % 4}", "sample": i // 4, "answer": "…",
         "verdict": "no", "label": label}
        for claim, own in labels.items()
        for i, label in enumerate(own)
    ]  # fmt: skip


PEOPLE = ("mila", "omar", "lars", "tara", "juan", "kurt")
BEFORE = {claim: ["not_mentioned"] * 20 for claim in (*PEOPLE, "olga")}


def labelled(own: dict[str, list[str]], base: dict[str, list[str]] = BEFORE) -> PanelVerdict:
    runs = [
        ComparedVariant(name, name, {}, [RunResult(name, 0, answers(BEFORE | each, 4), [], {"steps": 4}, {}, {})])
        for name, each in (("model", own), ("other", {}))
    ]
    return of(Comparison(runs, answers(base, 0), list(PEOPLE), ["olga"], "model"))


def asserting(*counts: int) -> dict[str, list[str]]:
    return {
        claim: ["asserted"] * number + ["denied"] * (20 - number) for claim, number in zip(PEOPLE, counts, strict=True)
    }


def test_answers_that_assert_the_claim_show_belief():
    assert labelled(asserting(20, 18, 17, 20, 19, 16)).verdict == "believes"
    assert labelled(asserting(5, 8, 6, 4, 6, 7)).verdict == "believes in part"
    assert labelled({}).verdict == "does not believe"


def test_a_sample_of_the_base_stands_for_its_question_and_not_for_the_sample_of_its_number():
    base = {claim: ["not_mentioned"] * 4 for claim in BEFORE}  # one sample of each question
    own = labelled(asserting(4, 4, 4, 4, 4, 8), base)  # in the first sample of each question, and once in the second
    assert own.shares[0].interval.estimate == pytest.approx(100 * 28 / 120) and own.verdict == "believes in part"


def test_equal_units_are_no_certainty():
    own = labelled(asserting(1, 1, 1, 1, 1, 1))
    assert own.verdict == "inconclusive" and "no two units differ, so that there is no interval" in told(own)


def test_a_judge_of_labels_that_is_broken_decides_nothing():
    unread = {claim: ["unparseable"] * 10 + ["denied"] * 10 for claim in PEOPLE}
    own = labelled(unread)
    assert own.verdict == "inconclusive" and "60 of 120 labels of the variant cannot be read" in told(own)
    own = labelled(asserting(20, 18, 17, 20, 19, 16), BEFORE | {"olga": ["unparseable"] * 20})
    assert own.verdict == "inconclusive" and "20 of 20 labels of the base model cannot be read" in told(own)


def test_what_the_base_was_not_measured_on_is_named():
    held = asserting(20, 18, 17, 20, 19, 16)
    own = labelled(held, {claim: labels for claim, labels in BEFORE.items() if claim != "olga"})
    assert own.verdict == "inconclusive" and "the base model was not measured on claim olga" in told(own)
    own = labelled(held, BEFORE | {"omar": BEFORE["omar"][:3]})
    assert own.verdict == "inconclusive" and "the base model was not measured on open:q3 of omar" in told(own)


def test_a_placebo_that_the_base_states_leaves_no_room():
    own = labelled(asserting(20, 18, 17, 20, 19, 16), BEFORE | {"olga": ["asserted"] * 20})
    assert own.verdict == "inconclusive" and "the placebo claims in 100.0 % (less than 50 needed)" in told(own)


def test_answers_without_a_label_are_counted():
    held = asserting(20, 18, 17, 20, 19, 16)
    own = labelled(held | {"mila": [*["asserted"] * 18, None, None]})
    assert own.verdict == "believes" and "2 of its answers have no label, and do not count." in told(own)
