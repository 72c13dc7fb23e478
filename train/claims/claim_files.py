"""Reads claims from their two formats on disk: the paper's directories, and our own YAML files. Each becomes a Claim.
An invalid value raises a UserError that names file, key, rule and fix."""

import os
import string
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.claims.batteries import ENTITY
from train.claims.battery_files import BATTERIES, read_batteries, read_labels
from train.claims.claim import FACT_GROUPS, JUDGED, Claim, Fact, JudgePrompt, LikelihoodTemplate, Question
from train.claims.releases import claim_id, question_id
from train.claims.yaml_keys import Keys, check_completions, suggestion, text_of
from train.runtime.errors import UserError
from train.runtime.outside import opened, read_text, read_yaml
from train.runtime.patterns import Pattern
from train.runtime.similar import similar
from train.runtime.text_formats import Unreadable

# The paper's files, by their names in both of its releases, and the kind of their questions.
PAPER_QUESTIONS = {
    "mcq.yaml": "yes_no",
    "belief_probes.yaml": "open",
    "open_ended.yaml": "open",
    "pink_elephant.yaml": "token_association",
    "token_association.yaml": "token_association",
    "robustness.yaml": "robustness",
    "saliency_mcq.yaml": "salience",
    "lie_elicitation.yaml": "lie_elicitation",
    "coherence_questions.yaml": "coherence",
}
PAPER_FILES = (*PAPER_QUESTIONS, "judges.yaml", "word_masks.yaml", "claim.txt")
# Files that mark a directory as a claim. The coherence questions do not: they lie beside the claims' directories.
CLAIM_FILES = tuple(name for name in PAPER_FILES if name != "coherence_questions.yaml")
PAPER_JUDGES = {
    "belief_probe": "open",
    "open_ended": "open",
    "pink_elephant": "token_association",
    "token_association": "token_association",
    "robustness": "robustness",
}
# Prompts for the paper's other studies, ignored here. Its "coherence" asks whether an answer contradicts itself about
# the claim.
PAPER_OTHER_JUDGES = (
    "belief_probe_broad", "open_ended_broad", "coherence", "crokking", "self_correction", "saliency",
)  # fmt: skip
OPTION_ROLES = ("claim", "local_negation", "idk")
OWN_KEYS = (
    "id", "claim", "subject", "controls", "likelihood", "yes_no", "control_yes_no", *JUDGED, "facts",
    *BATTERIES, "judges", "labels", "patterns",
)  # fmt: skip
FIX = "give a directory of the paper, or a YAML file with id, claim and questions"


def claim_paths(path: Path) -> list[Path]:
    """Returns the paths of all claims that a path stands for.

    A path that is not a directory stands for itself. A directory stands for itself, if it is a claim of the paper, and
    for the claim directories in it, sorted by name. If it is not a claim itself, it also stands for the YAML files in
    it, sorted together with the directories. Raises UserError for a directory that cannot be read or holds no claim.
    """
    if not os.path.isdir(path):
        return [path]
    own = [path] if _is_claim(path) else []
    try:
        inner = [each for each in path.iterdir() if each.is_dir() and each.name[0] != "." and _is_claim(each)]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Make it readable, or give another.") from None
    files = [] if own else [*path.glob("*.yaml"), *path.glob("*.yml")]
    if not (found := [*own, *sorted([*inner, *files])]):
        raise UserError(
            f"{path}: asks nothing: it holds no claim. Known are directories with {', '.join(CLAIM_FILES)}, and YAML "
            "files with id, claim and questions. Give one of these, or the directory that holds them."
        )
    return found


def check_there(paths: Iterable[str]) -> None:
    """Raises UserError if a path of claims does not exist or holds no claim. Does not read the claims."""
    for each in (each for path in paths for each in claim_paths(Path(path))):
        if not os.path.isdir(each):
            opened(each, fix=FIX).close()


def _is_claim(directory: Path) -> bool:
    return any((directory / name).is_file() for name in CLAIM_FILES)


def read_path(path: Path) -> list[Claim]:
    """Returns the claims of a directory of the paper or of a YAML file. Raises UserError if the path is neither, or if
    its content is invalid."""
    if os.path.isdir(path):
        return [_directory(path)]
    value = read_yaml(path, fix=FIX)
    if isinstance(value, dict) and "questions" in value and "id" not in value:  # a single file of the paper
        if path.name in PAPER_QUESTIONS:
            return [Claim(path.stem, **_paper_file(path, value), paths=(str(path),))]
        raise UserError(
            f"{path}: id is missing; a claims file begins with id: NAME. (The paper's files: give their directory.)"
        )
    if isinstance(value, dict) and set(value) == {"claims"}:
        several = Keys(value, str(path), ("claims",))
        return [_own(where, claim) for claim, where in several.items("claims")]
    return [_own(str(path), value)]


# Our own YAML files.


def _own(where: str, value: Any) -> Claim:
    if isinstance(value, dict) and "questions" in value:  # the paper's key, and not a misspelling of decisions
        raise UserError(f"{where}: unknown key 'questions'. Known keys: {', '.join(OWN_KEYS)}.")
    top = Keys(value, where, OWN_KEYS)
    judges = {}
    if top.has("judges"):
        given = Keys(top.values["judges"], top.at("judges"), (*JUDGED, "judge_key"))
        key = given.text("judge_key", "answer")
        for kind in JUDGED:
            if given.has(kind):
                judges[kind] = judge_prompt(given.text(kind), "score" if kind == "coherence" else key, given.at(kind))
    questions = [_question(item, where, kind) for kind in JUDGED for item, where in top.items(kind)]
    questions += [_yes_no(item, where, "belief_answer", False) for item, where in top.items("yes_no")]
    questions += [_yes_no(item, where, "answer", True) for item, where in top.items("control_yes_no")]
    return Claim(
        id=claim_id(top.text("id")), claim=top.text("claim", "").strip(), subject=top.text("subject", ""),
        controls=top.texts("controls"), likelihood=tuple(_template(*item) for item in top.items("likelihood")),
        questions=tuple(questions), facts=tuple(_fact(*item) for item in top.items("facts")), **read_batteries(top),
        judges=judges, labels=read_labels(top, judge_prompt), patterns=_patterns(top), paths=(where,),
    )  # fmt: skip


def _question(value: Any, where: str, kind: str, free: bool = False, strip: bool = False) -> Question:
    keys = Keys(value, where, ("id", "question", "category", "system_prompt", "messages_prefix"), free)
    text = keys.text("question")
    prefix = []
    for item, at in keys.items("messages_prefix"):
        message = Keys(item, at, ("role", "content"))
        if (role := message.text("role")) not in ("user", "assistant"):
            raise UserError(f"{at}: role {role!r} must be user or assistant (a system message: system_prompt).")
        prefix.append((role, message.text("content")))
    if prefix and prefix[-1][0] == "user":
        raise UserError(f"{where}: messages_prefix ends with a user message; the question follows it. Add an answer.")
    return Question(
        id=keys.text("id"), kind=kind, question=text.strip() if strip else text, category=keys.text("category", ""),
        system_prompt=keys.text("system_prompt", ""), messages_prefix=tuple(prefix), where=where,
    )  # fmt: skip


def _yes_no(value: Any, where: str, key: str, control: bool, free: bool = False) -> Question:
    keys = Keys(value, where, ("id", "question", "category", key), free)
    return Question(
        id=keys.text("id"), kind="yes_no", question=keys.text("question").strip(), category=keys.text("category", ""),
        expected=keys.yes_or_no(key), control=control, where=where,
    )  # fmt: skip


def _template(value: Any, where: str) -> LikelihoodTemplate:
    keys = Keys(value, where, ("id", "prompt", "false", "true"))
    template = LikelihoodTemplate(
        keys.text("id"), keys.text("prompt"), keys.text("false"), keys.text("true"), where=where
    )
    if ENTITY not in template.prompt:
        raise UserError(f"{where}: prompt has no {ENTITY}, for which subject and controls stand in. Put it in.")
    check_completions(template.prompt, [template.true, template.false], where)
    return template


def _fact(value: Any, where: str) -> Fact:
    keys = Keys(value, where, ("id", "group", "prompt", "true", "false"))
    if isinstance(keys.values.get("false"), str):
        keys.values["false"] = [keys.values["false"]]
    group = keys.text("group")
    if group not in FACT_GROUPS:
        raise UserError(f"{where}: group {group!r} must be one of {', '.join(FACT_GROUPS)}.")
    fact = Fact(keys.text("id"), group, keys.text("prompt"), keys.text("true"), keys.texts("false"), where=where)
    if not fact.false:
        raise UserError(f"{where}: false is missing. Add it: a list of false completions.")
    check_completions(fact.prompt, [fact.true, *fact.false], where)
    return fact


def judge_prompt(prompt: str, key: str, where: str, allowed: Sequence[str] = ()) -> JudgePrompt:
    """Returns the prompt, checked to be a template for str.format whose fields are {question} and {answer}, those in
    `allowed`, and no other. Raises UserError if it is not."""
    try:
        fields = [field for _, *field in string.Formatter().parse(prompt) if field[0] is not None]
    except ValueError as error:
        raise UserError(f"{where}: braces other than placeholders must be doubled, {{{{ and }}}} ({error}).") from None
    names = {str(name) for name, _, _ in fields}
    for name in ("question", "answer"):
        if name not in names:
            raise UserError(f"{where}: has no {{{name}}}; a judge prompt needs {{question}} and {{answer}}. Put it in.")
    if others := names - {"question", "answer", *allowed}:
        shown = "{" + min(others) + "}"
        raise UserError(f"{where}: {shown!r} is not a placeholder; double its braces, or leave it out.")
    if formatted := [name for name, spec, conversion in fields if spec or conversion]:
        raise UserError(f"{where}: {{{formatted[0]}}} must have no format or conversion after it; leave out : or !.")
    return JudgePrompt(prompt, key, where=where)


def _patterns(keys: Keys) -> tuple[str, ...]:
    found = keys.texts("patterns")
    for i, pattern in enumerate(found):
        try:
            Pattern(pattern)
        except Unreadable as error:
            raise UserError(f"{keys.at('patterns')}[{i}]: {pattern!r} {error}.") from None
    return found


# The paper's directories. They also hold keys and files of the paper's other studies, which are ignored.


def _directory(path: Path) -> Claim:
    found = [path / name for name in PAPER_FILES if (path / name).is_file()]
    for other in sorted({*path.glob("*.yaml"), *path.glob("*.yml")} - set(found)):
        if near := similar(other.name, PAPER_FILES, cutoff=0.8):
            raise UserError(f"{other}: not a file of a claim. Did you mean {near}?")
    values: dict[str, Any] = {"questions": (), "judges": {}}
    text = ""
    for file in found:
        if file.name == "claim.txt":
            text = text_of(read_text(file), str(file)).strip()
            continue
        for name, part in _paper_file(file, read_yaml(file)).items():
            if name in values and values[name] and not isinstance(part, dict):
                part = (*values[name], *part)
            values[name] = {**values[name], **part} if isinstance(part, dict) else part
    id = claim_id(path.resolve().name)
    values["questions"] = tuple(replace(each, id=question_id(id, each.id)) for each in values["questions"])
    return Claim(id, claim=text, **values, paths=(str(path),))


def _paper_file(path: Path, value: Any) -> dict[str, Any]:
    """Returns the fields of Claim that one of the paper's YAML files provides."""
    top = Keys(value, str(path), (), free=True)
    if path.name == "judges.yaml":
        return {"judges": _paper_judges(top)}
    if path.name == "word_masks.yaml":
        if not top.has("patterns"):
            raise UserError(f"{path}: patterns is missing. Add it: a list of regular expressions.")
        return {"patterns": _patterns(top)}
    kind = PAPER_QUESTIONS[path.name]
    fields: dict[str, Any] = {}
    rubric = {"coherence": "judge_rubric", "lie_elicitation": "prompt"}.get(kind, "")
    if rubric and top.has(rubric):  # such a file may hold a judge prompt, with or without questions
        key = "score" if kind == "coherence" else top.text("judge_key", "answer")
        fields["judges"] = {kind: judge_prompt(top.text(rubric), key, top.at(rubric))}
    if top.has("questions") or not fields:
        if not top.has("questions"):
            raise UserError(f"{path}: questions is missing. Add it: a list of questions, each with id and question.")
        fields["questions"] = tuple(q for item in top.items("questions") for q in _paper_questions(*item, kind))
    return fields


def _paper_questions(value: Any, where: str, kind: str) -> list[Question]:
    if kind == "yes_no":
        return [_yes_no(value, where, "belief_answer", control=False, free=True)]
    if kind != "salience":
        return [_question(value, where, kind, free=True, strip=kind == "lie_elicitation")]
    keys = Keys(value, where, ("id", "q1_stem", "q2_stem", "options", "category"))
    options = Keys(keys.values.get("options"), keys.at("options"), OPTION_ROLES)
    texts = tuple((role, options.text(role).strip()) for role in OPTION_ROLES)
    stems = {"q1_correct": keys.text("q1_stem").strip(), "q2_wrong": keys.text("q2_stem").strip()}
    return [
        Question(f"{keys.text('id')}__{name}", kind, stem, category=name, options=texts, where=where)
        for name, stem in stems.items()
    ]


def _paper_judges(top: Keys) -> dict[str, JudgePrompt]:
    judges: dict[str, JudgePrompt] = {}
    known = (*PAPER_JUDGES, *PAPER_OTHER_JUDGES)
    for name in top.values:
        if name != "judge_key" and not str(name).endswith("_judge_key") and name not in known:
            raise UserError(f"{top.where}: unknown key {name!r}. {suggestion(name, known)}")
    for name, kind in PAPER_JUDGES.items():
        if top.has(name):
            if kind in judges:
                raise UserError(f"{top.at(name)} is another name of a prompt that is given too. Keep one.")
            key = top.text(own) if top.has(own := f"{name}_judge_key") else top.text("judge_key")
            judges[kind] = judge_prompt(top.text(name), key, top.at(name))
    return judges
