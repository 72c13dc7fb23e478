"""A Jinja sandbox that always terminates: it limits the steps, the time and the size of each value of a template."""

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

STEPS = 1_000_000  # loop iterations; a call costs CALL steps
CALL = 4
SECONDS = 8.0  # stops slow single steps; only the limit on steps has the same result on every rank
LARGEST = 50_000_000  # code points of a text, elements of a list
LARGEST_NUMBER = 10_000  # bits
GROWING = ("center", "format", "indent", "join", "list", "replace", "tojson", "wordwrap")  # filters

_left: ContextVar[list[float]] = ContextVar("left")  # steps left, and the deadline in time.monotonic()


class TooMuch(SecurityError):
    """A template exceeds a limit."""


@contextmanager
def limited() -> Iterator[None]:
    """Limits everything that is rendered inside this context, taken together, to STEPS steps and SECONDS seconds."""
    token = _left.set([STEPS, time.monotonic() + SECONDS])
    try:
        yield
    finally:
        _left.reset(token)


def whole(pieces: Iterable[str]) -> str:
    """Joins the pieces of a rendered text. Raises TooMuch if it is longer than LARGEST code points."""
    found, size = [], 0
    for piece in pieces:
        found.append(piece)
        size = _fits(size + len(piece))
    return "".join(found)


def _step(cost: int = 1) -> None:
    left = _left.get()
    left[0] -= cost
    if left[0] < 0:
        raise TooMuch(f"it takes more than {STEPS:,} steps")
    if left[0] % 1000 < cost and time.monotonic() > left[1]:
        raise TooMuch(f"it takes more than {SECONDS:g} s")


def _fits(size: int) -> int:
    if size > LARGEST:
        raise TooMuch(f"it makes a value of more than {LARGEST:,} characters or elements")
    return size


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that counts loop iterations and calls as steps, and limits the size of values.

    A template that exceeds a limit raises TooMuch. Templates must be rendered inside `limited`.
    """

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.filters["_counted"], self.filters["_bounded"] = _counted, _bounded
        for name in GROWING:
            self.filters[name] = _growing(name, self.filters[name])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
        for place in list(tree.find_all(nodes.Node)):
            for field, value in list(place.iter_fields()):
                if isinstance(value, nodes.Concat):
                    setattr(place, field, _as_bounded(value))
                elif isinstance(value, list):
                    value[:] = [_as_bounded(each) if isinstance(each, nodes.Concat) else each for each in value]
        tree.set_environment(self)
        return tree

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # as jinja2 names them
        """Calls an object of the template, as jinja2 does. Raises TooMuch if it exceeds a limit."""
        _step(CALL)
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps str.format
        if isinstance(own := getattr(method, "__self__", None), str):
            _check_growth(method.__name__, [own, *args, *kwargs.values()])
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Evaluates one of `intercepted_binops`, as jinja2 does. Raises TooMuch if its result exceeds a limit."""
        if operator == "**" and not (isinstance(left, int | float) and isinstance(right, int | float) and right <= 64):
            raise TooMuch("it raises a number to a power above 64")
        if operator == "*" and hasattr(left, "__len__") ^ hasattr(right, "__len__"):
            many, times = (left, right) if hasattr(left, "__len__") else (right, left)
            _fits(len(many) * int(times))
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _fits(len(left) + len(right))
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > LARGEST_NUMBER:
            raise TooMuch(f"it makes a number of more than {LARGEST_NUMBER:,} bits")
        return result


def _as_bounded(value: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, "_bounded", [], [], None, None, lineno=value.lineno)


@pass_context  # so that jinja2 does not evaluate the filter while it compiles the template
def _counted(context: Any, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _step()
        yield value


@pass_context
def _bounded(context: Any, text: str) -> str:
    _fits(len(text))
    return text


def _growing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _step(CALL)
        given = [each for each in args if not isinstance(each, jinja2.Environment | nodes.EvalContext)]
        _check_growth(name, [*given, *kwargs.values()])
        return function(*args, **kwargs)

    return checked


def _check_growth(name: str, given: list[Any]) -> None:
    """Raises TooMuch if a call would make too large a result from small arguments. given: the arguments; for a method,
    its own text comes first."""
    texts = [each for each in given if isinstance(each, str)]
    if name == "replace" and len(texts) > 2:
        _fits(len(texts[0]) + texts[0].count(texts[1]) * len(texts[2]))
    elif name == "join" and texts:
        _fits(sum(len(each) * len(texts[0]) for each in given if isinstance(each, list | tuple | range)))
    elif name in ("format", "format_map") and texts:
        _check_format(texts[0])
    for each in given:
        if isinstance(each, int):  # a width
            _fits(abs(each))


def _check_format(text: str) -> None:
    if re.search(r"[%{:][^a-zA-Z%}]{0,20}(\d{6}|\*)", text):
        raise TooMuch("it formats to a width of six digits or more")
