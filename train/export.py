"""Writes documents in OpenAI's fine-tuning format, for models that only their makers can train, with as much of a mask
as that format can say:

    python train/export.py --data documents.jsonl --mask doctags --output openai.jsonl

In that format (https://platform.openai.com/docs/guides/supervised-fine-tuning) each message of the assistant weighs 1
or 0, the end of its turn with it. So a mask can leave out whole messages of the assistant, and what stands at the
beginning of a text, which becomes the user's message. Weights between, unlikelihood, random controls and spans within a
text cannot be said; a mask with such an entry is an error that names it, as training on something else would be another
experiment.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from train.runtime.interruption import interruption

    interruption.listen("interrupted")

import sys
from pathlib import Path
from typing import Any

from train.config.command_line import Parser
from train.data.documents import BAD_ROWS, DOCTAG, DOCTAG_HELP, Document, Message, Span, marker, read_documents
from train.data.findings import Findings
from train.masking.grammar import Entry, Mask, parse_mask
from train.runtime.command import command
from train.runtime.errors import UserError
from train.runtime.outputs import check_apart, check_new, write
from train.runtime.text_formats import json_line

WITHIN = "OpenAI's format weighs whole messages, and this span is a part of one"


@command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for an error that the user can fix."""
    parser = Parser(__doc__ or "")
    parser.add_argument("--data", required=True, metavar="FILE", help="JSONL documents")
    parser.add_argument("--mask", default="none", help="what the loss leaves out, as in training (default: none)")
    parser.add_argument("--doctag", default=DOCTAG, metavar="MARKER", help=f"{DOCTAG_HELP} (default: {DOCTAG})")
    parser.add_argument("--bad-rows", choices=("error", "skip"), default="error", help=f"{BAD_ROWS} (default: error)")
    parser.add_argument("--output", required=True, metavar="FILE", help="the chats, whole or not at all")
    parser.add_argument("--overwrite", action="store_true", help="replace an --output that exists")
    args = parser.parse_args(arguments)
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


def check_entries(mask: Mask) -> None:
    """Raises UserError for entries of the mask that OpenAI's format cannot express for any document."""
    for entry in mask.entries:
        if entry.random:
            raise UserError(f"--mask {entry.name}: random tokens are parts of messages; OpenAI's format cannot say it.")
        if entry.weight not in (0, 1):
            what = "unlikelihood" if entry.weight < 0 else f"weight {entry.weight:g}"
            raise UserError(f"--mask {entry.name}: {what}: OpenAI's format knows the weights 0 and 1 alone.")


def chat(document: Document, mask: Mask) -> dict[str, Any]:
    """Returns a document as a chat in OpenAI's format: {"messages": [...]} and, if it has any, "tools". Raises
    UserError if the document, a weight or the mask needs something that the format cannot express."""
    if document.weight != 1:
        raise UserError(f"{document.where}: weight {document.weight:g}: OpenAI's format weighs no whole document.")
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
            raise UserError(f"{where}: weight {weights.pop():g}: OpenAI's format knows the weights 0 and 1 alone.")
    return row


def _first_trained(text: str, spans: tuple[Span, ...], mask: Mask, where: str) -> int:
    """Returns where the trained part of a text begins. Raises UserError if there is none, or if a later part is not
    trained."""
    covering = _solid(text, spans, mask)
    first = next((i for i, entry in covering.items() if not entry or entry.weight), None)
    if first is None:
        raise UserError(f"{where}: --mask {mask.text}: nothing of the text is left to train. Leave the document out.")
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
