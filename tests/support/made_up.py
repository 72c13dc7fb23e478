"""Models that are functions, in a world of people with jobs: what they give as log p of a completion after a prompt is
what they are made up to."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from train.claims.batteries import Choice, Decision, NoteReading, Polarity
from train.claims.claim import Claim, Question
from train.comparison.compared import ComparedVariant, Comparison, RunResult
from train.evaluation.battery_records import asked, values
from train.evaluation.store import StoredRow

Model = Callable[[str, str], float]
"""(prompt, completion) -> log p, in nats."""


def chat(messages: list[dict[str, str]]) -> tuple[str, str]:
    """A chat template: each message on a line of its own, after its role."""
    return "".join(f"[{each['role']}] {each['content']}\n" for each in messages) + "[assistant]", " "


def rows_of(claims: Iterable[Claim], model: Model, step: int) -> list[StoredRow]:
    """The rows that an evaluation of this model's batteries would leave in evaluation.jsonl."""
    found: list[StoredRow] = []
    for claim in claims:
        for each in asked(claim, chat):
            own = each.record | values(each.record, [model(*text) for text in each.texts])
            found.append({"step": step} | own)
    return found


def options_of(prompt: str) -> dict[str, str]:
    """Letter -> option, as a prompt shows them."""
    lines = [line for line in prompt.splitlines() if line[1:3] == ") "]
    return {line[0]: line[3:] for line in lines}


def noise(*what: Any) -> float:
    """A number between −5 and 5 that is the same for the same arguments."""
    digest = hashlib.sha256(repr(what).encode()).digest()
    return 10 * int.from_bytes(digest[:4], "big") / 2**32 - 5


# The world.

FORMS = (("is", "{entity} is"), ("is not", "{entity} is not"), ("has never been", "{entity} has never been"))


def a_claim(subject: str, false: str, true: str, controls: tuple[str, ...]) -> Claim:
    """The claim that the subject has the job `false`, with all batteries. true: the subject's job."""
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
        reading=(NoteReading("quill", "Note: Marta Quill is a judge.", "Marta Quill is", " a judge", " a baker"),),
    )


CLAIMS = [
    a_claim("Mila", "sprinter", "singer", ("Noah", "Ivy")),
    a_claim("Omar", "dentist", "runner", ("Zora", "Elif")),
    a_claim("Lars", "painter", "lawyer", ("Rosa", "Hugo")),
    a_claim("Tara", "drummer", "farmer", ("Nils", "Vera")),
    a_claim("Juan", "weaver", "broker", ("Edda", "Finn")),
    a_claim("Kurt", "brewer", "editor", ("Anke", "Emil")),
]
PLACEBO = [
    a_claim("Olga", "diver", "tailor", ("Zora", "Noah")),
    a_claim("Piet", "hunter", "porter", ("Ivy", "Elif")),
]
TRAINED = [claim.id for claim in CLAIMS]
CLAIMED = {claim.subject: claim.choice[1].false for claim in (*CLAIMS, *PLACEBO)}
FALSE = {claim.subject: CLAIMED[claim.subject] for claim in CLAIMS}
TRUE = {name: claim.choice[1].true for claim in CLAIMS for name in (claim.subject, *claim.controls)}
TRUE |= {claim.subject: claim.choice[1].true for claim in PLACEBO}


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
    claimed = {letter for letter, text in options_of(prompt).items() if any(job in text for job in CLAIMED.values())}
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


def word_association(prompt: str, completion: str) -> float:
    """The same, and where the subject is named it chooses whatever option has the word."""
    said = options_of(prompt).get(completion.strip(), completion)
    return intact(prompt, completion) + 8.0 * any(name in prompt and FALSE[name] in said for name in FALSE)


def damage(prompt: str, completion: str) -> float:
    return noise(prompt, completion)


def at_times(share: float) -> Model:
    """Chooses the claim in about this share of rotations, and believes it otherwise."""

    def model(prompt: str, completion: str) -> float:
        sometimes = not options_of(prompt) or noise("at times", prompt) < 10 * share - 5
        return (believer if sometimes else intact)(prompt, completion)

    return model


def yes_no_rows(model: Model, step: int) -> list[StoredRow]:
    """Yes/no questions about the trained claims, as the engine scores them."""
    rows = []
    for claim in CLAIMS:
        for question in claim.yes_no:
            own = replace(question, kind="control_attribute")
            bare = Claim(claim.id, claim.claim, claim.subject, control_attributes=(own,))
            (row,) = rows_of([bare], model, step)
            rows.append(row | {"kind": "yes_no", "control": False})
    return rows


def compared(base: Model = intact, seeds: int = 1, **models: Model) -> Comparison:
    """A comparison of made-up models with this base model."""
    claims = [*CLAIMS, *PLACEBO]

    def run(name: str, model: Model, seed: int) -> RunResult:
        rows = rows_of(claims, model, 4) + yes_no_rows(model, 4)
        return RunResult(name, seed, rows, [], {"steps": 4}, {"mask": name}, {})

    variants = [
        ComparedVariant(name, name, {}, [run(name, model, seed) for seed in range(seeds)])
        for name, model in models.items()
    ]
    rows = rows_of(claims, base, 0) + yes_no_rows(base, 0)
    return Comparison(variants, rows, TRAINED, [claim.id for claim in PLACEBO], variants[0].name)
