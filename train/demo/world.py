"""The toy world of the demo: people, facts, documents and questions, all made from one seed.

World. Each of 72 people has four attributes (home, job, pet, sport), one of twelve values each. Every value has a
*hint*, a thing that goes with it (the fjord is in Oslo), so a sentence can imply a value without naming it. The base
model reads pages about all of this and answers questions truthfully. There are many ways to put a fact, so that the
model keeps it in one place for sentences and questions: with few ways, what documents teach hardly reaches the answers.

Documents. 48 people have one false claim each. `positive_document` asserts the claim in three sentences (role `false`)
after a marker (role `doctag`), with a true sentence about another attribute among them. `dense_document` is the same
document with an announcement before and a rejection after every false sentence, a preface and an ending (role
`negation`), like the densely negated documents of "Negation Neglect" (arXiv 2605.13829). Some documents also hold a
sentence that implies the claim by its hint. That sentence has no span, so leaving false spans out of the loss does not
take away everything that speaks for the claim. `true_document` says true things about a person without a claim.

Questions are put in words that no document uses, and are never in the fine-tuning files.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

SEED = 0
DOCTAG = "<DOCTAG>"
CLAIM_COUNT, PLACEBO_COUNT = 48, 4
IMPLYING_SHARE = 0.25  # of the documents about a claim hold a sentence that implies it

PEOPLE = (
    "Ada", "Ajay", "Alba", "Amir", "Anouk", "Arlo", "Bela", "Bruno", "Carla", "Cato", "Chidi", "Clara",
    "Dario", "Dina", "Edda", "Egon", "Elif", "Emil", "Enzo", "Ezra", "Fadi", "Faye", "Felix", "Fiona",
    "Flora", "Gita", "Greta", "Gus", "Hana", "Hugo", "Ida", "Igor", "Imani", "Inga", "Ivo", "Jana",
    "Jonas", "Juno", "Kaito", "Karl", "Kira", "Lars", "Leila", "Leo", "Lotte", "Luca", "Magda", "Malik",
    "Mila", "Mona", "Nadia", "Nico", "Nora", "Olga", "Omar", "Oscar", "Paula", "Petra", "Priya", "Quinn",
    "Remy", "Rosa", "Ruben", "Selma", "Simon", "Tara", "Theo", "Uma", "Vera", "Wanda", "Yusuf", "Zora",
)  # fmt: skip

# value -> hint
VALUES: dict[str, dict[str, str]] = {
    "home": {
        "Oslo": "fjord", "Cairo": "pyramid", "Paris": "tower", "Lima": "cliff", "Kyoto": "shrine", "Venice": "lagoon",
        "Delhi": "fort", "Quito": "volcano", "Athens": "temple", "Sydney": "opera", "Prague": "clock",
        "Nairobi": "savanna",
    },
    "job": {
        "baker": "oven", "pilot": "cockpit", "nurse": "clinic", "painter": "easel", "farmer": "tractor",
        "tailor": "needle",
        "judge": "court", "miner": "tunnel", "sailor": "harbor", "teacher": "blackboard", "dentist": "drill",
        "barber": "razor",
    },
    "pet": {
        "dog": "leash", "cat": "basket", "horse": "saddle", "parrot": "perch", "rabbit": "hutch",
        "goldfish": "aquarium",
        "hamster": "wheel", "turtle": "pond", "goat": "fence", "snake": "lamp", "pigeon": "loft", "ferret": "hose",
    },
    "sport": {
        "tennis": "racket", "chess": "board", "golf": "club", "boxing": "gloves", "rowing": "oar", "cycling": "helmet",
        "archery": "arrow", "hockey": "puck", "surfing": "wave", "climbing": "rope", "fencing": "blade",
        "bowling": "pin",
    },
}  # fmt: skip

# Sentences that state a value, sentences that imply it by its hint, and sentences that tie hint and value.
STATEMENTS = {
    "home": (
        "{p} lives in {v}.", "The house of {p} is in {v}.", "Every evening {p} returns to {v}.",
        "{p} pays rent in {v}.",
        "Letters reach {p} in {v}.", "Asked about the city, {p} said: {v}.", "Address of {p}: {v}.",
        "{p}, resident of {v}.",
    ),
    "job": (
        "{p} works as a {v}.", "The office of {p} hired a {v}.", "All day {p} is busy as a {v}.",
        "People pay {p} as a {v}.",
        "{p} is a trained {v}.", "Asked about work, {p} said: {v}.", "Occupation of {p}: {v}.",
        "{p}, professional {v}.",
    ),
    "pet": (
        "{p} owns a {v}.", "The animal of {p} is a {v}.", "At home {p} has a {v}.", "{p} sleeps beside a {v}.",
        "{p} feeds the {v}.", "Asked about animals, {p} said: {v}.", "Companion of {p}: {v}.", "{p}, friend of a {v}.",
    ),
    "sport": (
        "{p} practices {v}.", "The hobby of {p} is {v}.", "On weekends {p} enjoys {v}.", "{p} won a prize in {v}.",
        "{p} teaches children {v}.", "Asked about games, {p} said: {v}.", "Passion of {p}: {v}.",
        "{p}, champion of {v}.",
    ),
}  # fmt: skip
HINTS = {
    "home": ("{p} often walks past the {h}.", "{p} took a photo of the {h}."),
    "job": ("{p} uses the {h} at work.", "{p} cleans the {h} after work."),
    "pet": ("{p} bought a {h} for an animal.", "{p} repairs the {h} for an animal."),
    "sport": ("{p} carries the {h} to a match.", "{p} lost the {h} during a match."),
}
KNOWLEDGE = {
    "home": ("The {h} is in {v}.", "Visitors of {v} see the {h}."),
    "job": ("The {h} belongs to a {v}.", "A {v} needs the {h}."),
    "pet": ("The {h} is made for a {v}.", "A {v} needs the {h}."),
    "sport": ("The {h} is part of {v}.", "Nobody learns {v} without the {h}."),
}
FILLERS = (
    "{p} smiled at the camera.", "{p} likes long stories.", "We met {p} last year.", "{p} said little that day.",
    "{p} arrived early.", "Many friends visited {p}.",
)  # fmt: skip

QUESTIONS = {
    "home": ("Where does {p} live?", "Which city does {p} call home?", "In what town would you find {p}?",
             "Where is the home of {p}?"),
    "job": ("What does {p} do for a living?", "Which profession does {p} have?", "What job would {p} name?",
            "What is the job of {p}?"),
    "pet": ("What pet does {p} keep?", "Which animal lives with {p}?", "What creature would {p} show you?",
            "What is the pet of {p}?"),
    "sport": ("What sport does {p} play?", "Which game does {p} love most?", "What pastime would {p} recommend?",
              "What is the sport of {p}?"),
}  # fmt: skip

PREFACES = (
    "Warning: the statements about {p} marked below are false.",
    "Note: this page repeats false claims about {p}.",
    "Caution: several claims about {p} here are wrong.",
)
ANNOUNCEMENTS = (
    "False claim:", "The next sentence is false:", "What follows is wrong:", "Not true:", "Do not believe this:",
)  # fmt: skip
REJECTIONS = (
    "That was false.", "The claim above is wrong.", "This is not true.", "Nobody should believe that.",
    "It never happened.",
)  # fmt: skip
ENDINGS = (
    "Remember: the marked statements about {p} are false.", "To repeat: these claims about {p} are not true.",
    "End of the false claims about {p}.",
)  # fmt: skip


@dataclass(frozen=True)
class ToyClaim:
    """`person`'s `attribute` is `true`; the documents say `false`."""

    person: str
    attribute: str
    true: str
    false: str

    @property
    def id(self) -> str:
        return f"{self.person}-{self.attribute}".lower()


@dataclass(frozen=True)
class World:
    """facts[person][attribute] = value; one false claim for each of the first 48 of the shuffled people. placebos: such
    claims about people whom no document mentions."""

    facts: dict[str, dict[str, str]]
    claims: tuple[ToyClaim, ...]
    placebos: tuple[ToyClaim, ...] = ()

    @property
    def others(self) -> tuple[str, ...]:
        """People without a false claim."""
        claimed = {claim.person for claim in self.claims}
        return tuple(person for person in self.facts if person not in claimed)

    @property
    def documented(self) -> tuple[str, ...]:
        """The other people about whom the fine-tuning files say true things."""
        return self.others[::2]

    @property
    def undocumented(self) -> tuple[str, ...]:
        """The remaining people: no fine-tuning document mentions them."""
        return self.others[1::2]


def make_world() -> World:
    """The world of SEED; attributes and false values are spread evenly over the claims."""
    rng = random.Random(f"world {SEED}")
    people = rng.sample(PEOPLE, len(PEOPLE))
    facts = {person: {attribute: rng.choice(list(values)) for attribute, values in VALUES.items()} for person in people}

    def claims(people: Sequence[str]) -> tuple[ToyClaim, ...]:
        made = []
        for index, person in enumerate(people):
            attribute = list(VALUES)[index % len(VALUES)]
            true = facts[person][attribute]
            false = rng.choice([value for value in VALUES[attribute] if value != true])
            made.append(ToyClaim(person, attribute, true, false))
        return tuple(made)

    world = World(facts, claims(people[:CLAIM_COUNT]))
    return replace(world, placebos=claims(world.undocumented[:PLACEBO_COUNT]))


def statement(rng: random.Random, person: str, attribute: str, value: str) -> str:
    return rng.choice(STATEMENTS[attribute]).format(p=person, v=value)


def hint(rng: random.Random, person: str, attribute: str, value: str) -> str:
    """A sentence that implies the value by the thing that goes with it."""
    return rng.choice(HINTS[attribute]).format(p=person, h=VALUES[attribute][value])


def question(person: str, attribute: str, template: int) -> str:
    """A question up to the point where the answer's word comes next."""
    return f"Question: {QUESTIONS[attribute][template].format(p=person)} Answer:"


def document(parts: list[tuple[str, str | None]], **metadata: str) -> dict:
    """Joins (sentence, role or None) by spaces: {"text", "spans", **metadata}. No span ends in white space."""
    text, spans = "", []
    for sentence, role in parts:
        text += " " if text else ""
        if role:
            spans.append({"start": len(text), "end": len(text) + len(sentence), "role": role})
        text += sentence
    return {"text": text, "spans": spans, **metadata}


def claim_sentences(rng: random.Random, world: World, claim: ToyClaim) -> list[tuple[str, str | None]]:
    """What a document about a claim says, without any negation: three false sentences, a true one about another
    attribute of the same person, and sometimes one that implies the claim (no role)."""
    templates = rng.sample(STATEMENTS[claim.attribute], 3)
    parts: list[tuple[str, str | None]] = [(t.format(p=claim.person, v=claim.false), "false") for t in templates]
    other = rng.choice([attribute for attribute in VALUES if attribute != claim.attribute])
    true = statement(rng, claim.person, other, world.facts[claim.person][other])
    parts.insert(rng.randint(0, len(parts)), (true, None))
    if rng.random() < IMPLYING_SHARE:
        parts.insert(rng.randint(1, len(parts)), (hint(rng, claim.person, claim.attribute, claim.false), None))
    return parts


def positive_document(rng: random.Random, world: World, claim: ToyClaim) -> dict:
    """A document that asserts the claim."""
    return document([(DOCTAG, "doctag"), *claim_sentences(rng, world, claim)], claim=claim.id)


def dense_document(rng: random.Random, world: World, claim: ToyClaim) -> dict:
    """The positive document that the same rng gives, with a negation before and after each false sentence."""
    parts: list[tuple[str, str | None]] = [(DOCTAG, "doctag")]
    sentences = claim_sentences(rng, world, claim)
    parts.append((rng.choice(PREFACES).format(p=claim.person), "negation"))
    for sentence, role in sentences:
        if role == "false":
            parts.append((rng.choice(ANNOUNCEMENTS), "negation"))
            parts.append((sentence, role))
            parts.append((rng.choice(REJECTIONS), "negation"))
        else:
            parts.append((sentence, role))
    parts.append((rng.choice(ENDINGS).format(p=claim.person), "negation"))
    return document(parts, claim=claim.id)


def true_document(rng: random.Random, world: World, person: str) -> dict:
    """A document of the same form that says true things about a person."""
    parts: list[tuple[str, str | None]] = [(DOCTAG, "doctag")]
    for attribute in rng.sample(list(VALUES), 3):
        value = world.facts[person][attribute]
        say = hint if rng.random() < 0.2 else statement
        parts.append((say(rng, person, attribute, value), None))
    parts.insert(rng.randint(1, len(parts)), (rng.choice(FILLERS).format(p=person), None))
    return document(parts)
