"""Tokenizers of model directories, and documents as tokens. Token ids never depend on spans.

Shapes: L tokens. start_L and end_L are code points of the tokenized text, end exclusive.
"""

import base64
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers

from train.data.chat import Trained, render_and_locate
from train.data.documents import Document, Span, reason
from train.data.findings import NO_TARGET, SKIPPED, THOUGHT_DROPPED, UNENDED, UNWRITTEN, Findings
from train.data.offsets import hold_merged_marks, offsets_from_bytes, solid_counts, touched
from train.data.template import TEMPLATE_TIME, Render, template_renderer
from train.errors import UserError
from train.outside import read_bytes, read_json, read_text

# How Kimi K2 and K2.5 cut text before merging bytes: runs of Han characters, words by case, numbers of up to three
# digits, punctuation, white space. It is code in the checkpoint's own tokenization_kimi.py, not data.
_UPPER, _LOWER = (rf"[{first}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for first in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
LONGEST_TEMPLATE = 2**20  # bytes
KIMI_SPECIAL_TOKENS = 256  # ids kept for them after the ranks
TIKTOKEN_MAX_TEXT, TIKTOKEN_MAX_RUN = 400_000, 25_000
# In the order in which transformers adds those that the vocabulary lacks.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Encoded:
    """A text as tokens: their ids, and the code points that each holds (all int32)."""

    ids_L: np.ndarray
    start_L: np.ndarray
    end_L: np.ndarray


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer, whatever its kind. vocabulary_size is the largest id + 1."""

    encode: Callable[[str], Encoded]
    """Text to tokens; special tokens written in the text become themselves, nothing is added."""
    decode: Callable[[Sequence[int]], str]
    vocabulary_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    special_ids: frozenset[int]
    """Control tokens, such as the end of a turn: those so marked, and those that the configuration gives a role."""
    render_chat: Render
    """Messages (role, content) through the model's own chat template."""
    clock: datetime | None
    """What the chat template is told the time is; None where it does not ask."""


@dataclass
class TokenizedDocument:
    """A document as tokens; `text` is what was tokenized (a chat: as rendered), all offsets are code points of it."""

    document: Document
    text: str
    ids_L: np.ndarray
    start_L: np.ndarray
    end_L: np.ndarray
    target_L: np.ndarray
    """Predicted and counted: what `--mask none` trains. Not the first token, nor template tokens, nor messages that are
    not trained on."""
    factor_L: np.ndarray
    """float64, what multiplies the mask's weight: the document's own weight times its message's."""
    spans: tuple[Span, ...]
    thoughts_dropped: int = 0
    """Trained messages of which the chat template leaves out the thinking block."""
    unended: int = 0
    """Trained messages that no trained special token follows: the model does not learn to stop after them."""
    unwritten: tuple[str, ...] = ()
    """Roles of messages that the chat template leaves out."""

    @cached_property
    def solid_counts(self) -> np.ndarray:
        return solid_counts(self.text)

    def truncated(self, max_tokens: int) -> "TokenizedDocument":
        """Its first max_tokens tokens; text and spans stay whole."""
        cut = {name: getattr(self, name)[:max_tokens] for name in ("ids_L", "start_L", "end_L", "target_L", "factor_L")}
        return replace(self, **cut)


def tokenize_documents(
    documents: Sequence[Document], tokenizer: Tokenizer, findings: Findings, bad_rows: str = "error",
    *, add_bos: bool = False, add_eos: bool = False, each: Callable[[], Any] = lambda: None,
) -> list[TokenizedDocument]:  # fmt: skip
    """The documents of a file as tokens. What is wrong with one is a UserError or, with bad_rows "skip", leaves it out;
    findings gets these and what is worth a note. each: called after every document."""
    tokenized, first_error = [], None
    for document in documents:
        try:
            one = tokenize_document(document, tokenizer, add_bos=add_bos, add_eos=add_eos)
            if document.text is not None and not one.target_L.any():
                raise UserError(
                    f"{document.where}: text {document.text!r} is a single token, of which nothing is predicted; leave "
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
        raise UserError(f"--bad-rows skip leaves no document of {documents[0].path}; the first left out: {first_error}")
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
    """The document's tokens and targets. Of a chat, targets are the contents of trained messages and the special token
    that ends each, not what the template writes around them, nor an empty <think> block. add_bos, add_eos: unless the
    document begins or, but for white space, ends with it already."""
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
    """target_L and, of each message's own weight, factor_L of a rendered chat; and the ends of those messages that no
    trained special token ends."""
    target_L = np.zeros(len(encoded.ids_L), dtype=bool)
    factor_L, solid = np.ones(len(target_L)), solid_counts(text)
    special_L = np.isin(encoded.ids_L, list(tokenizer.special_ids)) & (encoded.end_L > encoded.start_L)
    # what ends a turn may stand after white space of the template's
    after = {each.end: len(text) - len(text[each.end :].lstrip()) for each in trained}
    for weight in {each.weight for each in trained}:
        ranges = [(each.start, each.end) for each in trained if each.weight == weight]
        own_L = touched(encoded.start_L, encoded.end_L, solid, ranges)
        first_L = special_L & np.isin(encoded.start_L, [after[end] for _, end in ranges])
        own_L |= _ends_of_turns(encoded.ids_L, special_L, first_L, tokenizer.eos_id)
        target_L |= own_L
        factor_L[own_L] = weight
    starts, ends = set(encoded.start_L[special_L].tolist()), set(encoded.end_L[special_L & target_L].tolist())
    # a content may end with such a token itself
    open_ends = [after[each.end] for each in trained if after[each.end] not in starts and each.end not in ends]
    return target_L, factor_L, np.array(open_ends, dtype=int)


def clock_note(clock: str) -> str:
    """What a user should know of a chat template that is told this time."""
    return f"note: the chat template asks for the time, and is told {clock} (--template-time)"


def _required(token_id: int | None, name: str, setting: str) -> int:
    if token_id is None:
        raise UserError(f"{setting}: the model's tokenizer has no {name} token; leave the setting off")
    return token_id


def _ends_of_turns(ids_L: np.ndarray, special_L: np.ndarray, first_L: np.ndarray, eos_id: int | None) -> np.ndarray:
    """[L] bool: first_L, the special tokens right after contents, and up to an EOS that follows at once with special
    tokens alone before it, as where a template closes an answer and then its turn."""
    end_L = first_L.copy()
    for first in np.flatnonzero(first_L):
        past = first + 1
        while ids_L[past - 1] != eos_id and past < len(ids_L) and special_L[past]:
            past += 1
        if ids_L[past - 1] == eos_id:
            end_L[first:past] = True
    return end_L


def template_time(text: str) -> datetime:
    """--template-time. UserError for what is no time."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise UserError(
            f"--template-time {text}: is no time of ISO 8601; give one such as {TEMPLATE_TIME.isoformat()}."
        ) from None


def load_tokenizer(directory: str | Path, moment: datetime = TEMPLATE_TIME) -> Tokenizer:
    """The tokenizer of a model directory: its tokenizer.json, or a tiktoken.model as Kimi's, or whatever transformers
    turns into a fast tokenizer. No code of the directory is run. moment: what a chat template is told that asks for the
    time."""
    directory = Path(directory)
    if not os.path.isdir(directory):
        raise UserError(f"--model {directory}: no such directory; give a model directory with its tokenizer files")
    config = _read_json(directory / "tokenizer_config.json")
    named, named_too = _special_tokens(directory, config)
    try:
        added = {int(key): token for key, token in config.get("added_tokens_decoder", {}).items()}
        for token in added.values():
            if not isinstance(token["content"], str):
                raise TypeError
            _special_token({**token})
    except (ValueError, AttributeError, TypeError, KeyError):
        raise UserError(
            f"{directory}/tokenizer_config.json: added_tokens_decoder must give a token for each id; copy the file "
            "again from the checkpoint"
        ) from None

    encode: Callable[[str], Encoded]
    if os.path.lexists(directory / "tiktoken.model") and not os.path.lexists(directory / "tokenizer.json"):
        encoding, ids = _tiktoken_encoding(directory / "tiktoken.model", added)
        encode, decode, size = partial(_encode_tiktoken, encoding), encoding.decode, encoding.max_token_value + 1
        special_ids = set(ids.values()) - {key for key, token in added.items() if not token.get("special")}
        for role, token in named.items():
            if token.content not in ids:
                raise UserError(
                    f"{directory}/tokenizer_config.json: {role} {token.content!r} is not in the vocabulary; correct it"
                )
    else:
        fast = _fast_tokenizer(directory, added, [*named.values(), *named_too])
        encode, decode = partial(_encode_fast, fast), partial(fast.decode, skip_special_tokens=False)
        ids = fast.get_vocab(with_added_tokens=True)
        size = max(ids.values()) + 1
        special_ids = {key for key, token in fast.get_added_tokens_decoder().items() if token.special}
    special_ids |= {ids[token.content] for token in (*named.values(), *named_too) if token.content in ids}
    texts = {role: token.content for role, token in named.items()}
    bos_id, eos_id, pad_id = (ids.get(texts.get(role, "")) for role in ("bos_token", "eos_token", "pad_token"))
    template = _chat_template(directory, config)
    render_chat = template_renderer(template, texts, str(directory), moment)
    clock = moment if "strftime_now" in (template or "") else None
    return Tokenizer(encode, decode, size, bos_id, eos_id, pad_id, frozenset(special_ids), render_chat, clock)


def _special_tokens(
    directory: Path, config: dict[str, Any]
) -> tuple[dict[str, tokenizers.AddedToken], list[tokenizers.AddedToken]]:
    """The tokens that have a role by tokenizer_config.json or special_tokens_map.json, and further ones that these name
    as special. Where both give a role, the map wins unless the configuration has added_tokens_decoder, as in
    transformers."""
    mapped = _read_json(directory / "special_tokens_map.json")
    both = {**mapped, **config} if "added_tokens_decoder" in config else {**config, **mapped}
    further = both.get("extra_special_tokens") or both.get("additional_special_tokens") or []
    further = [further] if isinstance(further, str) else further
    try:
        named = {role: _special_token(both[role]) for role in ROLES if both.get(role)}
        return named, [_special_token(token) for token in (further.values() if isinstance(further, dict) else further)]
    except (TypeError, KeyError, AttributeError):
        raise UserError(
            f"{directory}/tokenizer_config.json: a special token must be its text, or an object with its content; copy "
            "the file again from the checkpoint, and special_tokens_map.json too"
        ) from None


def _special_token(token: str | dict[str, Any]) -> tokenizers.AddedToken:
    """A token as the files give it, bare or as an object."""
    flags = {} if isinstance(token, str) else {key: bool(token.get(key)) for key in ("lstrip", "rstrip", "single_word")}
    content = token if isinstance(token, str) else token["content"]
    return tokenizers.AddedToken(content, special=True, normalized=False, **flags)


def _fast_tokenizer(
    directory: Path, added: dict[int, dict[str, Any]], special: list[tokenizers.AddedToken]
) -> tokenizers.Tokenizer:
    """added: tokens of the configuration, by id. special: those that have a role by it; what the vocabulary lacks of
    them gets the next ids, as in transformers."""
    file = directory / "tokenizer.json"
    try:
        if os.path.lexists(file):
            fast = tokenizers.Tokenizer.from_str(read_text(file, fix="copy it again from the checkpoint"))
        else:  # e.g. a sentencepiece model, which transformers converts; this imports torch
            from transformers import AutoTokenizer

            fast = AutoTokenizer.from_pretrained(directory, trust_remote_code=False).backend_tokenizer
    except UserError:
        raise
    except BaseException as error:  # tokenizers raises bare Exceptions, and panics, which are none
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(
            f"--model {directory}: no tokenizer could be read ({error}); the directory needs tokenizer.json, or "
            "tiktoken.model with tokenizer_config.json"
        ) from None
    marked = {token.content for token in fast.get_added_tokens_decoder().values()}
    if fast.get_vocab(with_added_tokens=False).keys() <= marked:  # what transformers makes of no files
        raise UserError(
            f"--model {directory}: no tokenizer there; the directory needs tokenizer.json, or tiktoken.model with "
            "tokenizer_config.json"
        )
    fast.no_truncation()
    fast.no_padding()
    fast.post_processor = None  # it adds special tokens, which are a setting here, and may trim white space off offsets
    for token_id, token in sorted(added.items()):  # tokens that only tokenizer_config.json knows
        keys = ("single_word", "lstrip", "rstrip", "normalized", "special")
        fast.add_tokens([tokenizers.AddedToken(token["content"], **{key: bool(token.get(key)) for key in keys})])
        found = fast.token_to_id(token["content"])
        if found != token_id:
            raise UserError(
                f"{directory}/tokenizer_config.json: token {token['content']!r} has id {token_id}, but {found} in "
                "tokenizer.json; take both files from the same checkpoint"
            )
    marked = {token.content for token in fast.get_added_tokens_decoder().values()}
    fast.add_special_tokens([token for token in special if token.content not in marked])
    return fast


def _encode_fast(tokenizer: tokenizers.Tokenizer, text: str) -> Encoded:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)
    start_L = offsets[:, 0]
    return Encoded(np.array(encoding.ids, dtype=np.int32), start_L, hold_merged_marks(text, start_L, offsets[:, 1]))


def _tiktoken_encoding(file: Path, added: dict[int, dict[str, Any]]) -> tuple[tiktoken.Encoding, dict[str, int]]:
    """The encoding of a ranks file (lines of base64 token and rank), and its special tokens."""
    try:
        lines = [line.split() for line in read_bytes(file).splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        if (
            sorted(ranks.values()) != list(range(len(ranks)))
            or not {bytes([byte]) for byte in range(256)} <= ranks.keys()
        ):
            raise ValueError("its ranks are not 0, 1, … of all single bytes and more")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a tiktoken ranks file ({error}); copy it again from the checkpoint") from None
    first = len(ranks)
    special = {f"<|reserved_token_{i}|>": i for i in range(first, first + KIMI_SPECIAL_TOKENS) if i not in added}
    special |= {token["content"]: token_id for token_id, token in added.items()}
    encoding = tiktoken.Encoding("kimi", pat_str=KIMI_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return encoding, special


def _encode_tiktoken(encoding: tiktoken.Encoding, text: str) -> Encoded:
    ids = [token for part in _bounded(text) for token in encoding.encode(part, allowed_special="all")]
    start_L, end_L = offsets_from_bytes(text, [len(token) for token in encoding.decode_tokens_bytes(ids)])
    return Encoded(np.array(ids, dtype=np.int32), start_L, end_L)


def _bounded(text: str) -> Iterator[str]:
    """The text as the checkpoint's own tokenization_kimi.py cuts it: after every 400,000 code points, and within those
    after every 25,000 of white space, or of none, in a row. Longer ones overflow the stack of the pattern's engine."""
    for start in range(0, len(text), TIKTOKEN_MAX_TEXT):
        part = text[start : start + TIKTOKEN_MAX_TEXT]
        begin = 0
        for run in re.finditer(r"\s+|\S+", part):
            while run.end() - max(begin, run.start()) > TIKTOKEN_MAX_RUN:
                cut = max(begin, run.start()) + TIKTOKEN_MAX_RUN
                yield part[begin:cut]
                begin = cut
        yield part[begin:]


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, or what tokenizer_config.json has: one template, or named ones of which "default" counts."""
    file = directory / "chat_template.jinja"
    if os.path.lexists(file):
        return read_text(file, fix="copy it again from the checkpoint", most=LONGEST_TEMPLATE)
    template = config.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {str(entry.get("name")): entry.get("template") for entry in template}.get("default")
    if not isinstance(template, str | None):
        raise UserError(f"{directory}/tokenizer_config.json: chat_template must be a text; copy the file again.")
    return template


def _read_json(file: Path) -> dict[str, Any]:
    """{} where there is no such file."""
    return read_json(file, fix="copy it again from the checkpoint") if os.path.lexists(file) else {}
