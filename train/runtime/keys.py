"""Handles API keys of servers. They come from environment variables only, and no message shows them, even if a server
echoes them in another encoding."""

import base64
import html
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote, quote_plus, unquote

from train.runtime.errors import UserError

KEY_VARIABLES = ("JUDGE_API_KEY", "OPENAI_API_KEY", "WANDB_API_KEY", "HF_TOKEN")  # all variables that hold a key
HIDDEN = "…"
SHORT = 8  # characters; shorter values are masked only as whole words
CERTAIN = 16  # characters; a string that long does not equal a key by chance
IN_A_HEADER = re.compile(r"[!-~]+")  # the characters that an HTTP header with a key can hold


def key_of(variables: Iterable[str]) -> tuple[str | None, str]:
    """Returns the name of the first environment variable that is set, and its key; (None, "") if none is set. Raises
    UserError, without showing the key, if an HTTP header cannot hold the key."""
    for name in variables:
        if key := os.environ.get(name):
            if not IN_A_HEADER.fullmatch(key):
                raise UserError(
                    f"{name}: has white space (a line break at its end?), control or non-ASCII characters; a key has "
                    f'none. Set it without them: export {name}="$(printf %s "${name}" | tr -d "[:space:]")"'
                )
            return name, key
    return None, ""


def masked(text: str, *more: str) -> str:
    """Returns the text with all secrets replaced by HIDDEN, for error messages. Secrets are the keys in the
    environment, those in `more`, and user and password in URLs. Finds them plain and in the encodings in which a server
    may echo them."""
    text = _without(text, [*_keys(), *more])
    text = re.sub(r"\bsk-\S+", HIDDEN, text)  # OpenAI quotes parts of a wrong key
    return re.sub(r"(?<=://)[^\s/]*@", f"{HIDDEN}@", text)


def without_keys(text: str, *more: str) -> str:
    """Returns an answer of a model with keys replaced by HIDDEN: those in the environment, and those strings of `more`
    that may be keys. Leaves strings shorter than CERTAIN alone, since they may be words of the answer."""
    found = [*_keys(), *filter(IN_A_HEADER.fullmatch, more)]
    return _without(text, [key for key in found if len(key) >= CERTAIN])


def _keys() -> list[str]:
    return [os.environ.get(name, "").strip() for name in KEY_VARIABLES]


def _without(text: str, secrets: list[str]) -> str:
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        for form in sorted(_forms(secret), key=len, reverse=True):
            apart = (r"(?<!\w)", r"(?!\w)") if len(form) < SHORT else ("", "")
            text = re.sub(re.escape(form).join(apart), HIDDEN, text, flags=re.IGNORECASE if "%" in form else 0)
        for part in _in_base64(secret):
            if part in text:  # the bounds of 300: a long run of such characters would take quadratic time without them
                text = re.sub(rf"[\w+/=-]{{0,300}}{re.escape(part)}[\w+/=-]{{0,300}}", HIDDEN, text)
    return text


def _forms(secret: str) -> set[str]:
    """Returns a secret as it is, escaped for URLs, JSON, HTML and Python, and in base64."""
    plain = {secret, secret.strip()}
    in_json = {json.dumps(each)[1:-1] for each in plain}
    in_urls = {way(each, safe=safe) for each in plain for way in (quote, quote_plus) for safe in ("", "/")}
    every = {"".join(f"%{byte:02X}" for byte in secret.encode("utf-8", "replace"))}
    slashes = {each.replace("/", "\\/") for each in in_json}
    found = plain | in_json | slashes | in_urls | every | {html.escape(secret), repr(secret)[1:-1]}
    found.add(base64.b64encode(secret.encode("utf-8", "replace")).decode())
    return found | {json.dumps(each)[1:-1] for each in in_json}  # JSON inside a JSON string


def _in_base64(secret: str) -> Iterator[str]:
    """Yields strings, one of which occurs in the base64 of any text that contains the secret. Which one depends on the
    offset of the secret in the text, modulo 3 bytes."""
    data = secret.encode("utf-8", "replace")
    for before in range(3):
        text = base64.b64encode(b"\0" * before + data).decode().rstrip("=")
        inner = text[-(-before * 4 // 3) : len(text) - (1 if (before + len(data)) % 3 else 0)]
        if len(inner) >= SHORT - 2:
            yield inner
            yield inner.translate(str.maketrans("+/", "-_"))


def shown_url(url: str) -> str:
    """Returns a URL without the parts that may hold a user, a password or a key: its user info, query and fragment."""
    bare = re.split(r"[?#]", url, maxsplit=1)[0]
    scheme, separator, rest = bare.rpartition("://")
    return scheme.rpartition("@")[2] + separator + rest.rpartition("@")[2]


def secrets_of_url(url: str) -> list[str]:
    """Returns the possible secrets of a URL: its user info, the password alone and the values of its query, each as it
    is and percent-decoded."""
    rest, _, query = url.partition("?")
    userinfo = rest.partition("://")[2].rpartition("@")[0]
    found = [userinfo, userinfo.partition(":")[2], *(pair.partition("=")[2] for pair in query.split("&"))]
    return [form for each in found if each for form in (each, unquote(each))]


def values_of(body: Any) -> Iterator[str]:
    """Yields all strings and numbers in the additional fields of a request as strings, at any depth. Each of them may
    be a key for the server. Skips keys of objects, booleans and blank strings."""
    if isinstance(body, dict | list):
        for each in body.values() if isinstance(body, dict) else body:
            yield from values_of(each)
    elif isinstance(body, str | int | float) and not isinstance(body, bool) and str(body).strip():
        yield str(body)


def wandb_status(error: BaseException) -> str:
    """Returns a short reason for an error of W&B or its client: the HTTP status, else the reason of the operating
    system, else the name of the exception. Its own message is not shown, because it may quote the key."""
    if found := re.search(r"(?:HTTP|status|code|error)\D{0,5}([45]\d\d)\b", str(error), re.IGNORECASE):
        return f"HTTP {found[1]}"
    reason = getattr(error, "reason", error)
    return getattr(reason, "strerror", None) or type(reason if isinstance(reason, Exception) else error).__name__
