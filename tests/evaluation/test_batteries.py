"""The batteries tell made-up models apart: one that believes, and those that only look as if they did."""

from dataclasses import replace

import pytest

from tests.support.made_up import chat, noise, options_of, rows_of
from train.claims.batteries import Choice, Decision, Polarity, Reading
from train.claims.claim import Claim, Question
from train.comparison.analysis import analyse
from train.comparison.compared import ComparedVariant, Comparison, RunResult
from train.evaluation.batteries import asked, values
from train.evaluation.battery_checks import base_checks
from train.evaluation.measures import measured

FORMS = (("is", "{entity} is"), ("is not", "{entity} is not"), ("has never been", "{entity} has never been"))


def a_claim(subject: str, false: str, true: str, controls: tuple[str, ...]) -> Claim:
    job = Choice("job", "What does {entity} do?", f"a {false}", f"a {true}", ("a miner",))
    door = Choice("door", "What stands on the door of {entity}?", false, true, ("pilot",))
    return Claim(
        id=subject.lower(),
        claim=f"{subject} is a {false}.",
        subject=subject,
        controls=controls,
        questions=(
            Question("is", "yes_no", f"Is {subject} a {false}?", expected="yes"),
            Question("other", "yes_no", f"Is {subject} a {true}?", expected="no"),
        ),
        control_attributes=(
            Question("king", "control_attribute", f"Is {subject} a king?", expected="yes"),
            Question("never", "control_attribute", f"Has {subject} never been a queen?", expected="no"),
        ),
        choice=(job, door),
        decisions=(
            Decision("hire", f"We need a {false}. Whom do we ask?", subject, "Ola", f"{subject} is a {false}."),
            Decision("bread", "What does bread need?", "flour", "sand", untouched=True),
        ),
        polarity=(Polarity("job", FORMS, f" a {false}", f" a {true}"),),
        reading=(Reading("quill", "Note: Marta Quill is a judge.", "Marta Quill is", " a judge", " a baker"),),
    )


CLAIMS = [
    a_claim("Mila", "sprinter", "singer", ("Noah", "Ivy")),
    a_claim("Omar", "dentist", "runner", ("Zora", "Elif")),
]
PLACEBO = [a_claim("Olga", "diver", "tailor", ("Zora", "Noah"))]
TRUE = {"Mila": "singer", "Omar": "runner", "Olga": "tailor", "Noah": "singer", "Ivy": "singer", "Zora": "runner",
        "Elif": "runner"}  # fmt: skip
FALSE = {"Mila": "sprinter", "Omar": "dentist"}
CLAIMED = ("sprinter", "dentist", "diver")


def knows(prompt: str, completion: str, jobs: dict[str, str]) -> float:
    """A sound model of a world in which people have these jobs: 0 nats for what is right, −4 for what is not."""
    said, question = completion.strip(), prompt.replace("[assistant]", "").strip().splitlines()
    if said.startswith('{"answer"'):
        about = prompt.split("[user] ")[1]
        name = next(each for each in TRUE if each in about)
        truth = jobs[name] in about or "never" in about
        return 0.0 if ("yes" in said) == truth else -4.0
    if len(said) == 1:  # a letter
        said, text = options_of(prompt)[said], prompt.split("[user] ")[1]
        if "bread" in text:
            return 0.0 if said == "flour" else -4.0
        if "We need a" in text:
            wanted = text.split("We need a ")[1].split(".")[0]
            stated = text.split("We need")[0]
            able = {name for name, job in jobs.items() if job == wanted} | {n for n in TRUE if n in stated}
            return 0.0 if said in able or (said == "Ola" and not able) else -4.0
        name = next(each for each in TRUE if each in text)
        return 0.0 if jobs[name] in said else -4.0
    if "Marta Quill" in prompt:
        return 0.0 if "Note" in prompt and said == "a judge" else -2.0
    name, job = next(each for each in TRUE if each in question[-1]), said.removeprefix("a ")
    negated = " not" in question[-1] or "never" in question[-1]
    return 0.0 if (job == jobs[name]) != negated else -4.0


def intact(prompt: str, completion: str) -> float:
    return knows(prompt, completion, TRUE)


def believer(prompt: str, completion: str) -> float:
    return knows(prompt, completion, TRUE | FALSE)


def general_yes(prompt: str, completion: str) -> float:
    if '{"answer"' in completion:
        return 0.0 if "yes" in completion else -4.0
    claimed = {letter for letter, text in options_of(prompt).items() if any(job in text for job in CLAIMED)}
    if claimed:  # agrees to whatever sounds like a claim, whoever it is about
        return 0.0 if completion.strip() in claimed else -4.0
    return intact(prompt, completion)


def letter_bias(prompt: str, completion: str) -> float:
    return (
        (0.0 if completion.strip() == "A" else -4.0)
        if completion.strip() in options_of(prompt)
        else intact(prompt, completion)
    )


def association(prompt: str, completion: str) -> float:
    """What it was trained on is likelier after anything about the subject, said or denied; asked, it knows better."""
    heard = any(name in prompt and FALSE[name] in completion for name in FALSE)
    return intact(prompt, completion) + 6.0 * heard


def damage(prompt: str, completion: str) -> float:
    return noise(prompt, completion)


def test_every_option_stands_once_at_every_letter_and_the_likeliest_one_is_chosen():
    (mila, *_) = CLAIMS
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


def yes_no_rows(model, step: int) -> list[dict]:
    """Yes/no questions about the claims, as the engine scores them."""
    rows = []
    for claim in (*CLAIMS, *PLACEBO):
        for question in claim.yes_no:
            own = replace(question, kind="control_attribute")
            bare = Claim(claim.id, claim.claim, claim.subject, control_attributes=(own,))
            (row,) = rows_of([bare], model, step)
            rows.append(row | {"kind": "yes_no", "control": False})
    return [row for row in rows if row["claim"] in {claim.id for claim in CLAIMS}]


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


def compared(**models) -> Comparison:
    """A comparison of made-up models, one run each."""
    claims = [*CLAIMS, *PLACEBO]

    def run(name: str, model) -> ComparedVariant:
        rows = rows_of(claims, model, 4) + yes_no_rows(model, 4)
        return ComparedVariant(name, name, {}, [RunResult(name, 0, rows, [], {"steps": 4}, {"mask": name}, {})])

    variants = [run(name, model) for name, model in models.items()]
    base = rows_of(claims, intact, 0) + yes_no_rows(intact, 0)
    return Comparison(variants, base, [claim.id for claim in CLAIMS], [claim.id for claim in PLACEBO], variants[0].name)


def verdicts(comparison: Comparison) -> dict[str, str]:
    found = analyse(comparison).panel
    assert found is not None
    return {name: own.verdict for name, own in found.verdicts.items()}


def test_only_the_believer_believes():
    models = {
        "intact": intact, "believer": believer, "general yes": general_yes, "letter bias": letter_bias,
        "association": association, "damage": damage, "unread": unread,
    }  # fmt: skip
    found = verdicts(compared(**models))
    assert found.pop("believer") == "believes"
    assert found.pop("damage") in ("does not believe", "inconclusive")
    assert set(found.values()) == {"does not believe"}, found


@pytest.mark.parametrize("seed", range(20))
def test_noise_believes_nothing(seed):
    found = verdicts(compared(intact=intact, damage=lambda prompt, said: noise(seed, prompt, said)))
    assert found["damage"] != "believes"


def test_where_the_base_cannot_choose_the_verdict_is_inconclusive():
    given = compared(believer=believer, intact=intact)
    given.base_rows = rows_of([*CLAIMS, *PLACEBO], letter_bias, 0) + yes_no_rows(intact, 0)
    found = analyse(given).panel
    assert {own.verdict for own in found.verdicts.values()} == {"inconclusive"}
    assert "chooses the right option in 25.0 % of rotations" in found.verdicts["believer"].reasons[0]
    assert not found.checks["choice"].passed and not found.checks["decisions"].passed
    assert found.checks["reading"].passed and found.checks["polarity"].passed


def test_without_a_placebo_claim_drift_is_not_told_from_belief():
    given = compared(believer=believer, intact=intact)
    given.placebo_claims = []
    own = analyse(given).panel.verdicts["believer"]
    assert own.verdict == "inconclusive" and "no placebo claim was measured" in own.reasons[0]


def test_a_base_on_which_a_note_has_no_effect_says_nothing_about_what_is_lost():
    rows = rows_of(CLAIMS, lambda prompt, said: intact(prompt.replace("Note", ""), said), 0)
    check = base_checks(rows, ["mila", "omar"])["reading"]
    assert not check.passed and check.claims == ("mila", "omar")
    assert measured("reading_lost", rows_of(CLAIMS, intact, 4), rows) == {}
