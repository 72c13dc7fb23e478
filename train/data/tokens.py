"""Tokenizes documents: token ids, the code points that each token holds, and which tokens are targets.

Token ids never depend on spans.

Shapes: L tokens. start_L and end_L are code points of the tokenized text, end exclusive.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from train.data.chat import Trained, render_and_locate
from train.data.documents import Document, Span, reason
from train.data.findings import NO_TARGET, SKIPPED, THOUGHT_DROPPED, UNENDED, UNWRITTEN, Findings
from train.data.offsets import solid_counts, touched
from train.data.tokenizer import Encoded, Tokenizer
from train.runtime.errors import UserError


@dataclass
class TokenizedDocument:
    """A tokenized document. `text` is what was tokenized (a chat as rendered); all offsets are code points of it."""

    document: Document
    text: str
    ids_L: np.ndarray
    start_L: np.ndarray
    end_L: np.ndarray
    target_L: np.ndarray
    """bool: tokens that are predicted and counted; `--mask none` trains on all of them. Excluded are the first token,
    template tokens other than the end of a trained turn, and messages that are not trained on."""
    factor_L: np.ndarray
    """float64, multiplies the mask's weight: the document's own weight times its message's."""
    spans: tuple[Span, ...]
    thoughts_dropped: int = 0
    """Number of trained messages whose thinking block the chat template leaves out."""
    unended: int = 0
    """Number of trained messages that no trained special token follows: the model does not learn to stop there."""
    unwritten: tuple[str, ...] = ()
    """Roles of messages that the chat template leaves out."""

    @cached_property
    def solid_counts(self) -> np.ndarray:
        """[code points + 1] int32: non-white-space counts of the text (see train/data/offsets.py)."""
        return solid_counts(self.text)

    def truncated(self, max_tokens: int) -> "TokenizedDocument":
        """Returns the document with only its first max_tokens tokens; text and spans stay whole."""
        cut = {name: getattr(self, name)[:max_tokens] for name in ("ids_L", "start_L", "end_L", "target_L", "factor_L")}
        return replace(self, **cut)


def tokenize_documents(
    documents: Sequence[Document], tokenizer: Tokenizer, findings: Findings, bad_rows: str = "error",
    *, add_bos: bool = False, add_eos: bool = False, each: Callable[[], Any] = lambda: None,
) -> list[TokenizedDocument]:  # fmt: skip
    """Tokenizes the documents of a file. each: called after every document.

    Raises UserError for a document that is wrong; bad_rows "skip" leaves the document out instead. Raises UserError too
    if no document is left. findings: receives the skipped documents and what is worth a note.
    """
    tokenized, first_error = [], None
    for document in documents:
        try:
            one = tokenize_document(document, tokenizer, add_bos=add_bos, add_eos=add_eos)
            if document.text is not None and not one.target_L.any():
                raise UserError(
                    f"{document.where}: text {document.text!r} is a single token, so nothing is predicted; leave "
                    "the document out, or use --bad-rows skip"
                )
            tokenized.append(one)
            _note(one, findings)
        except UserError as error:
            if bad_rows != "skip":
                raise
            first_error = first_error or error
            findings.add(SKIPPED, document.path, document.line, reason(error, document.where))
        each()
    if not tokenized and first_error:
        raise UserError(f"--bad-rows skip leaves no document of {documents[0].path}; first one left out: {first_error}")
    return tokenized


def _note(tokenized: TokenizedDocument, findings: Findings) -> None:
    path, line = tokenized.document.path, tokenized.document.line
    for _ in range(tokenized.thoughts_dropped):
        findings.add(THOUGHT_DROPPED, path, line)
    for _ in range(tokenized.unended):
        findings.add(UNENDED, path, line)
    for role in tokenized.unwritten:
        findings.add(UNWRITTEN, path, line, role)
    if not tokenized.target_L.any():
        findings.add(NO_TARGET, path, line)


def tokenize_document(document: Document, tokenizer: Tokenizer, *, add_bos: bool, add_eos: bool) -> TokenizedDocument:
    """Returns the document's tokens and targets.

    In a chat, the targets are the trained messages and the special token that ends each. Other text that the template
    writes, including an empty <think> block, is not a target. add_bos, add_eos: add the token unless the document
    already begins with it or, ignoring white space, ends with it.

    Raises UserError if the tokenizer lacks such a token, or if the template cannot render the chat as needed.
    """
    if document.messages is None:
        assert document.text is not None
        text, spans, last_trained, last_weight = document.text, document.spans, True, 1.0
        dropped, unwritten = 0, tuple[str, ...]()
        encoded, open_ends = tokenizer.encode(text), np.array([], dtype=int)
        target_L = np.ones(len(encoded.ids_L), dtype=bool)
        factor_L = np.ones(len(target_L))
    else:
        rendered = render_and_locate(document.messages, tokenizer.render_chat, document.where, document.tools)
        text, spans = rendered.text, rendered.spans
        dropped, unwritten = rendered.thoughts_dropped, rendered.unwritten
        last_trained, last_weight = document.messages[-1].train, document.messages[-1].weight
        encoded = tokenizer.encode(text)
        target_L, factor_L, open_ends = _chat_targets(encoded, text, rendered.trained, tokenizer)
    factor_L = factor_L * document.weight

    ids_L, start_L, end_L = encoded.ids_L, encoded.start_L, encoded.end_L
    if add_bos and (bos := _required(tokenizer.bos_id, "BOS", "--bos")) not in ids_L[:1]:
        ids_L = np.insert(ids_L, 0, bos)
        start_L, end_L, target_L = np.insert(start_L, 0, 0), np.insert(end_L, 0, 0), np.insert(target_L, 0, False)
        factor_L = np.insert(factor_L, 0, 1)
    last_L = ids_L[start_L < len(text.rstrip())][-1:]
    if add_eos and (eos := _required(tokenizer.eos_id, "EOS", "--eos")) not in last_L:
        ids_L = np.append(ids_L, np.int32(eos))
        target_L = np.append(target_L, last_trained)
        factor_L = np.append(factor_L, document.weight * last_weight)
        start_L, end_L = np.append(start_L, np.int32(len(text))), np.append(end_L, np.int32(len(text)))
        open_ends = open_ends[(open_ends != len(text)) | (not last_trained)]
    target_L[:1] = False  # nothing predicts the first token
    return TokenizedDocument(
        document, text, ids_L, start_L, end_L, target_L, factor_L, spans, dropped, len(open_ends), unwritten
    )


def _chat_targets(
    encoded: Encoded, text: str, trained: Sequence[Trained], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns target_L and factor_L (by each message's own weight) of a rendered chat, and the ends, in code points, of
    the messages that no trained special token ends."""
    target_L = np.zeros(len(encoded.ids_L), dtype=bool)
    factor_L, solid = np.ones(len(target_L)), solid_counts(text)
    special_L = np.isin(encoded.ids_L, list(tokenizer.special_ids)) & (encoded.end_L > encoded.start_L)
    # the token that ends a turn may follow white space of the template
    after = {each.end: len(text) - len(text[each.end :].lstrip()) for each in trained}
    for weight in {each.weight for each in trained}:
        ranges = [(each.start, each.end) for each in trained if each.weight == weight]
        own_L = touched(encoded.start_L, encoded.end_L, solid, ranges)
        first_L = special_L & np.isin(encoded.start_L, [after[end] for _, end in ranges])
        own_L |= _ends_of_turns(encoded.ids_L, special_L, first_L, tokenizer.eos_id)
        target_L |= own_L
        factor_L[own_L] = weight
    starts, ends = set(encoded.start_L[special_L].tolist()), set(encoded.end_L[special_L & target_L].tolist())
    # a content may itself end with such a token
    open_ends = [after[each.end] for each in trained if after[each.end] not in starts and each.end not in ends]
    return target_L, factor_L, np.array(open_ends, dtype=int)


def _required(token_id: int | None, name: str, setting: str) -> int:
    if token_id is None:
        raise UserError(f"{setting}: the model's tokenizer has no {name} token; leave the setting off")
    return token_id


def _ends_of_turns(ids_L: np.ndarray, special_L: np.ndarray, first_L: np.ndarray, eos_id: int | None) -> np.ndarray:
    """Returns [L] bool: first_L, which are the special tokens right after contents, extended up to an EOS if only
    special tokens come before it. Some templates close an answer and then the turn in this way."""
    end_L = first_L.copy()
    for first in np.flatnonzero(first_L):
        past = first + 1
        while ids_L[past - 1] != eos_id and past < len(ids_L) and special_L[past]:
            past += 1
        if ids_L[past - 1] == eos_id:
            end_L[first:past] = True
    return end_L
