"""Loads the tokenizer of a model directory from the files of that directory alone.

Shapes: L tokens. start_L and end_L are code points of the tokenized text, end exclusive.
"""

import base64
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers

from train.data.offsets import hold_merged_marks, offsets_from_bytes
from train.data.template import TEMPLATE_TIME, Render, template_renderer
from train.runtime.errors import UserError
from train.runtime.outside import MOST_VOCABULARY, opened, read_bytes, read_json, read_text

# How Kimi K2 and K2.5 split text before merging bytes: runs of Han characters, words by case, numbers of up to three
# digits, punctuation, white space. The pattern is repeated here because the checkpoint has it as code, in its own
# tokenization_kimi.py, and not as data.
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
# The files beside a model's weights that determine tokens: all that load_tokenizer, or transformers for it, reads.
TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
             "chat_template.jinja")  # fmt: skip
OPENED_TOO = ("*.json", "*.txt", "*.tiktoken", "*/*.jinja")  # by transformers, depending on the kind of tokenizer
LONGEST_TEMPLATE = 2**20  # bytes
KIMI_SPECIAL_TOKENS = 256  # ids reserved for special tokens after the ranks
TIKTOKEN_MAX_TEXT, TIKTOKEN_MAX_RUN = 400_000, 25_000  # code points
# In the order in which transformers adds those missing from the vocabulary.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Encoded:
    """A text as tokens: their ids, and the code points [start, end) that each token holds (all int32)."""

    ids_L: np.ndarray
    start_L: np.ndarray
    end_L: np.ndarray


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer, of any kind. vocabulary_size is the largest id + 1."""

    encode: Callable[[str], Encoded]
    """Text to tokens. A special token written in the text is encoded as that token; no tokens are added."""
    decode: Callable[[Sequence[int]], str]
    vocabulary_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    special_ids: frozenset[int]
    """Control tokens, such as the end of a turn: tokens marked as special, or with a role in the configuration."""
    render_chat: Render
    """Messages (role, content) to text, through the model's own chat template."""
    clock: datetime | None
    """The time that the chat template gets; None if it does not ask for it."""


def clock_note(clock: str) -> str:
    """Returns the note for users that the chat template asks for the time and gets this one."""
    return f"note: the chat template asks for the time and gets {clock} (--template-time)"


def load_tokenizer(directory: str | Path, moment: datetime = TEMPLATE_TIME) -> Tokenizer:
    """Loads a model directory's tokenizer: its tokenizer.json, a tiktoken.model like Kimi's, or whatever transformers
    converts to a fast tokenizer. No code of the directory is run. Raises UserError if there is no tokenizer, or if its
    files cannot be read or contradict each other.

    moment: the time that the chat template gets if it asks for it.
    """
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
    """Returns the tokens with a role in tokenizer_config.json or special_tokens_map.json, and the further tokens that
    these files list as special. If both files give a role, the map wins unless the configuration has
    added_tokens_decoder, as in transformers."""
    mapped = _read_json(directory / "special_tokens_map.json")
    both = {**mapped, **config} if "added_tokens_decoder" in config else {**config, **mapped}
    further = both.get("extra_special_tokens") or both.get("additional_special_tokens") or []
    further = [further] if isinstance(further, str) else further
    try:
        named = {role: _special_token(both[role]) for role in ROLES if both.get(role)}
        return named, [_special_token(token) for token in (further.values() if isinstance(further, dict) else further)]
    except (TypeError, KeyError, AttributeError):
        raise UserError(
            f"{directory}/tokenizer_config.json: a special token must be a string, or an object with its content; copy "
            "the file again from the checkpoint, and special_tokens_map.json too"
        ) from None


def _special_token(token: str | dict[str, Any]) -> tokenizers.AddedToken:
    """Returns a token that a file gives as a string or as an object."""
    flags = {} if isinstance(token, str) else {key: bool(token.get(key)) for key in ("lstrip", "rstrip", "single_word")}
    content = token if isinstance(token, str) else token["content"]
    return tokenizers.AddedToken(content, special=True, normalized=False, **flags)


def _fast_tokenizer(
    directory: Path, added: dict[int, dict[str, Any]], special: list[tokenizers.AddedToken]
) -> tokenizers.Tokenizer:
    """Loads tokenizer.json, or has transformers convert another kind of tokenizer.

    added: tokens of the configuration, by id. special: tokens that it gives a role or lists as special; those missing
    from the vocabulary get the next ids, as in transformers.
    """
    file = directory / "tokenizer.json"
    try:
        if os.path.lexists(file):
            fix = "copy it again from the checkpoint"
            fast = tokenizers.Tokenizer.from_str(read_text(file, fix=fix, most=MOST_VOCABULARY))
        else:  # e.g. a sentencepiece model, which transformers converts; this imports torch
            from transformers import AutoTokenizer

            for path in {each for pattern in (*TOKENIZER, *OPENED_TOO) for each in directory.glob(pattern)}:
                if not path.is_dir():
                    opened(path, fix="copy it again from the checkpoint").close()  # transformers would block on a pipe
            fast = AutoTokenizer.from_pretrained(directory, trust_remote_code=False).backend_tokenizer
    except UserError:
        raise
    except BaseException as error:  # tokenizers raises bare Exceptions, and panics, which are not Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(
            f"--model {directory}: no tokenizer could be read ({error}); the directory needs tokenizer.json, or "
            "tiktoken.model with tokenizer_config.json"
        ) from None
    marked = {token.content for token in fast.get_added_tokens_decoder().values()}
    if fast.get_vocab(with_added_tokens=False).keys() <= marked:  # as transformers returns without tokenizer files
        raise UserError(
            f"--model {directory}: no tokenizer found; the directory needs tokenizer.json, or tiktoken.model with "
            "tokenizer_config.json"
        )
    fast.no_truncation()
    fast.no_padding()
    fast.post_processor = None  # it adds special tokens, which are a setting here, and may trim white space off offsets
    for token_id, token in sorted(added.items()):  # tokens that only tokenizer_config.json lists
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
    """Returns the encoding of a ranks file (lines of base64 token and rank), and its special tokens with their ids."""
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
    """Yields the pieces into which the checkpoint's own tokenization_kimi.py cuts the text: after every 400,000 code
    points, and within these after every 25,000 consecutive code points that are all white space, or all not. Longer
    runs overflow the stack of the regex engine."""
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
    """Returns the template in chat_template.jinja or else in tokenizer_config.json. The latter has one template, or
    named ones, of which "default" is used."""
    file = directory / "chat_template.jinja"
    if os.path.lexists(file):
        return read_text(file, fix="copy it again from the checkpoint", most=LONGEST_TEMPLATE)
    template = config.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {str(entry.get("name")): entry.get("template") for entry in template}.get("default")
    if not isinstance(template, str | None):
        raise UserError(f"{directory}/tokenizer_config.json: chat_template must be a string; copy the file again.")
    return template


def _read_json(file: Path) -> dict[str, Any]:
    """Returns the file's JSON object; {} if there is no such file."""
    return read_json(file, fix="copy it again from the checkpoint") if os.path.lexists(file) else {}
