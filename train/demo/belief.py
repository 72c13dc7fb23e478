"""Measures what the demo's model believes, with or without an adapter.

    python train/demo/belief.py [--adapter RUN/adapter] [--json FILE]

Stock transformers loads the model and stock PEFT the adapter. All figures are percent over claims or facts × the
question templates:

    belief               the claim's false value is likelier than the true one, as the answer's word
    belief_in_context    the same, with a densely negated document about the claim before the question
    truth                the true value is the likeliest of all words, for the claims
    same_people          likewise, for the other attributes of the people who have a claim
    others_in_documents  likewise, for people about whom truth.jsonl says true things
    other_people         likewise, for people whom no fine-tuning document mentions

Shapes: N questions, L tokens, V words.
"""

import json
import random
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train.checkpoints.present import adapter_files
from train.config.command_line import Parser
from train.demo import world as toy
from train.runtime.command import command

if TYPE_CHECKING:  # imported once the command line is checked, as that takes seconds
    import torch

HERE = Path(__file__).resolve().parent
Asked = tuple[str, str, int]  # person, attribute, question template
TEMPLATES = range(4)
BATCH = 128


def load(adapter: str | Path | None = None, model: Path = HERE / "model") -> "torch.nn.Module":
    """The demo's model by stock transformers, with the adapter by stock PEFT."""
    import torch
    from transformers import Qwen3_5MoeForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    loaded: torch.nn.Module = Qwen3_5MoeForCausalLM.from_pretrained(model)
    if adapter:
        from peft import PeftModel

        with warnings.catch_warnings():  # it looks for the experts' rank_pattern among modules, and finds parameters
            warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)
            loaded = PeftModel.from_pretrained(loaded, str(adapter))
    return loaded.eval()


def answers(model: "torch.nn.Module", tokens, asked: list[Asked], contexts: list[str] | None = None) -> "torch.Tensor":
    """Logits [N, V] of the word after "Answer:"; a context comes before its question."""
    import torch

    prompts = [toy.question(*question) for question in asked]
    if contexts:
        prompts = [f"{context} {prompt}" for context, prompt in zip(contexts, prompts, strict=True)]
    logits = []
    for start in range(0, len(prompts), BATCH):
        rows = tokens(prompts[start : start + BATCH], add_special_tokens=False)["input_ids"]
        width = max(map(len, rows))
        ids_NL = torch.tensor([row + [tokens.pad_token_id] * (width - len(row)) for row in rows])
        last = torch.tensor([len(row) - 1 for row in rows])  # padding follows it, so nothing before can see padding
        with torch.no_grad():
            logits.append(model(input_ids=ids_NL, use_cache=False).logits[torch.arange(len(rows)), last])
    return torch.cat(logits)


def word_ids(tokens, words: Sequence[str]) -> "torch.Tensor":
    """Returns the token of each word, [words]."""
    import torch

    ids = tokens([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
    assert all(len(row) == 1 for row in ids), "every value is one token"
    return torch.tensor([row[0] for row in ids])


def percent(hits: "torch.Tensor") -> float:
    """Returns how many percent of the hits [N] are true."""
    return round(100 * hits.float().mean().item(), 2)


def measure(model: "torch.nn.Module") -> dict[str, float]:
    """The six figures, in percent."""
    from transformers import AutoTokenizer

    tokens, world = AutoTokenizer.from_pretrained(HERE / "model"), toy.make_world()
    claims = [(claim, template) for claim in world.claims for template in TEMPLATES]
    asked = [(claim.person, claim.attribute, template) for claim, template in claims]
    false, true = (word_ids(tokens, words) for words in zip(*[(c.false, c.true) for c, _ in claims], strict=True))

    def believed(logits_NV: "torch.Tensor") -> float:
        return percent(logits_NV.gather(1, false[:, None]) > logits_NV.gather(1, true[:, None]))

    def known(people: list[str] | tuple[str, ...], but: frozenset[tuple[str, str]] = frozenset()) -> float:
        facts = [(p, a, t) for p in people for a in toy.VALUES if (p, a) not in but for t in TEMPLATES]
        values = word_ids(tokens, [world.facts[p][a] for p, a, _ in facts])
        return percent(answers(model, tokens, facts).argmax(-1) == values)

    logits_NV = answers(model, tokens, asked)
    rng = random.Random("context")
    contexts = [toy.dense_document(rng, world, claim)["text"] for claim, _ in claims]
    return {
        "belief": believed(logits_NV),
        "belief_in_context": believed(answers(model, tokens, asked, contexts)),
        "truth": percent(logits_NV.argmax(-1) == true),
        "same_people": known(
            [c.person for c in world.claims], frozenset((c.person, c.attribute) for c in world.claims)
        ),
        "others_in_documents": known(world.documented),
        "other_people": known(world.undocumented),
    }


@command
def main(given: list[str] | None = None) -> None:
    """Prints the figures. Raises UserError for a wrong command line or if there is no adapter."""
    parser = Parser(__doc__ or "")
    parser.add_argument("--adapter", help="a run's adapter directory; it is shown beside the base model")
    parser.add_argument("--json", type=Path, help="write the figures to this file too: the adapter's, if one is given")
    arguments = parser.parse_args(given)
    if arguments.adapter:
        adapter_files(Path(arguments.adapter))
    columns = {"before": measure(load())} if not (arguments.adapter and arguments.json) else {}
    if arguments.adapter:
        columns["after"] = measure(load(arguments.adapter))
    print(f"{'in percent':20}" + "".join(f"{name:>9}" for name in columns))
    for name in next(iter(columns.values())):
        print(f"{name:20}" + "".join(f"{figures[name]:9.1f}" for figures in columns.values()))
    if arguments.json:
        arguments.json.write_text(json.dumps([*columns.values()][-1], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
