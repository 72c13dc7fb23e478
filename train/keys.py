"""Keys of servers: taken from the environment alone, and shown by no message, however a server echoes them."""

import base64
import html
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote, quote_plus, unquote

from train.errors import UserError

KEY_VARIABLES = ("JUDGE_API_KEY", "OPENAI_API_KEY", "WANDB_API_KEY", "HF_TOKEN")  # all that hold one
HIDDEN = "…"
SHORT = 8  # characters; shorter values are masked only as whole words
CERTAIN = 16  # characters; a key that long is none by chance
IN_A_HEADER = re.compile(r"[!-~]+")  # what HTTP's header of a key can hold


def key_of(variables: Iterable[str]) -> tuple[str | None, str]:
    """The first of the variables that is set, and its key; (None, ""). UserError, which does not show the key, where it
    cannot be sent."""
    for name in variables:
        if key := os.environ.get(name):
            if not IN_A_HEADER.fullmatch(key):
                raise UserError(
                    f"{name}: has white space (a line break at its end?), control or non-ASCII characters, as no key "
                    f'has. Set it without them: export {name}="$(printf %s "${name}" | tr -d "[:space:]")"'
                )
            return name, key
    return None, ""


def masked(text: str, *more: str) -> str:
    """The text without the environment's keys and `more` secrets, plain or in one of the forms in which a server may
    write them back, and without what a URL holds of user and password."""
    text = _without(text, [*_keys(), *more])
    text = re.sub(r"\bsk-\S+", HIDDEN, text)  # OpenAI quotes parts of a wrong key
    return re.sub(r"(?<=://)[^\s/]*@", f"{HIDDEN}@", text)


def without_keys(text: str, *more: str) -> str:
    """An answer without the environment's keys and those of `more` that may be one, where they are long enough not to
    be words."""
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
            if part in text:  # the bounds: in a long run without one, every start would be tried
                text = re.sub(rf"[\w+/=-]{{0,300}}{re.escape(part)}[\w+/=-]{{0,300}}", HIDDEN, text)
    return text


def _forms(secret: str) -> set[str]:
    """A secret as it is, and escaped for URLs, JSON, HTML and Python."""
    plain = {secret, secret.strip()}
    in_json = {json.dumps(each)[1:-1] for each in plain}
    in_urls = {way(each, safe=safe) for each in plain for way in (quote, quote_plus) for safe in ("", "/")}
    every = {"".join(f"%{byte:02X}" for byte in secret.encode("utf-8", "replace"))}
    slashes = {each.replace("/", "\\/") for each in in_json}
    found = plain | in_json | slashes | in_urls | every | {html.escape(secret), repr(secret)[1:-1]}
    found.add(base64.b64encode(secret.encode("utf-8", "replace")).decode())
    return found | {json.dumps(each)[1:-1] for each in in_json}  # JSON that stands in a string of JSON


def _in_base64(secret: str) -> Iterator[str]:
    """What of a secret stands in the base64 of any text that holds it, wherever it begins there."""
    data = secret.encode("utf-8", "replace")
    for before in range(3):
        text = base64.b64encode(b"\0" * before + data).decode().rstrip("=")
        inner = text[-(-before * 4 // 3) : len(text) - (1 if (before + len(data)) % 3 else 0)]
        if len(inner) >= SHORT - 2:
            yield inner
            yield inner.translate(str.maketrans("+/", "-_"))


def shown_url(url: str) -> str:
    """A URL without what it may hold of a user, a password or a key."""
    bare = re.split(r"[?#]", url, maxsplit=1)[0]
    scheme, separator, rest = bare.rpartition("://")
    return scheme.rpartition("@")[2] + separator + rest.rpartition("@")[2]


def secrets_of_url(url: str) -> list[str]:
    """User and password of a URL, together and the password alone, and the values of its query."""
    rest, _, query = url.partition("?")
    userinfo = rest.partition("://")[2].rpartition("@")[0]
    found = [userinfo, userinfo.partition(":")[2], *(pair.partition("=")[2] for pair in query.split("&"))]
    return [form for each in found if each for form in (each, unquote(each))]


def values_of(body: Any) -> Iterator[str]:
    """All strings and numbers in a request's further keys, any of which may be a key for the server."""
    if isinstance(body, dict | list):
        for each in body.values() if isinstance(body, dict) else body:
            yield from values_of(each)
    elif isinstance(body, str | int | float) and not isinstance(body, bool) and str(body).strip():
        yield str(body)


def wandb_status(error: BaseException) -> str:
    """Of an error of W&B or its client, whose words may quote the key, the HTTP status, or the system's own reason."""
    if found := re.search(r"(?:HTTP|status|code|error)\D{0,5}([45]\d\d)\b", str(error), re.IGNORECASE):
        return f"HTTP {found[1]}"
    reason = getattr(error, "reason", error)
    return getattr(reason, "strerror", None) or type(reason if isinstance(reason, Exception) else error).__name__
