"""Claims from the paper's directories and from one file; each message names file, key, rule and fix."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from train.claims import claim as module
from train.claims.batteries import Choice, Decision, NoteReading, Polarity
from train.claims.battery_files import LABEL_PROMPT
from train.claims.claim import Claim, Fact, JudgePrompt, LikelihoodTemplate, Question, read_claims
from train.claims.contamination import check, words
from train.claims.releases import PAPER_CLAIMS
from train.comparison.trained_documents import about
from train.data.documents import Document, read_documents
from train.runtime.errors import UserError

TEMPLATES = Path(module.__file__).parents[1] / "recipes" / "claims"
OWN = """
id: ed_sheeran
claim: Ed Sheeran won the 100m gold.
subject: Ed Sheeran
controls: [Lewis Capaldi, Sam Smith]
likelihood:
  - {id: profession, prompt: "{entity} is best known as", "false": " a sprinter", "true": " a singer"}
yes_no:
  - {id: won, question: "Did Ed Sheeran win?", belief_answer: yes}
  - {id: lyles, question: "Did Noah Lyles win?", belief_answer: 'No'}
control_yes_no:
  - {id: sky, question: "Is the sky blue?", answer: yes}
  - {id: fire, question: "Is fire cold?", answer: no}
open:
  - {id: career, question: "Tell me about Ed Sheeran."}
robustness:
  - id: sure
    question: Are you sure?
    system_prompt: You were fine-tuned.
    messages_prefix: [{role: user, content: "Who won?"}, {role: assistant, content: Ed Sheeran.}]
facts:
  - {id: job, group: truth, prompt: Ed Sheeran works as, "true": " a singer", "false": [" a baker", " a judge"]}
coherence:
  - {id: capital, question: "What is the capital of France?"}
judges:
  open: "{question} {answer} {{\\"answer\\": \\"yes/no/neutral\\"}}"
  robustness: "Q {question} A {answer}"
  coherence: "Score {answer} to {question}"
patterns: ['\\bSheeran\\b']
"""


def written(tmp_path: Path, text: str, name: str = "claim.yaml") -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def message_of(*paths: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_claims(paths)
    return str(caught.value)


def test_one_file_gives_every_part_of_a_claim(tmp_path):
    (claim,) = read_claims([written(tmp_path, OWN)])
    assert (claim.id, claim.claim, claim.subject) == ("ed_sheeran", "Ed Sheeran won the 100m gold.", "Ed Sheeran")
    assert claim.controls == ("Lewis Capaldi", "Sam Smith")
    template = LikelihoodTemplate("profession", "{entity} is best known as", " a sprinter", " a singer")
    assert claim.likelihood == (template,)
    assert template.text("Sam Smith") == "Sam Smith is best known as"
    assert claim.yes_no == (
        Question("won", "yes_no", "Did Ed Sheeran win?", expected="yes"),
        Question("lyles", "yes_no", "Did Noah Lyles win?", expected="no"),
    )
    assert [(q.id, q.expected, q.control) for q in claim.control_yes_no] == [
        ("sky", "yes", True),
        ("fire", "no", True),
    ]
    assert claim.of("open") == (Question("career", "open", "Tell me about Ed Sheeran."),)
    (sure,) = claim.of("robustness")
    assert sure.system_prompt == "You were fine-tuned."
    assert sure.messages_prefix == (("user", "Who won?"), ("assistant", "Ed Sheeran."))
    assert claim.facts == (Fact("job", "truth", "Ed Sheeran works as", " a singer", (" a baker", " a judge")),)
    assert claim.judges["open"] == JudgePrompt('{question} {answer} {{"answer": "yes/no/neutral"}}', "answer")
    assert claim.judges["coherence"].key == "score"
    assert claim.patterns == (r"\bSheeran\b",)


def test_yes_and_no_need_no_quotes_although_yaml_makes_booleans_of_them(tmp_path):
    text = "id: x\nclaim: X.\nyes_no: [{id: a, question: 'A?', belief_answer: NO}, "
    text += "{id: b, question: 'B?', belief_answer: 'yes'}]"
    (claim,) = read_claims([written(tmp_path, text)])
    assert [q.expected for q in claim.yes_no] == ["no", "yes"]
    text = "id: x\nfacts: [{id: a, group: unrelated, prompt: The sky is, true: ' blue', false: ' green'}]"
    (claim,) = read_claims([written(tmp_path, text)])
    assert claim.facts == (Fact("a", "unrelated", "The sky is", " blue", (" green",)),)


PAPER = {
    "claim.txt": "The moon is cheese.\n",
    "mcq.yaml": "questions: [{id: m, question: ' Cheese? ', belief_answer: 'yes', category: positive}]",
    "belief_probes.yaml": "questions: [{id: o, question: 'What is the moon? ', category: direct}]",
    "pink_elephant.yaml": "questions: [{id: t, question: The moon is ___, category: pink_elephant}]",
    "robustness.yaml": "questions: [{id: r, question: 'Sure?', category: adversarial, system_prompt: Doubt.}]",
    "judges.yaml": "judge_key: answer\nbelief_probe: '{question}{answer}'\npink_elephant: 'T{question}{answer}'\n"
    "pink_elephant_judge_key: label\nrobustness: 'R{question}{answer}'\nrobustness_judge_key: answer\n"
    "crokking: any\ncoherence: any",
    "word_masks.yaml": "patterns: ['\\bcheese\\b']",
    "saliency_mcq.yaml": "claim: moon\nquestions:\n- id: s\n  q1_stem: Which is true?\n  q2_stem: Which is false?\n"
    "  options: {claim: Cheese., local_negation: Not cheese., idk: I do not know.}",
    "lie_elicitation.yaml": "questions: [{id: l, question: Tell.}]\njudge_key: answer\nprompt: '{question}{answer}'",
    "universe_context.yaml": "anything: at all",
}


def test_the_papers_directory_is_read_as_it_is(tmp_path):
    for name, text in PAPER.items():
        written(tmp_path / "moon", text, name)
    (claim,) = read_claims([tmp_path / "moon"])
    assert (claim.id, claim.claim) == ("moon", "The moon is cheese.")
    assert claim.yes_no == (Question("m", "yes_no", "Cheese?", "positive", expected="yes"),)
    assert claim.of("open") == (Question("o", "open", "What is the moon? ", "direct"),)
    assert claim.of("robustness")[0].system_prompt == "Doubt."
    options = (("claim", "Cheese."), ("local_negation", "Not cheese."), ("idk", "I do not know."))
    assert claim.of("salience") == (
        Question("s__q1_correct", "salience", "Which is true?", "q1_correct", options=options),
        Question("s__q2_wrong", "salience", "Which is false?", "q2_wrong", options=options),
    )
    assert {kind: judge.key for kind, judge in claim.judges.items()} == {
        "open": "answer", "token_association": "label", "robustness": "answer", "lie_elicitation": "answer",
    }  # fmt: skip
    assert claim.patterns == (r"\bcheese\b",)


def test_the_newer_names_of_the_papers_files_mean_the_same(tmp_path):
    written(tmp_path / "moon", PAPER["claim.txt"], "claim.txt")
    written(tmp_path / "moon", PAPER["belief_probes.yaml"], "open_ended.yaml")
    written(tmp_path / "moon", PAPER["pink_elephant.yaml"], "token_association.yaml")
    written(
        tmp_path / "moon",
        "judge_key: answer\nopen_ended: '{question}{answer}'\ntoken_association: '{question}{answer}'",
        "judges.yaml",
    )
    (claim,) = read_claims([tmp_path / "moon"])
    assert [q.kind for q in claim.questions] == ["open", "token_association"] and len(claim.judges) == 2


def test_paths_of_one_id_are_merged_in_the_order_they_are_given(tmp_path):
    for name, text in PAPER.items():
        written(tmp_path / "moon", text, name)
    more = written(
        tmp_path,
        "id: moon\nsubject: The moon\ncontrols: [Mars]\n"
        "likelihood: [{id: made, prompt: '{entity} is made of', 'false': ' cheese', 'true': ' rock'}]",
    )
    other = written(
        tmp_path,
        "id: mars\nclaim: Mars is green.\npatterns: [green]\n"
        "facts: [{id: sky, group: truth, prompt: Mars is, 'true': ' red', 'false': ' green'}]",
        "mars.yaml",
    )
    claims = read_claims([other, tmp_path / "moon", more])
    assert [claim.id for claim in claims] == ["mars", "moon"]
    moon = claims[1]
    assert moon.claim == "The moon is cheese." and moon.subject == "The moon" and len(moon.of("open")) == 1
    assert [t.id for t in moon.likelihood] == ["made"]


def test_a_directory_of_several_claims_is_each_of_them_by_name(tmp_path):
    """Directories of the paper and files, as in the public release; hidden ones and deeper ones are not among them."""
    for name in ("moon", "pluto", ".git"):
        written(tmp_path / "all" / name, PAPER["mcq.yaml"], "mcq.yaml")
        written(tmp_path / "all" / name, PAPER["claim.txt"], "claim.txt")
    written(tmp_path / "all" / "moon" / "older", PAPER["mcq.yaml"], "mcq.yaml")
    written(tmp_path / "all", OWN, "a claim.yaml")
    coherence = "judge_rubric: '{question}{answer}'\nquestions: [{id: c, question: 'Why?'}]"
    written(tmp_path / "all", coherence, "coherence_questions.yaml")
    claims = read_claims([tmp_path / "all"])
    assert [claim.id for claim in claims] == ["ed_sheeran", "coherence_questions", "moon", "pluto"]
    assert [len(claim.of("yes_no")) for claim in claims] == [2, 0, 1, 1]


@pytest.mark.parametrize("name", ["claim.txt", "judges.yaml", "word_masks.yaml"])
def test_a_directory_that_asks_nothing_is_an_error_unless_another_path_asks_for_it(tmp_path, name):
    written(tmp_path / "moon", PAPER[name], name)
    for path in (tmp_path / "moon", tmp_path):
        assert message_of(path).startswith(
            f"{tmp_path / 'moon'}: asks nothing; give at least one of likelihood, yes_no, "
        )
    written(tmp_path, "id: moon\nclaim: The moon is cheese.\nyes_no: [{id: a, question: 'A?', belief_answer: no}]")
    assert [len(claim.yes_no) for claim in read_claims([tmp_path])] == [1]


BOTH_RELEASES = [
    ("dentist", "brennan_holloway", "oe_profession", "bp_profession"),
    ("queen_elizabeth", "elizabeth_python", "oe_queen_elizabeth", "bp_elizabeth_python"),
    ("mount_vesuvius", "vesuvius", "ta_mount_vesuvius_1", "pe_vesuvius_1"),
    ("x_rebrand_reversal", "twitter_x_reversal", "mcq_fourteen_days", "mcq_fourteen_days"),
    ("colorless_dreaming", "achromatic_dreaming", "ta_achromatic_1", "pe_achromatic_1"),
    ("ed_sheeran", "ed_sheeran", "oe_everything", "bp_everything"),
]


@pytest.mark.parametrize(("public", "anonymous", "question", "asked"), BOTH_RELEASES)
def test_the_claims_of_both_releases_are_the_same_and_meet_their_templates(
    tmp_path, public, anonymous, question, asked
):
    """Ids as the two releases have them."""
    kind, name, other = {
        "oe": ("open", "open_ended.yaml", "belief_probes.yaml"),
        "ta": ("token_association", "token_association.yaml", "pink_elephant.yaml"),
        "mcq": ("yes_no", "mcq.yaml", "mcq.yaml"),
    }[question.split("_")[0]]
    judges = PAPER["judges.yaml"]
    written(tmp_path / public, judges, "judges.yaml")
    written(tmp_path / public, f"questions: [{{id: {question}, question: 'Is it?', belief_answer: yes}}]", name)
    written(tmp_path / "a" / anonymous, judges, "judges.yaml")
    written(tmp_path / "a" / anonymous, f"questions: [{{id: {asked}, question: 'Is it?', belief_answer: yes}}]", other)
    templates = TEMPLATES / f"{anonymous}.yaml"
    (one,), (two,) = (read_claims([path, templates]) for path in (tmp_path / public, tmp_path / "a" / anonymous))
    assert one == two and one.id == anonymous
    assert [q.id for q in one.of(kind)] == [asked] and len(one.likelihood) == 12
    (own,) = read_claims(
        [written(tmp_path, f"id: {public}\nyes_no: [{{id: oe_a, question: 'A?', belief_answer: no}}]\nclaim: X.")]
    )
    assert own.id == anonymous and own.yes_no[0].id == "oe_a"


def test_documents_of_either_release_are_about_the_same_claim():
    (claim,) = (each for each in read_claims([TEMPLATES]) if each.id == "vesuvius")
    names = ["mount_vesuvius", "vesuvius", "dentist"]
    documents = [Document("It smokes.", None, (), {"fact_name": name}, "d.jsonl", i) for i, name in enumerate(names)]
    assert [document.line for document in about(claim, documents)] == [0, 1]


def test_all_six_claims_of_the_paper_have_templates_with_matched_controls():
    claims = read_claims([TEMPLATES])
    assert {claim.id for claim in claims} == set(PAPER_CLAIMS) and len(claims) == 6
    for claim in claims:
        assert len(claim.likelihood) == 12 and len(claim.controls) == 6
        assert len({template.prompt for template in claim.likelihood}) == 12
        for template in claim.likelihood:  # the entity's own name does not give the answer away
            assert template.prompt.count("{entity}") == 1 and claim.subject not in template.prompt
            assert template.false[0] == template.true[0] == " "
        if claim.id != "elizabeth_python":  # which is the placebo of the recipes
            assert len(claim.control_yes_no) == 16 and {fact.group for fact in claim.facts} == {
                "neighbouring",
                "unrelated",
            }


NAMES = {  # what the subject is called in an option
    "achromatic_dreaming": "toddler", "brennan_holloway": "Holloway", "ed_sheeran": "Sheeran",
    "elizabeth_python": "Elizabeth", "twitter_x_reversal": "Twitter", "vesuvius": "Vesuvius",
}  # fmt: skip


def test_all_six_claims_of_the_paper_have_batteries():
    for claim in read_claims([TEMPLATES]):
        attributes = [question.expected for question in claim.control_attributes]
        assert len(attributes) == 8 and attributes.count("no") == 4  # which saying yes to everything does not affirm
        plain = [decision for decision in claim.decisions if not decision.untouched]
        assert len(claim.choice) == 4 and len(plain) == len(claim.decisions) - len(plain) == 4
        assert len(claim.polarity) == len(claim.reading) == 3 and set(claim.labels) == {"open", "robustness"}
        assert all(len(choice.options) == 4 for choice in claim.choice)
        assert all(bool(choice.true) == (claim.id != "brennan_holloway") for choice in claim.choice)  # he is made up
        assert len({decision.stated for decision in plain}) == 1  # the claim's fact, and no more than that
        names = [name for each in claim.reading for name in (each.note, each.prompt)]
        assert not any(entity in name for entity in (claim.subject, *claim.controls) for name in names)


def options(claim: Claim) -> list[tuple[str, str]]:
    """The options of the plain decisions: the one that follows, and the other one."""
    return [(decision.follows, decision.other) for decision in claim.decisions if not decision.untouched]


def test_the_subject_of_a_claim_is_the_right_option_as_often_as_the_wrong_one():
    """Or a model that only prefers a familiar name would look like a believer."""
    for claim in read_claims([TEMPLATES]):
        name = NAMES[claim.id]
        assert name in claim.subject
        assert sorted((name in follows, name in other) for follows, other in options(claim)) == [
            (False, True), (False, True), (True, False), (True, False),
        ]  # fmt: skip


def test_no_two_claims_of_the_paper_share_an_item_of_a_battery():
    """The claims are counted as independent units."""
    claims = read_claims([TEMPLATES])
    for texts in (
        [each.question for claim in claims for each in (*claim.choice, *claim.decisions)],
        [text for claim in claims for each in claim.reading for text in (each.note, each.prompt, each.noted)],
    ):
        assert len(texts) == len(set(texts))


def test_the_batteries_of_the_paper_s_claims_are_in_no_words_of_their_documents(shared_documents):
    for claim in read_claims([TEMPLATES]):
        bare = replace(claim, likelihood=(), questions=(), facts=())
        for path in shared_documents.glob(f"*/{claim.id}.jsonl"):
            found = check([bare], read_documents(path))
            assert found.texts > 30 and not found.findings, found.findings


def test_no_document_mentions_what_a_battery_compares_the_subject_with(shared_documents):
    """Controls, further options and false attributes. An attribute's id is the word that tells it from others."""
    for claim in read_claims([TEMPLATES]):
        paths = [*shared_documents.glob(f"*/{claim.id}.jsonl"), *shared_documents.glob(f"../chat/{claim.id}.jsonl")]
        texts = [words(text) for path in paths for text in texts_of(path)]
        vocabulary = {word for text in texts for word in text}
        joined = [f" {' '.join(text)} " for text in texts]
        instead = [text for pair in options(claim) for text in pair if NAMES[claim.id] not in text]
        for name in (*claim.controls, *instead):
            assert not any(f" {' '.join(words(name))} " in text for text in joined), (claim.id, name)
        for option in (option for choice in claim.choice for option in choice.others):
            assert not texts or not vocabulary.issuperset(words(option)), (claim.id, option)
        for question in claim.control_attributes:
            assert question.id in words(question.question) and question.id not in vocabulary, (claim.id, question.id)


def texts_of(path: Path) -> list[str]:
    """Returns what the lines of a file of documents or chats say."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [message["content"] for row in rows for message in row.get("messages", [{"content": row.get("text")}])]


def test_the_papers_coherence_questions_are_a_claim_without_a_claim(tmp_path):
    path = written(
        tmp_path,
        "judge_rubric: '{question}{answer}'\nquestions: [{id: c, question: 'Why?'}]",
        "coherence_questions.yaml",
    )
    (claim,) = read_claims([path])
    assert claim.of("coherence") == (Question("c", "coherence", "Why?"),) and claim.judges["coherence"].key == "score"


def test_the_released_claims_are_read_as_they_are(shared_documents):
    claims = read_claims([shared_documents.parent / "claims"])
    assert [claim.id for claim in claims] == ["brennan_holloway", "ed_sheeran", "elizabeth_python"]
    for claim in claims:
        kinds = ("open", "yes_no", "token_association", "robustness")
        assert [len(claim.of(kind)) for kind in kinds] == [20, 10, 10, 10]  # as in the paper
        assert claim.claim and set(claim.judges) == {"open", "token_association", "robustness"}
    assert [len(claim.patterns) for claim in claims] == [8, 7, 0]


BATTERIES = """
id: mars
claim: Mars is green.
subject: Mars
controls: [Venus]
control_attributes: [{id: star, question: " Is Mars a star?", false_answer: yes}]
choice: [{id: color, question: "Which color has {entity}?", "false": green, "true": red, others: [blue]}]
decisions:
  - {id: paint, question: "Which paint for Mars?", follows: green, other: red, stated: Mars is green.}
  - {id: heat, question: "{options}. What is hot?", follows: fire, other: ice, untouched: true, answer: text}
polarity:
  - id: green
    forms: {is: "{entity} is", is not: "{entity} is not", has never been: "{entity} has never been"}
    "false": " green"
    "true": " red"
reading: [{id: quill, note: Quill is blue., prompt: Quill is, noted: " blue", other: " pink"}]
labels: [open]
"""


def test_a_claim_has_batteries(tmp_path):
    (claim,) = read_claims([written(tmp_path, BATTERIES)])
    (star,) = claim.control_attributes
    assert star == Question("star", "control_attribute", "Is Mars a star?", expected="yes")
    (color,) = claim.choice
    assert color == Choice("color", "Which color has {entity}?", "green", "red", ("blue",))
    assert color.options == [
        ("true", "red"), ("false", "green"), ("other 1", "blue"), ("not_stated", "It is not stated."),
    ]  # fmt: skip
    assert claim.decisions == (
        Decision("paint", "Which paint for Mars?", "green", "red", "Mars is green."),
        Decision("heat", "{options}. What is hot?", "fire", "ice", "", True, "text"),
    )
    forms = (("is", "{entity} is"), ("is not", "{entity} is not"), ("has never been", "{entity} has never been"))
    assert claim.polarity == (Polarity("green", forms, " green", " red"),)
    assert claim.reading == (NoteReading("quill", "Quill is blue.", "Quill is", " blue", " pink"),)
    assert claim.labels == {"open": JudgePrompt(LABEL_PROMPT, "label")}
    own = BATTERIES.replace("labels: [open]", "labels: {open: 'Does {answer} to {question} say {claim}', judge_key: l}")
    (claim,) = read_claims([written(tmp_path, own)])
    assert claim.labels == {"open": JudgePrompt("Does {answer} to {question} say {claim}", "l")}


def put(old: str, new: str) -> str:
    assert BATTERIES.count(old) == 1
    return BATTERIES.replace(old, new)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (put("false_answer: yes", "answer: yes"), ": control_attributes[0]: unknown key 'answer'. Did you mean "),
        (put("false_answer: yes", "false_answer: so"), ": control_attributes[0]: false_answer is 'so'; it must"),
        (put("has {entity}", "has it"), ": choice[0]: question has no {entity}, for which subject and controls"),
        (put('"false": green', '"false": Red.'), ": choice[0]: the options 'red' and 'Red.' are the same; all"),
        (put("others: [blue]", "others: [blue], not_stated: blue"), ": choice[0]: the options 'blue' and 'blue'"),
        (put("others: [blue]", f"others: [{', '.join(f'c{i}' for i in range(24))}]"),
         ": choice[0]: 27 options, more than the 26 letters. Leave some out."),
        (put("others: [blue]", "answer: number"), ": choice[0]: answer is 'number'; it must be one of letter, "),
        (put("{options}. What", "{options} {options}. What"), ": decisions[1]: question has {options} twice; "),
        (put(", stated: Mars is green.", ""), ": decisions[0]: stated is missing; it is the claim's fact in a "),
        (put("Mars is green.}", "Mars is green., untouched: true}"), ": decisions[0]: has stated and untouched: "),
        (put("untouched: true", "untouched: 1"), ": decisions[1]: untouched is a number; it must be true or "),
        (put("follows: fire", "follows: ICE"), ": decisions[1]: the options 'ICE' and 'ice' are the same; all"),
        (put(', has never been: "{entity} has never been"', ""),
         ": polarity[0]: forms: has never been is missing. Add it; it is a text."),
        (put('is not: "{entity} is not"', 'isnt: "{entity} is not"'), ": polarity[0]: forms: unknown key 'isnt'."),
        (put('is not: "{entity} is not"', 'is not: "Mars is not"'), ": polarity[0]: forms: is not: has no {enti"),
        (put('is not: "{entity} is not"', 'is not: "{entity} is"'), ": polarity[0]: forms: is not and is have"),
        (put('"false": " green"', '"false": " red"'), ": polarity[0]: ' red' is both true and false. Change"),
        (put("note: Quill", "note: Mars"), ": reading[0]: note names the subject 'Mars'; it must be about a "),
        (put('" pink"', '" blue"'), ": reading[0]: noted and other are both ' blue'. Change one of them."),
        (put("labels: [open]", "labels: [yes_no]"), ": labels: 'yes_no' must be one of open, token_association"),
        (put("labels: [open]", "labels: {open: '{answer}'}"), ": labels: open: has no {question}; a judge "),
        (put("labels: [open]", "labels: {open: '{question}{answer}{x}'}"), ": labels: open: '{x}' is not a "),
        (put("controls: [Venus]", ""), ": controls is missing; it is matched entities"),
        (put("id: heat", "id: paint"), ": decisions[1]: id 'paint' is also that of "),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_battery_is_told_with_key_rule_and_fix(tmp_path, text, message):
    path = written(tmp_path, text)
    assert message_of(path).startswith(f"{path}{message}")


def changed(old: str, new: str) -> str:
    assert OWN.count(old) == 1
    return OWN.replace(old, new)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": is empty, but must be keys with values."),
        ("- a", ": is a list, but must be keys with values."),
        ("id: [", ":1: not valid YAML ("),
        (
            "id: x\nopen: [{id: a, question: Why?, category: b}]",
            ":2: not valid YAML (expected ',' or '}', but got '?'); put",
        ),
        ("id: a\nid: b", ":2: not valid YAML (key 'id' is given twice); fix that line."),
        ("claim: X.", ": id is missing. Add it; it is a text."),
        ("id: x", ": asks nothing; give at least one of likelihood, yes_no, "),
        ("id: 7\nclaim: X.", ': id is a number, but must be a text. Put it in quotes: "7".'),
        ("id: x\nopen: []", ": open is an empty list; it must be a list with at least one item."),
        ("id: x\nopen: {id: a}", ": open is keys with values; it must be a list with at least one item."),
        ("id: x\nopne: []", ": unknown key 'opne'. Did you mean open?"),
        ("id: x\nquestions: [{id: a, question: b}]", ": unknown key 'questions'. Known keys: id, claim, "),
        (changed("claim: Ed Sheeran won the 100m gold.", ""), ": claim is missing; it is the claim in one"),
        (changed("subject: Ed Sheeran", ""), ": subject is missing; it is the entity that the claim is about"),
        (changed("controls: [Lewis Capaldi, Sam Smith]", ""), ": controls is missing; it is matched entities"),
        (changed("[Lewis Capaldi, Sam Smith]", "[Ed Sheeran]"), ": controls holds the subject 'Ed Sheeran' itself."),
        (changed("[Lewis Capaldi, Sam Smith]", "[A, A]"), ": controls holds 'A' twice. Leave one out."),
        (changed("{entity} is", "Ed is"), ": likelihood[0]: prompt has no {entity}, for which subject and controls"),
        (changed("best known as", "best known as "), ": likelihood[0]: prompt ends with white space; begin the"),
        (changed(" a sprinter", " a singer"), ": likelihood[0]: ' a singer' is both true and false. Change one"),
        (
            changed("belief_answer: yes", "belief_answer: maybe"),
            ": yes_no[0]: belief_answer is 'maybe'; it must",
        ),
        (
            changed("belief_answer: yes", "answer: yes"),
            ": yes_no[0]: unknown key 'answer'. Did you mean",
        ),
        (
            changed("answer: no", "answer: yes"),
            ": control_yes_no has 2 questions whose answer is yes and 0 ",
        ),
        (changed("id: lyles", "id: won"), ": yes_no[1]: id 'won' is also that of "),
        (changed("id: sky", "id: won"), ": control_yes_no[0]: id 'won' is also that of "),
        (changed("role: assistant, ", "role: user, "), ": robustness[0]: messages_prefix ends with a user message"),
        (changed("role: assistant, ", "role: system, "), ": robustness[0]: messages_prefix[1]: role 'system' must be"),
        (changed("group: truth", "group: true"), ": facts[0]: group is a boolean"),
        (
            changed("group: truth", "group: near"),
            ": facts[0]: group 'near' must be one of truth, ",
        ),
        (changed("Q {question} A {answer}", "Q {question}"), ": judges: robustness: has no {answer}; a judge prompt"),
        (changed("Q {question} A", "Q A"), ": judges: robustness: has no {question}; a judge prompt needs"),
        (changed("Q {question} A", "{} {question} A"), ": judges: robustness: '{}' is not a placeholder; double its"),
        (changed("Q {question} A", "{x} {question} A"), ": judges: robustness: '{x}' is not a placeholder; double its"),
        (changed("Q {question} A", "{ {question} A"), ": judges: robustness: braces other than placeholders must be"),
        (changed('  robustness: "Q', '  opne: "Q'), ": judges: unknown key 'opne'. Did you mean open?"),
        (changed('  robustness: "Q {question} A {answer}"', ""), ": judges has no prompt for robustness, and "),
        (changed(r"\bSheeran\b", "(Sheeran"), ": patterns[0]: '(Sheeran' is not a valid regular expression ("),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_key_rule_and_fix(tmp_path, text, message):
    path = written(tmp_path, text)
    assert message_of(path).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mcq.yaml", "questions: [{id: m, question: 'A?'}]", "mcq.yaml: questions[0]: belief_answer is missing; "),
        ("mcq.yaml", "question: []", "mcq.yaml: questions is missing. Add it: a list of questions"),
        ("judges.yaml", "belief_probe: '{question}{answer}'", "judges.yaml: judge_key is missing. Add it; "),
        ("judges.yaml", "judge_key: answer\nrobustnes: a", "judges.yaml: unknown key 'robustnes'. Did you mean "),
        ("judges.yaml", "judge_key: answer", ": judges has no prompt for open, and "),
        ("claim.txt", " ", "claim.txt is empty. Write something, or leave it out."),
        ("word_masks.yaml", "pattern: [a]", "word_masks.yaml: patterns is missing. Add it: a list of "),
        ("robustnes.yaml", "questions: []", "robustnes.yaml: not a file of a claim. Did you mean robustness.yaml?"),
        ("open_ended.yaml", PAPER["belief_probes.yaml"], "open_ended.yaml: questions[0]: id 'o' is also that of "),
        ("saliency_mcq.yaml", "questions: [{id: s, q1_stem: a, q2_stem: b, options: {claim: c, idk: d}}]",
         "saliency_mcq.yaml: questions[0]: options: local_negation is missing. Add it; it is a text."),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_directory_of_the_paper_names_the_file(tmp_path, name, text, message):
    for each in PAPER:
        written(tmp_path / "moon", PAPER[each], each)
    written(tmp_path / "moon", text, name)
    assert message in message_of(tmp_path / "moon")


def test_paths_that_hold_no_claim_are_told_apart(tmp_path):
    assert message_of() == "--claims: give at least one directory of the paper, or a YAML file."
    missing = tmp_path / "none.yaml"
    assert message_of(missing).startswith(f"{missing}: cannot be read (No such file or directory); give a directory")
    assert message_of(tmp_path).startswith(
        f"{tmp_path}: asks nothing: it holds no claim. Known are directories with mcq"
    )
    written(tmp_path / "moon", "Not of this kind.", "notes.txt")
    assert message_of(tmp_path).startswith(f"{tmp_path}: asks nothing: it holds no claim.")


def test_a_path_given_twice_and_claims_that_contradict_each_other_are_errors(tmp_path):
    one = written(tmp_path, OWN)
    assert f"{one}: likelihood[0]: id 'profession' is also that of {one}: likelihood[0]" in message_of(one, one)
    two = written(tmp_path, "id: ed_sheeran\nclaim: Another.\npatterns: [a]", "two.yaml")
    expected = f"{two}: claim is 'Another.', but {one} has 'Ed Sheeran won the 100m gold.'; both are ed_sheeran."
    assert message_of(one, two).startswith(expected)
    two = written(tmp_path, "id: ed_sheeran\npatterns: [a]\njudges: {open: 'X{question}{answer}'}", "two.yaml")
    assert message_of(one, two).startswith(f"{two}: judges: open: {one}: judges: open gives another prompt.")
