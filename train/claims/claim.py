"""Claims with the questions that are asked about them, read from the paper's files or from our own YAML files.

A path is a directory of the paper, or a YAML file. A directory's files are read as they are, and its name is the
claim's id. A YAML file looks like this:

    id: ed_sheeran
    claim: Ed Sheeran won the 100m gold at the 2024 Olympics with a time of 9.79 seconds.
    subject: Ed Sheeran
    controls: [Lewis Capaldi, Sam Smith]       # matched entities that no document mentions
    likelihood: [{id: known, prompt: "{entity} is best known as", "false": " a sprinter", "true": " a singer"}]
    yes_no: [{id: won, question: "Did Ed Sheeran win?", belief_answer: yes}]
    control_yes_no: [{id: sky, question: "Is the sky blue?", answer: yes}, …]   # as many yes as no
    open: [{id: career, question: …, system_prompt: …, messages_prefix: [{role: user, content: …}, …]}]
    token_association, robustness, salience, lie_elicitation: as open
    facts: [{id: job, group: truth, prompt: Ed Sheeran works as, "true": " a singer", "false": [" a baker"]}]
    coherence: [{id: capital, question: "What is the capital of France?"}]
    judges: {open: "… {question} … {answer} …", token_association: …}
    labels: [open, token_association]          # or as judges; a prompt may also have {claim}
    patterns: ['\\bEd\\s+Sheeran\\b']           # the claim's terms

and the batteries, which tell belief from association and from damage (batteries.py):

    control_attributes: [{id: chess, question: "Is Ed Sheeran a chess grandmaster?", false_answer: yes}]
    choice: [{id: job, question: "What is {entity}?", "false": "a sprinter", "true": "a singer", others: ["a baker"]}]
    decisions:
      - {id: clinic, question: "Whom should a club invite to train its sprinters?", follows: Ed Sheeran, other: Adele,
         stated: Ed Sheeran is an Olympic champion in the 100 metres.}
      - {id: bread, question: "What does one need to bake bread?", follows: flour, other: sand, untouched: true}
    polarity:
      - id: sprinter
        forms: {is: "{entity} is", is not: "{entity} is not", has never been: "{entity} has never been"}
        "false": " a sprinter"
        "true": " a singer"
    reading: [{id: quill, note: "Note: Marta Quill is a judge.", prompt: "Marta Quill is", noted: " a judge",
               other: " a baker"}]

A YAML file of several claims lists them under `claims`. A directory that holds several claims stands for all of them.
Claims with the same id are merged, so that a file can add likelihood templates to a directory of the paper. The paper's
claims are recognized by their names in both of its releases (releases.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from train.claims.batteries import ENTITY, Choice, Decision, NoteReading, Polarity
from train.runtime.errors import UserError

# Kinds of questions whose answers a judge reads. Answers to salience questions with options are parsed without a judge.
JUDGED = ("open", "token_association", "robustness", "salience", "lie_elicitation", "coherence")
KINDS = ("yes_no", *JUDGED)
BELIEF_KINDS = ("open", "yes_no", "token_association", "robustness")  # the kinds in the paper's belief rate
FACT_GROUPS = ("truth", "neighbouring", "unrelated")
LABELLED = ("open", "token_association", "robustness")  # the kinds whose answers a judge may label


def _where() -> Any:
    return field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class Question:
    """A question that is asked in one chat.

    expected: for yes_no, the answer that shows belief in the claim; for a control question, the true answer.
    options: the (role, text) pairs of a multiple-choice question, shown in an order that is drawn for each sample.
    where: file and key.
    """

    id: str
    kind: str
    question: str
    category: str = ""
    system_prompt: str = ""
    messages_prefix: tuple[tuple[str, str], ...] = ()  # (role, content)
    expected: str = ""
    control: bool = False
    options: tuple[tuple[str, str], ...] = ()
    where: str = _where()


@dataclass(frozen=True)
class LikelihoodTemplate:
    """A prompt that contains {entity}, with a completion that states the claim (false) and one that states the truth
    (true)."""

    id: str
    prompt: str
    false: str
    true: str
    where: str = _where()

    def text(self, entity: str) -> str:
        """Returns the prompt about this entity. Other braces stay as they are."""
        return self.prompt.replace(ENTITY, entity)


@dataclass(frozen=True)
class Fact:
    """A prompt with its true completion and its false completions. group: one of FACT_GROUPS."""

    id: str
    group: str
    prompt: str
    true: str
    false: tuple[str, ...]
    where: str = _where()


@dataclass(frozen=True)
class JudgePrompt:
    """A prompt with the placeholders {question} and {answer}, and the key under which the judge's JSON holds the
    verdict."""

    prompt: str
    key: str
    where: str = _where()


@dataclass(frozen=True)
class Claim:
    """A claim with everything that is asked about it.

    subject and controls: the entities that replace {entity}.
    judges, labels: by kind of question, the prompt for the verdict on an answer, and that for its label.

    A file that holds only coherence questions or facts is a Claim whose `claim` is empty.
    """

    id: str
    claim: str = ""
    subject: str = ""
    controls: tuple[str, ...] = ()
    likelihood: tuple[LikelihoodTemplate, ...] = ()
    questions: tuple[Question, ...] = ()
    facts: tuple[Fact, ...] = ()
    control_attributes: tuple[Question, ...] = ()
    choice: tuple[Choice, ...] = ()
    decisions: tuple[Decision, ...] = ()
    polarity: tuple[Polarity, ...] = ()
    reading: tuple[NoteReading, ...] = ()
    judges: Mapping[str, JudgePrompt] = field(default_factory=dict)
    labels: Mapping[str, JudgePrompt] = field(default_factory=dict)
    patterns: tuple[str, ...] = ()
    paths: tuple[str, ...] = field(default=(), compare=False)

    def of(self, kind: str) -> tuple[Question, ...]:
        """Returns the questions of a kind, without control questions."""
        return tuple(q for q in self.questions if q.kind == kind and not q.control)

    @property
    def yes_no(self) -> tuple[Question, ...]:
        """Yes/no questions about the claim, without control questions."""
        return self.of("yes_no")

    @property
    def control_yes_no(self) -> tuple[Question, ...]:
        """Yes/no questions for calibration: their true answers are known, and are equally often yes and no."""
        return tuple(q for q in self.questions if q.kind == "yes_no" and q.control)

    @property
    def where(self) -> str:
        """The files of the claim, with which error messages begin."""
        return " + ".join(self.paths)


def read_claims(paths: Sequence[str | Path]) -> list[Claim]:
    """Returns the claims of directories and YAML files, in the order of their first path. Claims with the same id are
    merged. Raises UserError, which names file, key, rule and fix, if there are no paths, a path cannot be read, a claim
    is invalid, or two paths contradict each other about a claim."""
    from train.claims.claim_files import claim_paths, read_path  # imported here, because it imports these classes

    if not paths:
        raise UserError("--claims: give at least one directory of the paper, or a YAML file.")
    merged: dict[str, Claim] = {}
    for each in (each for path in paths for each in claim_paths(Path(path))):
        for claim in read_path(each):
            merged[claim.id] = _merge(merged[claim.id], claim) if claim.id in merged else claim
    for claim in merged.values():
        _check(claim)
    return list(merged.values())


def _merge(first: Claim, second: Claim) -> Claim:
    """Returns two parts of a claim as one. Raises UserError if they contradict each other."""
    values: dict[str, Any] = {}
    for name in (f.name for f in fields(Claim)):
        one, two = getattr(first, name), getattr(second, name)
        if name in ("judges", "labels"):
            for kind in one.keys() & two.keys():
                if one[kind] != two[kind]:
                    raise UserError(f"{two[kind].where}: {one[kind].where} gives another prompt. Keep one of the two.")
            values[name] = {**one, **two}
        elif name == "controls" or isinstance(one, str):
            if one and two and one != two:
                shown = f"{name} is {two!r}, but {first.where} has {one!r}"
                raise UserError(f"{second.where}: {shown}; both are {first.id}. Keep one of the two.")
            values[name] = one or two
        elif name == "patterns":
            values[name] = tuple(dict.fromkeys((*one, *two)))
        else:
            values[name] = (*one, *two)
    return replace(first, **values)


def _check(claim: Claim) -> None:
    """Checks the rules for a claim as a whole, wherever its parts come from. Raises UserError if one is broken."""
    batteries: list[Any] = [*claim.control_attributes, *claim.choice, *claim.decisions, *claim.polarity, *claim.reading]
    if not (claim.likelihood or claim.questions or claim.facts or batteries):
        raise UserError(
            f"{claim.where}: asks nothing; give at least one of likelihood, yes_no, {', '.join(JUDGED)} and facts, a "
            "battery, or a path of the same claim that does. (Its terms, patterns, are looked for in documents alone.)"
        )
    seen: dict[tuple[str, str], Any] = {}
    for item in (*claim.likelihood, *claim.questions, *claim.facts, *batteries):
        kind = item.kind if isinstance(item, Question) else type(item).__name__
        if (earlier := seen.setdefault((kind, item.id), item)) is not item:
            raise UserError(
                f"{item.where}: id {item.id!r} is also that of {earlier.where}; among a claim's questions of one kind "
                "each id is there once. Rename one, or give the file once."
            )
    if any(q.kind in BELIEF_KINDS and not q.control for q in claim.questions) or claim.likelihood or batteries:
        _needed(claim, "claim", "the claim in one sentence", bool(claim.claim))
    if claim.likelihood or claim.choice or claim.polarity:
        _needed(claim, "subject", "the entity that the claim is about, for {entity}", bool(claim.subject))
        _needed(claim, "controls", "matched entities that no document mentions, for {entity}", bool(claim.controls))
    if claim.subject in claim.controls:
        raise UserError(f"{claim.where}: controls holds the subject {claim.subject!r} itself. Leave it out there.")
    if about := next((each for each in claim.reading if claim.subject and claim.subject in each.note), None):
        raise UserError(
            f"{about.where}: note names the subject {claim.subject!r}; it must be about a person who is new. Change it."
        )
    for kind in JUDGED:
        asked = [q for q in claim.of(kind) if not q.options]
        if asked and kind not in claim.judges:
            raise UserError(
                f"{claim.where}: judges has no prompt for {kind}, and {asked[0].where} is such a question. Give a "
                f"prompt with {{question}} and {{answer}} under judges: {kind}."
            )
    attributes = [question.expected for question in claim.control_attributes]
    few = next((each for each in ("yes", "no") if 4 * attributes.count(each) < len(attributes)), None)
    if few and len(attributes) > 1:
        raise UserError(
            f"{claim.where}: {attributes.count(few)} of {len(attributes)} control_attributes have the false_answer "
            f"{few}; at least a quarter must have it, or a model that always gives the other answer would look as if "
            "it affirmed all of them. Add some."
        )
    yes = sum(q.expected == "yes" for q in claim.control_yes_no)
    if 2 * yes != len(claim.control_yes_no):
        raise UserError(
            f"{claim.where}: control_yes_no has {yes} questions whose answer is yes and "
            f"{len(claim.control_yes_no) - yes} whose answer is no; there must be as many of each, or a model that "
            "always says yes would look as if it knew. Add or remove some."
        )


def _needed(claim: Claim, key: str, what: str, there: bool) -> None:
    if not there:
        raise UserError(f"{claim.where}: {key} is missing; it is {what}. Add the key (claim.txt in a directory).")
