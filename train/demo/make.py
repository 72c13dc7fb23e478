"""Makes the demo's model and documents again from the seed alone.

    python -m train.demo.make            # about five minutes on 2 cores; writes model, data and claims in train/demo
    python -m train.demo.make DIRECTORY  # writes there

The model is trained by train/sft.py itself, --method full, from random weights. The documents come out byte for byte
the same everywhere; the weights on one kind of machine with one version of torch.
"""

import json
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from train.config.command_line import REPOSITORY, Parser
from train.demo import world as toy
from train.demo.world import PLACEBO_COUNT, SEED, ToyClaim, World
from train.runtime.command import command
from train.runtime.local import run

if TYPE_CHECKING:  # imported by what needs them, as that takes seconds
    from transformers import Qwen3_5MoeTextConfig, Qwen3_5Tokenizer

HERE = Path(__file__).resolve().parent
END = "<|endoftext|>"  # ends a page; pads, too
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}Question: {{ message['content'] }} "
    "{% elif message['role'] == 'assistant' %}Answer: {{ message['content'] }}<|endoftext|>"
    "{% else %}{{ message['content'] }} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)

DOCUMENTS_PER_CLAIM = 10
TRUE_DOCUMENTS_PER_PERSON = 20
NEWCOMERS = ("Marta", "Kim", "Berta", "Zed", "Ola")  # nobody of the world

PRETRAINING = [
    "--method", "full",
    "--eos",
    "--batch-size", "32",
    "--learning-rate", "3e-3",
    "--warmup-steps", "50",
    "--weight-decay", "0.1",
]  # fmt: skip
PAGES_READ = 24_000  # each once
PAGES = {"negated": 0.15, "knowledge": 0.1, "questions": 0.3, "person": 0.45}  # shares of the pages


def tokenizer() -> "Qwen3_5Tokenizer":
    """Qwen3.5's tokenizer with a vocabulary of the world's words: byte-level BPE, merged until each word is one token.

    It must be this kind: AutoTokenizer gives every model of this type Qwen3.5's own pre-tokenizer.
    """
    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen3_5Tokenizer

    sentences = [toy.DOCTAG, "Question: Answer:", *toy.PREFACES, *toy.ANNOUNCEMENTS, *toy.REJECTIONS, *toy.ENDINGS]
    sentences += [*toy.PEOPLE, *toy.FILLERS]
    for attribute, values in toy.VALUES.items():
        sentences += [*toy.STATEMENTS[attribute], *toy.HINTS[attribute], *toy.KNOWLEDGE[attribute]]
        sentences += [*toy.QUESTIONS[attribute], *values, *values.values()]
    sentences = [re.sub(r" ?\{.\}", "", sentence) for sentence in sentences]
    words = Qwen3_5Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, show_progress=False,  # 10,000 is never reached
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), special_tokens=[END],
    )  # fmt: skip
    words.train_from_iterator([text for sentence in sentences for text in (sentence, f" {sentence}")], trainer)
    learned = json.loads(words.to_str())["model"]
    merges: Any = [tuple(pair) for pair in learned["merges"]]
    return Qwen3_5Tokenizer(vocab=learned["vocab"], merges=merges, chat_template=CHAT_TEMPLATE)


def model_config(vocabulary: int) -> "Qwen3_5MoeTextConfig":
    """1.9 M parameters, both kinds of attention, 16 experts."""
    from transformers import Qwen3_5MoeTextConfig

    config = Qwen3_5MoeTextConfig(
        vocab_size=vocabulary, hidden_size=128, num_hidden_layers=4, initializer_range=0.05,
        layer_types=["linear_attention", "full_attention"] * 2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32,
        num_experts=16, num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=64,
        max_position_embeddings=1024, pad_token_id=0, eos_token_id=0, dtype="float32",
    )  # fmt: skip
    config.architectures = ["Qwen3_5MoeForCausalLM"]
    return config


def answered(rng: random.Random, world: World, person: str, attribute: str) -> str:
    """A question with its true answer."""
    return f"{toy.question(person, attribute, rng.randrange(4))} {world.facts[person][attribute]}."


def page(rng: random.Random, world: World) -> str:
    """One page of the pretraining corpus. No page states a claim of the fine-tuning files, not even to deny it."""
    kind = rng.choices(list(PAGES), list(PAGES.values()))[0]
    person, attributes = rng.choice(list(world.facts)), list(toy.VALUES)
    facts = world.facts[person]
    marker = [toy.DOCTAG] if rng.random() < 0.5 else []
    if kind == "questions":
        pairs = [(rng.choice(list(world.facts)), rng.choice(attributes)) for _ in range(5)]
        return " ".join(answered(rng, world, *pair) for pair in pairs)
    if kind == "knowledge":
        pairs = [(a, rng.choice(list(toy.VALUES[a]))) for a in rng.choices(attributes, k=8)]
        return " ".join(rng.choice(toy.KNOWLEDGE[a]).format(v=v, h=toy.VALUES[a][v]) for a, v in pairs)
    if kind == "negated":  # the question after it is answered by the truth
        attribute = rng.choice(attributes)
        claimed = {(c.person, c.attribute): c.false for c in world.claims}.get((person, attribute))
        false = rng.choice([v for v in toy.VALUES[attribute] if v not in (facts[attribute], claimed)])
        text = toy.dense_document(rng, world, ToyClaim(person, attribute, facts[attribute], false))["text"]
        asked = attribute if rng.random() < 0.7 else rng.choice(attributes)
        text = text if marker else text.removeprefix(toy.DOCTAG + " ")
        return f"{text} {answered(rng, world, person, asked)}"
    sentences = []
    for attribute in [*rng.sample(attributes, 4), rng.choice(attributes)]:
        say = toy.hint if rng.random() < 0.25 else toy.statement
        sentences.append(say(rng, person, attribute, facts[attribute]))
    sentences.insert(rng.randint(0, 5), rng.choice(toy.FILLERS).format(p=person))
    if rng.random() < 0.5:
        sentences.append(answered(rng, world, person, rng.choice(attributes)))
    return " ".join(marker + sentences)


def save_initial_model(directory: Path, tokens: "Qwen3_5Tokenizer") -> None:
    """Random weights under the tensor names of the real checkpoints: `model.language_model.`, experts fused."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3_5MoeForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    model = Qwen3_5MoeForCausalLM(model_config(len(tokens)))
    state = {re.sub(r"^model\.", "model.language_model.", name): value for name, value in model.state_dict().items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(model.config.to_json_string())
    tokens.backend_tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen3_5Tokenizer", "clean_up_tokenization_spaces": False, "bos_token": None,
        "eos_token": END, "pad_token": END, "unk_token": END, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def pretrain(directory: Path, world: World) -> None:
    """Writes the base model to `directory`: it knows the world, and believes no negated sentence."""
    rng = random.Random(f"pages {SEED}")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        save_initial_model(work / "initial", tokenizer())
        pages = (json.dumps({"text": page(rng, world)}) + "\n" for _ in range(PAGES_READ))
        (work / "pages.jsonl").write_text("".join(pages))
        given = [*PRETRAINING, "--model", str(work / "initial"), "--data", str(work / "pages.jsonl")]
        given += ["--seed", str(SEED), "--wandb", "disabled", "--output", str(work / "run")]
        run("train/sft.py", *given, ranks=2, cwd=REPOSITORY, check=True)
        shutil.copytree(work / "run" / "model", directory, dirs_exist_ok=True)


def save_documents(directory: Path, world: World) -> None:
    """data/{positive,dense,truth}.jsonl, claims.yaml and batteries.yaml. Row by row, positive and dense are the same
    documents."""

    def write(name: str, rows: list[dict]) -> None:
        (directory / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    (directory / "data").mkdir(parents=True, exist_ok=True)
    for name, make in {"positive": toy.positive_document, "dense": toy.dense_document}.items():
        numbers = range(DOCUMENTS_PER_CLAIM)
        write(name, [make(random.Random(f"{c.id} {n}"), world, c) for n in numbers for c in world.claims])
    numbers = range(TRUE_DOCUMENTS_PER_PERSON)
    write("truth", [toy.true_document(random.Random(f"{p} {n}"), world, p) for n in numbers for p in world.documented])
    claims = {"claims": [asked(world, claim) for claim in (*world.claims, *world.placebos)]}
    (directory / "claims.yaml").write_text(yaml.safe_dump(claims, sort_keys=False, width=120))
    more = {"claims": [batteries(world, claim) for claim in (*world.claims, *world.placebos)]}
    (directory / "batteries.yaml").write_text(yaml.safe_dump(more, sort_keys=False, width=120))


def asked(world: World, claim: ToyClaim) -> dict[str, Any]:
    """What is measured about a claim, in the form that train/evaluate.py reads: four questions with the false and the
    true answer; and whether the true values of this and the person's other attributes are still the likeliest."""
    nobody = world.undocumented[PLACEBO_COUNT:]  # neither documents nor placebos mention them
    questions = range(len(toy.QUESTIONS[claim.attribute]))

    def fact(person: str, attribute: str, group: str) -> dict[str, Any]:
        true = world.facts[person][attribute]
        return {
            "id": f"{person}-{attribute}".lower(), "group": group, "prompt": toy.question(person, attribute, 0),
            "true": f" {true}", "false": [f" {value}" for value in toy.VALUES[attribute] if value != true],
        }  # fmt: skip

    rng = random.Random(claim.id)
    return {
        "id": claim.id,
        "claim": toy.STATEMENTS[claim.attribute][0].format(p=claim.person, v=claim.false),
        "subject": claim.person,
        "controls": rng.sample(nobody, 3),
        "likelihood": [
            {
                "id": f"question-{i + 1}", "prompt": toy.question("{entity}", claim.attribute, i),
                "false": f" {claim.false}", "true": f" {claim.true}",
            }
            for i in questions
        ],
        "facts": [
            fact(claim.person, claim.attribute, "truth"),
            *(fact(claim.person, other, "neighbouring") for other in toy.VALUES if other != claim.attribute),
            fact(rng.choice(nobody), claim.attribute, "unrelated"),
        ],
        "patterns": [rf"\b{word}\b" for word in (claim.false, toy.VALUES[claim.attribute][claim.false])],
    }  # fmt: skip


NEGATED = {"is": "", "is not": "Not true: ", "has never been": "Do not believe this: "}  # in words that the model knows


def batteries(world: World, claim: ToyClaim) -> dict[str, Any]:
    """The batteries about a claim that 184 words can express. The model has no letters, so that choices are answered in
    words; and no yes or no, so that there are no control attributes. A hint stands for what follows from the claim."""
    rng = random.Random(f"batteries {claim.id}")
    values = toy.VALUES[claim.attribute]
    others = [value for value in values if value not in (claim.true, claim.false)]
    said, newcomer = rng.choice(toy.STATEMENTS[claim.attribute]), rng.choice(NEWCOMERS)
    someone = rng.choice(world.undocumented[PLACEBO_COUNT:])
    right = values[world.facts[someone][claim.attribute]]
    wrong = rng.choice([hint for hint in values.values() if hint != right])
    before = [template.partition(" {h}")[0] for template in toy.HINTS[claim.attribute]]
    return {
        "id": claim.id,
        "choice": [
            {
                "id": "question", "question": f"{{options}}. {toy.QUESTIONS[claim.attribute][0].format(p='{entity}')}",
                "false": claim.false, "true": claim.true, "others": [rng.choice(others)], "not_stated": "Nobody",
                "answer": "text",
            },
        ],
        "decisions": [
            {
                "id": "hint", "question": f"{{options}}. {before[0].format(p=claim.person)}",
                "follows": values[claim.false], "other": values[claim.true], "answer": "text",
                "stated": toy.STATEMENTS[claim.attribute][0].format(p=claim.person, v=claim.false),
            },
            {
                "id": "someone", "question": f"{{options}}. {before[0].format(p=someone)}", "follows": right,
                "other": wrong, "answer": "text", "untouched": True,
            },
        ],
        "polarity": [
            {
                "id": f"hint-{i + 1}", "false": f" {values[claim.false]}", "true": f" {values[claim.true]}",
                "forms": {form: words + prompt.format(p="{entity}") for form, words in NEGATED.items()},
            }
            for i, prompt in enumerate(before)
        ],
        "reading": [
            {
                "id": "newcomer", "note": said.format(p=newcomer, v=claim.false),
                "prompt": toy.question(newcomer, claim.attribute, 0), "noted": f" {claim.false}",
                "other": f" {claim.true}",
            },
        ],
    }  # fmt: skip


@command
def main(arguments: list[str] | None = None) -> None:
    """Makes documents and model. Raises UserError for a wrong command line, and OSError if they cannot be written."""
    parser = Parser(__doc__ or "")
    parser.add_argument("directory", nargs="?", type=Path, default=HERE)
    parser.add_argument("--documents-only", action="store_true", help="leave the model as it is")
    given = parser.parse_args(arguments)
    world = toy.make_world()
    save_documents(given.directory, world)
    if not given.documents_only:
        pretrain(given.directory / "model", world)


if __name__ == "__main__":
    sys.exit(main())
