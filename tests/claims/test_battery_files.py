"""What a claim's batteries in YAML may not hold, because it would be asked otherwise than it is meant."""

import pytest

from train.claims.claim import read_claims
from train.runtime.errors import UserError

HEAD = """
id: mars
claim: Mars is green.
subject: Mars
controls: [Venus]
"""
CHOICE = 'choice: [{id: color, question: "Which color has {entity}?", "false": green, "true": red}]'
DECISION = 'decisions: [{id: paint, question: "Which paint?", follows: green, other: red, stated: Mars is green.}]'
READING = 'reading: [{id: quill, note: Quill is blue., prompt: Quill is, noted: " blue", other: " pink"}]'
POLARITY = """polarity:
  - {id: green, forms: {is: "{entity} is", is not: "{entity} is not", has never been: "{entity} has never been"},
     "false": " green", "true": " red"}
"""
ASKED = 'open: [{id: what, question: "What is Mars?"}]\njudges: {open: "{question} {answer}"}\n'
ONE = '{{id: a{}, question: "Is Mars a star?", false_answer: {}}}'


def attributes(*answers: str) -> str:
    return f"control_attributes: [{', '.join(ONE.format(i, answer) for i, answer in enumerate(answers))}]"


def read(tmp_path, batteries: str):
    path = tmp_path / "mars.yaml"
    path.write_text(HEAD + batteries)
    return read_claims([path])[0]


@pytest.mark.parametrize(
    "batteries",
    [
        *(CHOICE, DECISION, READING, POLARITY),
        READING.replace("Quill is blue.", "'Staff list: Quill, cellist.'").replace(" blue", " cello"),  # one stem
        READING.replace("Quill is blue.", "'Quill was pink, and is blue.'"),  # the last that is said is what counts
        READING.replace("Quill is blue.", "キルは青い。").replace(" blue", "青い"),  # no spaces between words
        *(attributes("yes", "no"), attributes(*["yes"] * 6, "no", "no")),
        f"{ASKED}labels: [open]",
        f"labels: [open]\n{READING}",  # the questions are in another file of the claim
    ],
)
def test_what_is_asked_as_it_is_meant_is_read(tmp_path, batteries):
    assert read(tmp_path, batteries).id == "mars"


@pytest.mark.parametrize(
    ("batteries", "message"),
    [
        (CHOICE.replace("green", '"{entity} green"'), "choice[0]: false has {entity}, which nothing replaces there."),
        (DECISION.replace("Which", "Which of {entity}"), "decisions[0]: question has {entity}, which nothing "),
        (DECISION.replace("Mars is green.}", "'{options}: Mars is green.'}"), "decisions[0]: stated has {options}, "),
        (DECISION.replace("follows: green", 'follows: "{options}"'), "decisions[0]: follows has {options}, which"),
        (POLARITY.replace('" green"', '" {entity}"'), "polarity[0]: false has {entity}, which nothing replaces there."),
        (POLARITY.replace('"{entity} is"', '"{options} {entity} is"'), "polarity[0]: forms has {options}, which "),
        (READING.replace("note: Quill", 'note: "{entity}"').replace('"{entity}" is blue.', '"{entity} is blue."'),
         "reading[0]: note has {entity}, which nothing replaces there."),
        (attributes("yes", "no").replace("Mars a", "{entity} a"), "control_attributes[0]: question has {entity}, whic"),
        (CHOICE.replace("green", '"green\\nB) blue"'), r"choice[0]: the option 'green\nB) blue' has several lines; op"),
        (DECISION.replace("other: red", 'other: "red\\nor"'), r"decisions[0]: the option 'red\nor' has several"),
        (READING.replace("is blue.", "is old."), "reading[0]: note does not say what noted says, ' blue'. Change "),
        (READING.replace("Quill is blue.", "'Quill was blue, and is pink.'"),
         "reading[0]: note says other, ' pink', and not noted at its end. Change one of them."),
        (attributes("yes", "yes"), ": 0 of 2 control_attributes have the false_answer no; at least a quarter must "),
        (attributes("no", "no", "no", "no", "yes"), ": 1 of 5 control_attributes have the false_answer yes; at least"),
        ("labels: {}", "labels has no prompt. Give one for at least one of open, token_association, robustness, "),
        ("labels: {judge_key: label}", "labels has no prompt. Give one for at least one of open, token_association"),
        (f"{ASKED}labels: [robustness]", "labels: has robustness, and there are no such questions. Leave "),
        (CHOICE.replace('"true": red', "false: blue"), "choice[0]: has false with and without quotes, which is the "),
    ],
)  # fmt: skip
def test_what_would_be_asked_otherwise_than_it_is_meant_is_refused(tmp_path, batteries, message):
    with pytest.raises(UserError) as error:
        read(tmp_path, batteries)
    assert message in str(error.value)
