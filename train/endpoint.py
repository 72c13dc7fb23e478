"""Asks a model behind an OpenAI-compatible endpoint, with retries, and checks the endpoint before anything is spent.

There are two kinds of failure. `NoAnswer`: this request failed, but others may succeed; its row records the error.
`EndpointStopped`: no request can succeed, so the run ends; what was measured is kept, and the same command continues. A
connection that breaks after it was established is of the first kind, because busy servers and proxies reset some.

The API key comes only from the environment, and no message contains it.
"""

import asyncio
import ipaddress
import random
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai
from tqdm import tqdm

from train.claims.messages import Messages
from train.runtime.errors import MayPass, UserError
from train.runtime.keys import key_of, masked, secrets_of_url, shown_url, values_of, without_keys
from train.runtime.shown import shown
from train.runtime.similar import similar
from train.runtime.text_formats import SURROGATE

T = TypeVar("T")
RETRIED = (408, 409, 425, 429)  # HTTP statuses; all from 500 on are retried too
LONGEST_PAUSE = 60.0  # seconds between retries, unless a server asks for more in Retry-After
LONGEST_ASKED = 600.0  # seconds of waiting at most, whatever a server's Retry-After asks for
CHECK_RETRIES = 2
LISTING = 30.0  # seconds at most for a list of models, which costs a server nothing
BEAT = 5.0  # seconds after which a progress bar without progress is drawn again
# What the client raises for a response that nests thousands of levels deep, has a number of thousands of digits, or has
# an unexpected form.
UNREAD = (ValueError, RecursionError, TypeError, AttributeError, LookupError)
PASSING = (408, 425, 429, 502, 503, 504)  # HTTP: what may pass by itself
NO_KEY = "none"  # local servers need no key, but the client insists on one
PROBE: Messages = [{"role": "user", "content": "Say yes."}]


class NoAnswer(Exception):
    """One request has no answer, for the reason in the message. slow: it exceeded its time limit. passing: the reason
    may pass, such as a server that is busy."""

    def __init__(self, message: str, slow: bool = False, passing: bool = False):
        super().__init__(message)
        self.slow, self.passing = slow, passing


class EndpointStopped(UserError):
    """No request can succeed. why: unreachable, key, quota, or missing (HTTP 404). A server that cannot be reached may
    come back, so that job scripts try again."""

    def __init__(self, message: str, why: str):
        super().__init__(message)
        self.why = why
        self.code = MayPass.code if why == "unreachable" else UserError.code


class _Late(Exception):
    """A response that is not complete within its time limit; the message gives the limit."""


class _Rubbish(Exception):
    """A response that is not a chat completion, or not a list of models where one was asked for."""


@dataclass(frozen=True)
class EndpointSettings:
    """Where a model is served and how it is asked."""

    url: str
    model: str
    concurrency: int = 8  # requests in flight at once
    timeout: float = 600.0  # seconds for one request
    retries: int = 8  # after the first attempt
    pause: float = 0.5  # seconds before the first retry; doubles with each further one; times a random 1/2 to 1
    top_p: float | None = None  # None: the server's default
    body: dict[str, Any] | None = None  # further keys of each request, such as chat_template_kwargs
    flag: str = "--endpoint"  # the setting that messages name
    key_variables: tuple[str, ...] = ("OPENAI_API_KEY",)  # environment variables; the first that is set has the key


class Endpoint:
    """A served model that answers chats, several at once. Safe to use from several threads. The constructor raises
    UserError for invalid settings, or for a key that cannot be sent."""

    batch_size = 1  # chats for one call of answers(), so that each answer is kept the moment it exists

    def __init__(self, settings: EndpointSettings):
        self.settings, self.concurrency = settings, settings.concurrency
        self._check_settings()
        self._secrets = [*secrets_of_url(settings.url), *values_of(settings.body)]
        self.key_variable, key = key_of(settings.key_variables)
        self._limit = "max_tokens"  # newer OpenAI models require max_completion_tokens; other servers know only this
        self.stop = threading.Event()  # once set, no thread waits for a retry any more
        try:
            direct = openai.DefaultAsyncHttpxClient(trust_env=False) if is_loopback(settings.url) else None
            self._client = openai.AsyncOpenAI(
                base_url=settings.url, api_key=key or NO_KEY, timeout=None, max_retries=0, http_client=direct
            )
        except (openai.OpenAIError, ValueError) as error:
            raise UserError(f"{self.name}: {self._clean(error)}.") from None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="requests").start()

    def _check_settings(self) -> None:
        s = self.settings
        if not _is_url(s.url):
            raise UserError(
                f"{s.flag} {shown_url(s.url)!r}: must be the base URL of a server, such as http://localhost:8000/v1."
            )
        for name, least in (("concurrency", 1), ("timeout", 0.001), ("retries", 0)):
            if not getattr(s, name) >= least:
                raise UserError(f"{s.flag} {name} {getattr(s, name)}: must be at least {least}.")
        if not s.model:
            raise UserError(f"{s.flag}-model: is missing; give the name under which the server knows the model.")

    @property
    def name(self) -> str:
        """The endpoint's name in messages."""
        return f"{self.settings.flag} {shown_url(self.settings.url)}"

    def answers(self, chats: Sequence[Messages], max_tokens: int, temperature: float, seed: int) -> list[str]:
        """Returns the answer to each chat, in order; chat i is sampled with seed + i. Raises NoAnswer if a chat has no
        answer, EndpointStopped if no request can succeed."""
        if len(chats) == 1:
            return [self.complete(chats[0], max_tokens, temperature, seed)]
        with ThreadPoolExecutor(self.concurrency) as pool:
            jobs = [pool.submit(self.complete, c, max_tokens, temperature, seed + i) for i, c in enumerate(chats)]
            return [job.result() for job in jobs]

    def complete(self, messages: Messages, max_tokens: int, temperature: float, seed: int) -> str:
        """Returns the text that the model answers; "" if it answers nothing. Raises NoAnswer if this request fails,
        EndpointStopped if no request can succeed."""

        given: dict[str, Any] = {"temperature": temperature, "seed": seed}
        if self.settings.top_p is not None:
            given["top_p"] = self.settings.top_p
        return self._retried(lambda: self._ask(messages, max_tokens, given), self.settings.retries)

    def _ask(self, messages: Messages, max_tokens: int, given: dict[str, Any]) -> str:
        """Makes one attempt, and returns the answer without any API keys in it."""
        limit = {self._limit: max_tokens}
        try:
            create: Any = self._client.chat.completions.create
            more = self.settings.body
            request = create(model=self.settings.model, messages=messages, extra_body=more, **limit, **given)
            answer = _text(self._in_time(request, self.settings.timeout))
        except openai.BadRequestError as error:
            if "max_tokens" not in limit or "max_completion_tokens" not in str(error):
                raise
            self._limit = "max_completion_tokens"
            return self._ask(messages, max_tokens, given)
        return without_keys(SURROGATE.sub("\ufffd", answer), *self._secrets)

    def complete_text(self, read: Callable[[Any], T], **request: Any) -> T:
        """Returns what `read` makes of the log-probabilities of a text that the server continues by one token. Raises
        NoAnswer if this request fails, EndpointStopped if none can succeed."""

        def ask() -> T:
            create: Any = self._client.completions.create
            asked = create(max_tokens=1, temperature=0, logprobs=1, **request)
            return read(self._in_time(asked, self.settings.timeout).choices[0].logprobs)

        return self._retried(ask, CHECK_RETRIES)

    def _in_time(self, request: Awaitable[T], seconds: float) -> T:
        """Returns the result of a request. Cancels it and raises _Late if it takes longer than `seconds`. The client's
        own limit applies to each wait for some bytes, and a server may send them one at a time."""

        async def limited() -> T:
            async with asyncio.timeout(seconds):
                return await request

        try:
            return asyncio.run_coroutine_threadsafe(limited(), self._loop).result()
        except TimeoutError:
            raise _Late(f"no answer within {seconds:g} s") from None

    def _retried(self, ask: Callable[[], T], retries: int) -> T:
        """Returns the result of `ask`, which is retried where that may help. Raises NoAnswer or EndpointStopped."""
        for attempt in range(retries + 1):
            try:
                return ask()
            except (openai.OpenAIError, _Late, _Rubbish, *UNREAD) as error:
                pause = self._pause_before_retry(error, attempt)
                if attempt < retries:
                    again = f"attempt {attempt + 2} of {retries + 1} in {pause:.0f} s"
                    tqdm.write(f"{self.name}: {self._said(error)}; {again}", file=sys.stderr)
                if attempt == retries or self.stop.wait(pause):
                    raise self._given_up(error, attempt + 1) from None
        raise AssertionError

    def _pause_before_retry(self, error: Exception, attempt: int) -> float:
        """Returns the seconds to wait. Raises NoAnswer or EndpointStopped if another attempt cannot help."""
        pause = min(LONGEST_PAUSE, self.settings.pause * 2.0**attempt) * random.uniform(0.5, 1)
        if not isinstance(error, openai.APIStatusError):
            return pause
        status = error.status_code
        if status in (401, 403):
            raise EndpointStopped(self._key_problem(status), "key") from None
        if status == 404 or error.code == "insufficient_quota":
            why = "missing" if status == 404 else "quota"
            raise EndpointStopped(f"{self.name}: {self._said(error)}.", why) from None
        if status not in RETRIED and status < 500:
            raise NoAnswer(self._said(error)) from None
        return max(pause, min(LONGEST_ASKED, retry_after(error)))

    def _given_up(self, error: Exception, attempts: int) -> Exception:
        times = f"after {attempts} attempt{'s' if attempts > 1 else ''}"
        if type(error.__cause__).__name__ == "ConnectError":  # httpx's or, in newer clients, httpx2's
            stopped = EndpointStopped(f"{self.name}: cannot be reached ({self._said(error)}), {times}.", "unreachable")
            stopped.code = UserError.code if _is_unknown_host(error) else stopped.code
            return stopped
        passing = isinstance(error, (_Late, openai.APIConnectionError)) or (
            isinstance(error, openai.APIStatusError) and error.status_code in PASSING
        )
        return NoAnswer(f"{self._said(error)}, {times}", slow=isinstance(error, _Late), passing=passing)

    # The texts of errors. A server's own words may quote the key.

    def _said(self, error: Exception) -> str:
        if isinstance(error, _Late):
            return str(error)
        if isinstance(error, openai.APIConnectionError):
            return self._clean(error.__cause__ or error)
        if isinstance(error, openai.APIStatusError):
            return f"HTTP {error.status_code}: {self._clean(_message(error))}"
        return f"its response is not a chat completion: {self._clean(error)}"

    def _clean(self, error: object) -> str:
        """Returns a text as a message may show it: in one line, shortened, and without anything that may be a key."""
        text = masked(str(error), *self._secrets)
        text = " ".join(shown(text).split())
        return (text if len(text) <= 300 else text[:300] + " …").rstrip(".") or "no message"

    def _key_problem(self, status: int) -> str:
        wanted = " or ".join(self.settings.key_variables)
        if self.key_variable is None:
            return f"{self.name}: HTTP {status}: requires a key, and {wanted} is not set. Set it in the environment."
        return f"{self.name}: HTTP {status}: refuses the key in {self.key_variable}. Set the right one there."

    # The check before anything is spent.

    def check(self) -> None:
        """Raises UserError if the server cannot be reached, requires another key or does not serve the model. If the
        server does not list the model, it is asked for a few tokens of it, because not every server lists what it
        serves."""
        models: list[str] = []
        try:
            models = self._retried(self._models, CHECK_RETRIES)
        except (EndpointStopped, NoAnswer) as error:  # a server need not have a list
            self._raise_if_no_server(error)
        if self.settings.model in models:
            return
        tqdm.write(
            f"{self.name}: does not list {self.settings.model!r}; requesting a few tokens from it, for "
            f"{self.settings.timeout:g} s at most", file=sys.stderr,
        )  # fmt: skip
        try:
            self._retried(lambda: self._ask(PROBE, 16, {}), CHECK_RETRIES)
        except (EndpointStopped, NoAnswer) as error:
            self._raise_if_no_server(error)
            raise self._unknown(error, models) from None

    def _models(self) -> list[str]:
        found = self._in_time(self._client.models.list(), min(LISTING, self.settings.timeout))
        data = getattr(found, "data", None)
        if not isinstance(data, list):
            raise _Rubbish("not a list of models")
        return [model.id for model in data if isinstance(getattr(model, "id", None), str)]

    def _raise_if_no_server(self, error: EndpointStopped | NoAnswer) -> None:
        flag = self.settings.flag
        if isinstance(error, EndpointStopped) and error.why == "unreachable":
            kind = MayPass if error.code == MayPass.code else UserError
            raise kind(f"{error} Start the server, or correct {flag}.") from None
        if isinstance(error, EndpointStopped) and error.why != "missing":
            raise error
        if isinstance(error, NoAnswer) and error.slow:
            fix = f" Else raise {flag}-timeout." if self.settings.timeout < LISTING else " Start it again."
            raise MayPass(f"{self.name}: {error}. Is it still starting, or busy?{fix}") from None

    def _unknown(self, error: EndpointStopped | NoAnswer, models: list[str]) -> UserError:
        said = str(error).removeprefix(f"{self.name}: ").rstrip(".")
        text = f"{self.settings.flag}-model {self.settings.model!r}: {self.name} does not serve it ({said})."
        if models:
            near = similar(self.settings.model, models)
            listed = self._clean(", ".join(models[:20]) + (", …" if len(models) > 20 else ""))
            return UserError(
                f"{text} " + (f"Did you mean {self._clean(near)}? " if near else "") + f"It has: {listed}."
            )
        if isinstance(error, EndpointStopped):
            return UserError(f"{text} Correct the name, or the URL: a base URL mostly ends in /v1.")
        return UserError(f"{text} It lists no models; give the name that it was started with.")


def ended(calls: Collection[Future[T]], bar: Any) -> set[Future[T]]:
    """Waits until at least one of the calls has ended, and returns all that have. While it waits, it keeps the bar's
    clock running."""
    while not (done := wait(calls, timeout=BEAT, return_when=FIRST_COMPLETED).done):
        bar.refresh()
    return done


def _is_unknown_host(error: BaseException | None) -> bool:
    """Whether a connection failed since there is no such host, which waiting does not mend."""
    while error is not None:
        if isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME:
            return True
        error = error.__cause__ or error.__context__
    return False


def is_loopback(url: str) -> bool:
    """Whether a URL is of this machine itself. Requests to it must not go through the proxy that the environment
    names, which clusters do without excepting it."""
    host = urlsplit(url).hostname or ""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return (
            parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0 and url.isprintable()
        )
    except ValueError:  # an unmatched bracket, an invalid port
        return False


def _text(response: Any) -> str:
    """Returns the text of the first choice. Raises _Rubbish if there is none: a server may send anything, and the
    client passes it on as it is."""
    if isinstance(response, str):
        raise _Rubbish(response[:200] or "an empty body")
    if (error := getattr(response, "error", None)) is not None:  # some proxies send it with status 200
        raise _Rubbish(str(error))
    choices = getattr(response, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise _Rubbish("no choices")
    message = getattr(choices[0], "message", None)
    content = getattr(message, "content", None)
    if message is None or not isinstance(content, str | None):
        raise _Rubbish("a choice without a message")
    return content or ""


def _message(error: openai.APIStatusError) -> str:
    body = error.body
    if isinstance(body, dict):
        for key in ("message", "detail", "error"):
            if isinstance(value := body.get(key), str):
                return value
    return str(body or error.response.text or error.response.reason_phrase)


def retry_after(error: openai.APIStatusError) -> float:
    """Returns the seconds that the server asks to wait, from its Retry-After header; 0 if it does not say."""
    said = error.response.headers.get("retry-after", "0")
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except ValueError:
        return 0.0
