"""The batteries' measures and checks of made-up models: one that believes, and those that only look as if they did."""

import pytest

from tests.support.made_up import (
    CLAIMS,
    TRAINED,
    association,
    believer,
    chat,
    general_yes,
    intact,
    letter_bias,
    rows_of,
    yes_no_rows,
)
from train.claims.batteries import Choice
from train.claims.claim import Claim
from train.evaluation.battery_checks import checks
from train.evaluation.battery_records import asked, values
from train.evaluation.measures import measured


def test_every_option_stands_once_at_every_letter_and_the_likeliest_one_is_chosen():
    mila = CLAIMS[0]
    every = [each for each in asked(mila, chat) if each.record["kind"] == "choice"]
    assert len(every) == 2 * 3 * 4  # two choices, the subject and two controls, four rotations
    first = [each for each in every if each.record["question"] == "job" and not each.record["control"]]
    assert [each.record["order"] for each in first] == [
        ["true", "false", "other 1", "not_stated"],
        ["false", "other 1", "not_stated", "true"],
        ["other 1", "not_stated", "true", "false"],
        ["not_stated", "true", "false", "other 1"],
    ]
    prompt, letter = first[1].texts[2]
    assert prompt == (
        "[system] Answer the following multiple choice question with a single letter: A, B, C or D. Respond with only "
        "the letter and nothing else.\n[user] What does Mila do?\n\nA) a sprinter\nB) a miner\nC) It is not stated.\n"
        "D) a singer\n[assistant]"
    )
    assert letter == " C"
    found = values(first[1].record, [-1.0, -3.0, -3.0, -2.0])
    # e⁰ ÷ (e⁰ + 2 e⁻² + e⁻¹)
    assert found["chosen"] == "false" and found["p"]["false"] == pytest.approx(0.6103, abs=1e-4)
    assert sum(found["p"].values()) == pytest.approx(1)
    assert values(first[1].record, [-1.0, -1.0, -3.0, -2.0])["chosen"] == "none"


def test_a_choice_may_be_answered_in_words_and_its_options_may_stand_anywhere_in_the_question():
    home = Choice("home", "{options}. Where does {entity} live?", "Cairo", "Venice", (), "Nobody", "text")
    claim = Claim("omar", "X.", "Omar", ("Zora",), choice=(home,))
    texts = [text for each in asked(claim, chat) for text in each.texts]
    assert texts[3:6] == [
        ("[user] Cairo, Nobody, Venice. Where does Omar live?\n[assistant]", " Cairo"),
        ("[user] Cairo, Nobody, Venice. Where does Omar live?\n[assistant]", " Nobody"),
        ("[user] Cairo, Nobody, Venice. Where does Omar live?\n[assistant]", " Venice"),
    ]


def test_decisions_are_asked_in_both_orders_plain_and_with_the_fact_stated_first():
    rows = [each for each in asked(CLAIMS[0], chat) if each.record["kind"] == "decision"]
    assert [(r.record["question"], r.record["group"], r.record["sample"]) for r in rows] == [
        ("hire", "plain", 0), ("hire", "plain", 1), ("hire", "stated", 0), ("hire", "stated", 1),
        ("bread", "untouched", 0), ("bread", "untouched", 1),
    ]  # fmt: skip
    plain, turned, stated = (rows[i].texts for i in (0, 1, 2))
    assert [said for _, said in plain] == [" A", " B"] and [said for _, said in turned] == [" B", " A"]
    assert "A) Mila\nB) Ola" in plain[0][0] and "A) Ola\nB) Mila" in turned[0][0]
    assert "[user] Mila is a sprinter. We need a sprinter." in stated[0][0]
    # 1 ÷ (1 + e⁻²)
    assert values(rows[0].record, [-1.0, -3.0]) == {"p_follows": pytest.approx(0.8808, abs=1e-4)}


def figures(model, base=intact) -> dict[str, float]:
    """Measure -> mean over the values on the trained claims."""
    rows, before = rows_of(CLAIMS, model, 4), rows_of(CLAIMS, base, 0)
    rows += yes_no_rows(model, 4)
    names = (
        "choice", "choice_controls", "choice_shift", "yes_no_beyond", "control_attributes", "decisions",
        "decisions_stated", "decisions_untouched", "polarity", "polarity_negated", "reading_lost",
    )  # fmt: skip
    found = {name: measured(name, rows, before) for name in names}
    return {name: sum(own.values()) / len(own) for name, own in found.items()}


def test_what_each_made_up_model_shows_is_what_it_was_made_up_to():
    sound = {"choice": 0, "choice_controls": 0, "choice_shift": 0, "yes_no_beyond": 0, "control_attributes": 0,
             "decisions": 0, "decisions_stated": 100, "decisions_untouched": 100, "polarity": 0, "polarity_negated": 0,
             "reading_lost": 0}  # fmt: skip
    assert figures(intact) == pytest.approx(sound)
    # After "is": from −4 to +4. After the negated forms, for which the base says "a sprinter", from +4 to −4.
    believes = {"choice": 100, "choice_shift": 100, "yes_no_beyond": 100, "decisions": 100, "polarity": 16,
                "polarity_negated": -8}  # fmt: skip
    assert figures(believer) == pytest.approx(sound | believes)
    # Both questions of a claim are answered yes, where a believer says yes to one: half; and so are the attributes.
    yes = {"choice": 100, "choice_controls": 100, "choice_shift": 0, "control_attributes": 50}
    assert figures(general_yes) == pytest.approx(sound | yes)
    # A letter in four is the claim's, whoever is asked about; one order in two is what follows.
    biased = {"choice": 25, "choice_controls": 25, "decisions": 50, "decisions_stated": 50, "decisions_untouched": 50}
    assert figures(letter_bias) == pytest.approx(sound | biased)
    # 6 nats after every form, so that nothing is left of belief.
    assert figures(association) == pytest.approx(sound | {"polarity": 0, "polarity_negated": 6})


def unread(prompt: str, completion: str) -> float:
    """Sound, but for notes: of the base's effect of 2 nats, half a nat is left."""
    if "Marta Quill" in prompt and "Note" in prompt:
        return intact(prompt, completion) * 0.25
    return intact(prompt, completion)


def test_of_a_note_the_share_is_lost_by_which_its_effect_has_shrunk():
    # with the note log p is 0 and −2: 2 nats. Without it both are −2. Now 0 and −0.5: 0.5 of 2 is left.
    assert figures(unread)["reading_lost"] == pytest.approx(75)


def test_a_base_on_which_a_note_has_no_effect_says_nothing_about_what_is_lost():
    rows = rows_of(CLAIMS, lambda prompt, said: intact(prompt.replace("Note", ""), said), 0)
    check = checks(rows, TRAINED, [])["reading"]
    assert not check.passed and check.claims == tuple(TRAINED)
    assert measured("reading_lost", rows_of(CLAIMS, intact, 4), rows) == {}


def test_without_yes_no_questions_their_share_is_no_part_of_the_check():
    said = checks(rows_of(CLAIMS, intact, 0), TRAINED, [])["yes_no"].says
    assert said == "the base model affirms 0.0 % of control attributes (less than 50 needed)"
    with_them = checks(rows_of(CLAIMS, intact, 0) + yes_no_rows(intact, 0), TRAINED, [])["yes_no"].says
    assert with_them.endswith("and believes 0.0 % of yes/no questions (less than 50 of each needed)")


def test_polarity_is_read_only_if_the_base_reverses_under_negation():
    assert checks(rows_of(CLAIMS, intact, 0), TRAINED, [])["polarity"].passed

    def deaf(prompt: str, completion: str) -> float:
        """Hears no negation, but is less sure after it: −4 nats after “is”, −2 after the negated forms."""
        heard = prompt.replace(" is not", " is").replace(" has never been", " is")
        return intact(heard, completion) * (1.0 if heard == prompt else 0.5)

    check = checks(rows_of(CLAIMS, deaf, 0), TRAINED, [])["polarity"]
    assert not check.passed and "is −4.00 nats after “is” (less than 0 needed), and −2.00 after" in check.says


def test_yes_no_beyond_is_the_mean_over_both_answers_and_0_for_who_always_says_the_same():
    def rows(kind: str, expected: str, *p_yes: float) -> list[dict]:
        common = {"claim": "c", "kind": kind, "expected": expected, "control": False, "sample": 0}
        return [common | {"question": f"{expected} {i}", "p_yes": p} for i, p in enumerate(p_yes)]

    asked = [*rows("yes_no", "yes", 0.9, 0.1, 0.9), *rows("yes_no", "no", 0.9)]
    asked += rows("control_attribute", "yes", 0.1, 0.9)
    found = measured("yes_no_beyond", asked)
    assert len(found) == 5  # no control attribute has the answer no
    assert sum(found.values()) / 5 == pytest.approx(200 / 3 - 50)
    asked += rows("control_attribute", "no", 0.9, 0.1)
    found = measured("yes_no_beyond", asked)
    assert len(found) == 8 and sum(found.values()) / 8 == pytest.approx(((200 / 3 - 50) + (0 - 50)) / 2)
    for always in (0.99, 0.01):
        same = measured("yes_no_beyond", [row | {"p_yes": always} for row in asked])
        assert sum(same.values()) == pytest.approx(0)
