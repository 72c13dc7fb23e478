"""Renders messages to text through a tokenizer's chat template, with the same result as transformers.

Templates run in a sandbox; no code of transformers is used.
"""

import json
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache, partial
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols

from train.data.limits import LimitedEnvironment, limited, whole
from train.runtime.errors import UserError

TEMPLATE_TIME = datetime(2026, 1, 1)  # the time that templates get, the same on every rank and in every run

Render = Callable[..., str]
"""(messages, tools or None) -> the chat as the template renders it."""


def template_time(text: str) -> datetime:
    """Returns the time that --template-time gives. Raises UserError if it is not an ISO 8601 time."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise UserError(
            f"--template-time {text}: is not an ISO 8601 time; give one such as {TEMPLATE_TIME.isoformat()}."
        ) from None


def template_renderer(
    template: str | None, special_tokens: dict[str, str], directory: str, moment: datetime = TEMPLATE_TIME
) -> Render:
    """Returns a function that renders messages, and tools, through a chat template as transformers does, in a sandbox
    and without transformers' code. It raises UserError if there is no template or the template fails.

    directory: named in error messages. moment: the time that a template gets if it asks for it.
    """
    return partial(_render, template, tuple(special_tokens.items()), directory, moment)


def _render(
    template: str | None,
    special_tokens: tuple[tuple[str, str], ...],
    directory: str,
    moment: datetime,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
) -> str:
    if template is None:
        raise UserError(
            f"--model {directory}: no chat template (chat_template.jinja), which documents with messages need"
        )
    try:
        with limited():
            return whole(_compiled(template).generate(
                messages=messages, tools=tools, documents=None, add_generation_prompt=False,
                strftime_now=moment.strftime, **dict(special_tokens),
            ))  # fmt: skip
    except Exception as error:  # a template can raise anything: by raise_exception, or e.g. a TypeError
        raise UserError(f"the chat template of {directory} fails on these messages ({error})") from None


@lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    del environment.filters["random"], environment.globals["lipsum"]  # every rank and run must render the same text
    return environment.from_string(template)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _GenerationTag(Extension):
    """The {% generation %} tag, with which some templates mark the assistant's text. Only its content is rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
