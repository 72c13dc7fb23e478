"""Tokenizers of model directories, and documents as tokens. Token ids never depend on spans.

Shapes: L tokens. start_L and end_L are code points of the tokenized text, end exclusive.
"""

import base64
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers

from train.data.chat import Render, Trained, render_and_locate, template_renderer
from train.data.documents import Document, Span, reason
from train.data.findings import NO_TARGET, SKIPPED, THOUGHT_DROPPED, Findings
from train.data.offsets import hold_merged_marks, offsets_from_bytes, solid_counts, touched
from train.errors import UserError

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
KIMI_SPECIAL_TOKENS = 256  # ids kept for them after the ranks
TIKTOKEN_MAX_TEXT, TIKTOKEN_MAX_RUN = 400_000, 25_000


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
    """Control tokens, such as the end of a turn."""
    render_chat: Render
    """Messages (role, content) through the model's own chat template."""


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
    if not tokenized.target_L.any():
        findings.add(NO_TARGET, path, line)


def tokenize_document(document: Document, tokenizer: Tokenizer, *, add_bos: bool, add_eos: bool) -> TokenizedDocument:
    """The document's tokens and targets. Of a chat, targets are the contents of trained messages and the special token
    that ends each, not what the template writes around them, nor an empty <think> block."""
    if document.messages is None:
        assert document.text is not None
        text, spans, last_trained, dropped, last_weight = document.text, document.spans, True, 0, 1.0
        encoded = tokenizer.encode(text)
        target_L = np.ones(len(encoded.ids_L), dtype=bool)
        factor_L = np.ones(len(target_L))
    else:
        rendered = render_and_locate(document.messages, tokenizer.render_chat, document.where, document.tools)
        text, spans, dropped = rendered.text, rendered.spans, rendered.thoughts_dropped
        last_trained, last_weight = document.messages[-1].train, document.messages[-1].weight
        encoded = tokenizer.encode(text)
        target_L, factor_L = _chat_targets(encoded, text, rendered.trained, tokenizer.special_ids)
    factor_L = factor_L * document.weight

    ids_L, start_L, end_L = encoded.ids_L, encoded.start_L, encoded.end_L
    if add_bos and (not len(ids_L) or ids_L[0] != tokenizer.bos_id):  # many chat templates write one themselves
        ids_L = np.insert(ids_L, 0, _required(tokenizer.bos_id, "BOS", "--bos"))
        start_L, end_L, target_L = np.insert(start_L, 0, 0), np.insert(end_L, 0, 0), np.insert(target_L, 0, False)
        factor_L = np.insert(factor_L, 0, 1)
    if add_eos:
        ids_L = np.append(ids_L, np.int32(_required(tokenizer.eos_id, "EOS", "--eos")))
        target_L = np.append(target_L, last_trained)
        factor_L = np.append(factor_L, document.weight * last_weight)
        start_L, end_L = np.append(start_L, np.int32(len(text))), np.append(end_L, np.int32(len(text)))
    target_L[:1] = False  # nothing predicts the first token
    return TokenizedDocument(document, text, ids_L, start_L, end_L, target_L, factor_L, spans, dropped)


def _chat_targets(
    encoded: Encoded, text: str, trained: Sequence[Trained], special_ids: frozenset[int]
) -> tuple[np.ndarray, np.ndarray]:
    """target_L and, of each message's own weight, factor_L of a rendered chat."""
    target_L = np.zeros(len(encoded.ids_L), dtype=bool)
    factor_L = np.ones(len(target_L))
    solid, special_L = solid_counts(text), np.isin(encoded.ids_L, list(special_ids))
    for weight in {each.weight for each in trained}:
        ranges = [(each.start, each.end) for each in trained if each.weight == weight]
        # what ends a turn may stand after white space of the template's
        ends = [len(text) - len(text[end:].lstrip()) for _, end in ranges]
        own_L = touched(encoded.start_L, encoded.end_L, solid, ranges)
        own_L |= special_L & np.isin(encoded.start_L, ends) & (encoded.end_L > encoded.start_L)
        target_L |= own_L
        factor_L[own_L] = weight
    return target_L, factor_L


def _required(token_id: int | None, name: str, setting: str) -> int:
    if token_id is None:
        raise UserError(f"{setting}: the model's tokenizer has no {name} token; leave the setting off")
    return token_id


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a model directory: its tokenizer.json, or a tiktoken.model as Kimi's, or whatever transformers
    turns into a fast tokenizer. No code of the directory is run."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"--model {directory}: no such directory; give a model directory with its tokenizer files")
    config = _read_json(directory / "tokenizer_config.json")
    named = {**_read_json(directory / "special_tokens_map.json"), **config}
    roles = ("bos_token", "eos_token", "unk_token", "pad_token")
    special_tokens = {role: token for role in roles if (token := _content(named.get(role)))}
    try:
        added = {int(key): token for key, token in config.get("added_tokens_decoder", {}).items()}
    except (ValueError, AttributeError):
        raise UserError(
            f"{directory}/tokenizer_config.json: added_tokens_decoder must give a token for each id; copy the file "
            "again from the checkpoint"
        ) from None

    encode: Callable[[str], Encoded]
    if (directory / "tiktoken.model").exists() and not (directory / "tokenizer.json").exists():
        encoding, ids = _tiktoken_encoding(directory / "tiktoken.model", added)
        encode, decode, size = partial(_encode_tiktoken, encoding), encoding.decode, encoding.max_token_value + 1
        special_ids = set(ids.values()) - {key for key, token in added.items() if not token.get("special")}
    else:
        fast = _fast_tokenizer(directory, added)
        encode, decode = partial(_encode_fast, fast), partial(fast.decode, skip_special_tokens=False)
        ids = fast.get_vocab(with_added_tokens=True)
        size = max(ids.values()) + 1
        special_ids = {key for key, token in fast.get_added_tokens_decoder().items() if token.special}
    for role, token in special_tokens.items():
        if token not in ids:
            raise UserError(f"{directory}/tokenizer_config.json: {role} {token!r} is not in the vocabulary; correct it")
    bos_id, eos_id, pad_id = (ids.get(special_tokens.get(role, "")) for role in ("bos_token", "eos_token", "pad_token"))
    render_chat = template_renderer(_chat_template(directory, config), special_tokens, str(directory))
    return Tokenizer(encode, decode, size, bos_id, eos_id, pad_id, frozenset(special_ids), render_chat)


def _fast_tokenizer(directory: Path, added: dict[int, dict[str, Any]]) -> tokenizers.Tokenizer:
    file = directory / "tokenizer.json"
    try:
        if file.exists():
            fast = tokenizers.Tokenizer.from_file(str(file))
        else:  # e.g. a sentencepiece model, which transformers converts; this imports torch
            from transformers import AutoTokenizer

            fast = AutoTokenizer.from_pretrained(directory, trust_remote_code=False).backend_tokenizer
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(
            f"--model {directory}: no tokenizer could be read ({error}); the directory needs tokenizer.json, or "
            "tiktoken.model with tokenizer_config.json"
        ) from None
    special = {token.content for token in fast.get_added_tokens_decoder().values()}
    if fast.get_vocab(with_added_tokens=False).keys() <= special:  # what transformers makes of no files
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
    return fast


def _encode_fast(tokenizer: tokenizers.Tokenizer, text: str) -> Encoded:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)
    start_L = offsets[:, 0]
    return Encoded(np.array(encoding.ids, dtype=np.int32), start_L, hold_merged_marks(text, start_L, offsets[:, 1]))


def _tiktoken_encoding(file: Path, added: dict[int, dict[str, Any]]) -> tuple[tiktoken.Encoding, dict[str, int]]:
    """The encoding of a ranks file (lines of base64 token and rank), and its special tokens."""
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
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
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _content(token: str | dict[str, Any] | None) -> str | None:
    """A token's text, which the files give bare or as an object."""
    return token["content"] if isinstance(token, dict) else token


def _read_json(file: Path) -> dict[str, Any]:
    """{} where there is no such file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); make it readable") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); copy it again from the checkpoint") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: not a JSON object; copy it again from the checkpoint")
    return value
