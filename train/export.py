"""Exports adapters for servers, and documents for OpenAI's fine-tuning service.

With --adapter, it writes an adapter in the form of a server, with serve.json, which has the command that starts the
server:

    python train/export.py --adapter runs/masked/adapter --model DIR --to vllm --output served/masked

It is an error if the server would not apply all LoRA weights, unless --drop names the others. LoRA weights are written
in BF16.

With --data, it writes documents in OpenAI's fine-tuning format, for models that only their makers can train:

    python train/export.py --data documents.jsonl --mask doctags --output openai.jsonl

In that format (https://platform.openai.com/docs/guides/supervised-fine-tuning) each message of the assistant, with the
end of its turn, has the weight 1 or 0. So a mask can leave out whole messages of the assistant, and the beginning of a
text, which becomes the user's message. The format cannot express other weights, unlikelihood, random controls, or spans
within a text. A mask with such an entry is an error that names the entry, because training on anything else would be
another experiment.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from train.runtime.interruption import interruption

    interruption.listen("interrupted")

import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from train.checkpoints.present import CONFIG, SERVE, adapter_files, adapter_name, read_config
from train.config.command_line import Parser
from train.data.documents import BAD_ROWS, DOCTAG, DOCTAG_HELP, Document, Message, Span, marker, read_documents
from train.data.findings import Findings
from train.data.kinds import COUNTED, TermKind
from train.masking.grammar import Entry, Mask, parse_mask
from train.runtime.command import command
from train.runtime.errors import UserError
from train.runtime.outputs import check_apart, check_new, write
from train.runtime.outside import read_json
from train.runtime.shown import size_shown
from train.runtime.text_formats import json_line

WITHIN = "OpenAI's format weights whole messages, and this span is only part of one"


@command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for an error that the user can fix."""
    parser = Parser(__doc__ or "")
    adapters = parser.add_argument_group("an adapter for a server")
    adapters.add_argument("--adapter", type=Path, metavar="DIR", help="a run's adapter/")
    adapters.add_argument("--model", type=Path, metavar="DIR", help="its base model; only the headers are read")
    adapters.add_argument("--to", choices=("vllm", "sglang", "peft"), help="the program that loads it")
    adapters.add_argument("--drop", nargs="+", default=[], metavar="NAME", help="modules that may be left out")
    adapters.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default: bfloat16)")
    adapters.add_argument("--other-base", action="store_true", help="allow a --model that it was not trained on")
    parser.add_argument("--data", metavar="FILE", help="JSONL documents")
    parser.add_argument("--mask", default="none", help="what the loss leaves out, as in training (default: none)")
    parser.add_argument("--doctag", default=DOCTAG, metavar="MARKER", help=f"{DOCTAG_HELP} (default: {DOCTAG})")
    parser.add_argument("--bad-rows", choices=("error", "skip"), default="error", help=f"{BAD_ROWS} (default: error)")
    parser.add_argument("--output", required=True, metavar="PATH", help="a new directory (--adapter) or file (--data)")
    parser.add_argument("--overwrite", action="store_true", help="replace an --output that exists")
    args = parser.parse_args(arguments)
    if bool(args.adapter) == bool(args.data):
        raise UserError("give --adapter DIR, to write it for a server, or --data FILE, to write it in OpenAI's format.")
    if args.adapter:
        return adapter_for_server(args)
    check_apart({"--output": args.output}, {"--data": [args.data]})
    check_new("--output", args.output, args.overwrite)
    mask = parse_mask(args.mask)
    check_entries(mask)
    findings = Findings()
    documents = read_documents(args.data, marker(args.doctag), args.bad_rows, findings)
    rows = [chat(document, mask) for document in documents]
    write("--output", Path(args.output), (json_line(row) for row in rows))
    findings.show()
    print(f"{args.output}: {len(rows)} chats")
    return 0


def adapter_for_server(args: Namespace) -> int:
    """Writes --adapter for the server --to. Returns the exit code.

    Raises UserError if the adapter does not fit --model, or if the server would not apply all of it.
    """
    for flag in ("model", "to"):
        if getattr(args, flag) is None:
            values = " (vllm, sglang or peft)" if flag == "to" else ""
            raise UserError(f"--{flag} is missing: --adapter needs it{values}.")
    adapter, output = args.adapter, Path(args.output)
    check_apart({"--output": args.output}, {"--adapter": [str(adapter)], "--model": [str(args.model)]})
    if output.exists() and not (args.overwrite and (output / CONFIG).is_file()):
        raise UserError(f"--output {output}: already exists; give a new directory, or --overwrite for an adapter.")
    adapter_files(adapter)
    adapter_name(adapter, args.to)
    read_config(args.model)

    import torch

    from train.checkpoints.adapter_files import adapter_settings, check_adapter, check_finite
    from train.checkpoints.reader import Checkpoint
    from train.checkpoints.served import SERVERS, largest_rank, served, write_served
    from train.experts.dispatch import ExpertGroup
    from train.model.text_model import architecture, skeleton, text_config

    base = Checkpoint(args.model)
    lora, model, of = adapter_settings(adapter), skeleton(text_config(base), ExpertGroup()), architecture(base)
    form = served(args.to, model, lora, of, base, args.drop)
    largest_rank(form)
    check_adapter(adapter, model, lora, of, base, args.other_base)
    check_finite(adapter)
    write_served(form, adapter, lora, of, base, output, getattr(torch, args.dtype), args.other_base)
    print(f"{output}: {len(form.tensors)} tensors for {args.to} {SERVERS[args.to]}")
    if args.to != "peft":
        serve = read_json(output / SERVE)
        for how, size in serve["bytes_of_a_slot_per_gpu"].items():
            print(f"  memory for it on each GPU, {how}: {size_shown(size)}")
        print(f"  {shlex.join(serve['command'])}")
    return 0


def check_entries(mask: Mask) -> None:
    """Raises UserError for entries of the mask that OpenAI's format cannot express for any document."""
    for entry in mask.entries:
        if entry.random:
            raise UserError(f"--mask {entry.name}: OpenAI's format cannot express random tokens. Leave it out.")
        cross_entropy = entry.term == TermKind.CROSS_ENTROPY
        if entry.weight not in (0, 1) or not cross_entropy:
            what = f"weight {entry.weight:g}" if cross_entropy else COUNTED[entry.term]
            raise UserError(f"--mask {entry.name}: {what}: OpenAI's format has only the weights 0 and 1.")


def chat(document: Document, mask: Mask) -> dict[str, Any]:
    """Returns a document as a chat in OpenAI's format: {"messages": [...]} and, if it has any, "tools". Raises
    UserError if the document, a weight or the mask needs something that the format cannot express."""
    if document.weight != 1:
        raise UserError(f"{document.where}: weight {document.weight:g}: OpenAI's format has no weights of documents.")
    if document.messages is None:
        text = document.text or ""
        start = _first_trained(text, document.spans, mask, document.where)
        before, after = text[:start].rstrip(), text[start:]
        return {"messages": [{"role": "user", "content": before}, {"role": "assistant", "content": after}]}
    tools = {"tools": list(document.tools)} if document.tools else {}
    return {"messages": [_message(message, mask, document.where) for message in document.messages], **tools}


def _message(message: Message, mask: Mask, where: str) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.content, **dict(message.passed)}
    if message.reasoning:
        raise UserError(f"{where}: reasoning_content: OpenAI's format has no thoughts. Write it into the content.")
    if message.tool_calls:
        row["tool_calls"] = list(message.tool_calls)
    if message.role != "assistant" and message.train:
        raise UserError(f"{where}: a message of {message.role} is trained; OpenAI trains the assistant's.")
    if message.role == "assistant":
        covering = {entry.weight if entry else 1.0 for entry in _solid(message.content, message.spans, mask).values()}
        # A tool call or the end of an empty turn is in no span: the last `all` or `unspanned` entry decides its weight
        outside = [entry.weight for entry in mask.entries if entry.kind in ("all", "unspanned")]
        if message.tool_calls or not covering:
            covering.add(outside[-1] if outside else 1.0)
        weights = {message.train * message.weight * weight for weight in covering}
        if len(weights) > 1:
            raise UserError(f"{where}: --mask {mask.text}: {WITHIN}. Leave it out of the mask.")
        (row["weight"],) = map(int, weights)
        if not weights <= {0.0, 1.0}:
            raise UserError(f"{where}: weight {weights.pop():g}: OpenAI's format has only the weights 0 and 1.")
    return row


def _first_trained(text: str, spans: tuple[Span, ...], mask: Mask, where: str) -> int:
    """Returns where the trained part of a text begins. Raises UserError if there is none, or if a later part is not
    trained."""
    covering = _solid(text, spans, mask)
    first = next((i for i, entry in covering.items() if not entry or entry.weight), None)
    if first is None:
        raise UserError(f"{where}: --mask {mask.text}: no text is left to train on. Leave the document out.")
    for i, entry in covering.items():
        if i > first and entry and not entry.weight:
            raise UserError(f"{where}: --mask {entry.name}: {WITHIN} ({text[i : i + 40]!r}). Leave it out of the mask.")
    return first


def _solid(text: str, spans: tuple[Span, ...], mask: Mask) -> dict[int, Entry | None]:
    """Returns, for each character that is not white space, the last entry of the mask that covers it; None if none
    does."""
    covering: list[Entry | None] = [None] * len(text)
    spanned = {i for span in spans for i in range(span.start, span.end)}
    for entry in mask.entries:
        ranges = [(span.start, span.end) for span in spans if span.role == entry.role]
        if entry.kind == "all":
            ranges = [(0, len(text))]
        elif entry.kind == "unspanned":
            ranges = [(i, i + 1) for i in range(len(text)) if i not in spanned]
        for start, end in ranges:
            covering[start:end] = [entry] * (end - start)
    return {i: entry for i, entry in enumerate(covering) if not text[i].isspace()}


if __name__ == "__main__":
    sys.exit(main())
