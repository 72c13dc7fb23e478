"""Reads JSON and YAML, and writes JSON. A key that is given twice is an error when reading; other readers silently keep
the last one. JSON is written strictly (RFC 8259), without NaN and Infinity."""

import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any

import yaml

SURROGATE = re.compile("[\ud800-\udfff]")


def json_line(value: Any, indent: int | None = None) -> str:
    """Returns a value as JSON text. Non-ASCII characters are kept, unless one is a lone surrogate, which UTF-8 cannot
    encode: then all of them are escaped. A non-finite number, which JSON cannot express, becomes null."""
    try:
        text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    except ValueError:
        return json_line(strict(value), indent)
    return text if not SURROGATE.search(text) else json.dumps(value, indent=indent)


def strict(value: Any) -> Any:
    """Returns the value with everything replaced that JSON cannot express. Non-finite numbers and bytes become None;
    other objects, such as dates, become their text. Keys become text as well."""
    if isinstance(value, dict):
        return {str(key): strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return None if isinstance(value, bytes) else str(value)


class Unreadable(ValueError):
    """A text is not valid JSON or YAML, or not a valid regular expression. The message gives the reason and the fix.
    line: its line, from 1; 0 if unknown."""

    def __init__(self, message: str, line: int = 0):
        super().__init__(message)
        self.line = line


def parse_json(text: str, strictly: bool = False) -> Any:
    """Returns the value of a JSON text. Raises Unreadable if the text is not valid JSON, gives a key of an object
    twice, or nests deeper than DEEPEST. strictly: also refuse lone surrogates, and NaN and Infinity, which Python
    accepts."""
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_refused if strictly else None)
    except Unreadable:
        raise
    except RecursionError:
        raise Unreadable(TOO_DEEP) from None
    except ValueError as error:
        what = LONG_NUMBER if "integer string conversion" in str(error) else f"not valid JSON ({error})"
        raise Unreadable(
            what if what == LONG_NUMBER else f"{what}; {'fix it' if strictly else 'give one object per line'}"
        ) from None
    if text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST:
        raise Unreadable(TOO_DEEP)
    if strictly and "\\u" in text and any(SURROGATE.search(each) for each in _strings(value)):
        raise Unreadable(HALF)
    return value


DEEPEST = 100  # levels of lists and objects
EXPANDED = 1_000_000  # most values of a YAML file with all aliases expanded
LONGEST_NUMBER = 4300  # digits, the limit of Python's int()
TOO_DEEP = f"nests deeper than {DEEPEST} levels; write it flat"
LONG_NUMBER = f"has a number of more than {LONGEST_NUMBER} digits; write it as a string"
HALF = "has half a surrogate pair, which is not a character; write the complete character"


def _refused(constant: str) -> None:
    raise Unreadable(f"has {constant}, which is not valid JSON; write null or a number")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= DEEPEST:
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        depth, level = depth + 1, [each for values in inner for each in values]
    return depth


def _strings(value: Any) -> Iterator[str]:
    """Yields all strings in a value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value:
            yield from _strings(each)
            if isinstance(value, dict):
                yield from _strings(value[each])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        counted = Counter(key for key, _ in pairs)
        twice = next(key for key in counted if counted[key] > 1)
        raise Unreadable(f"the key {json.dumps(twice)} is given twice; keep one of the two")
    return row


def parse_yaml(text: str, lines: dict[tuple[str, ...], int] | None = None) -> Any:
    """Returns the value of a YAML text in the safe subset; None for an empty text. Raises Unreadable if the text is not
    valid, gives a key of a mapping twice, nests deeper than DEEPEST, or has more than EXPANDED values with all aliases
    expanded. lines: receives the line of each value, from 1, by the keys on the way to it."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measured(node, {}, 0)
        if lines is not None:
            lines.update(_lines(node))
        return loader.construct_document(node)
    except Unreadable:
        raise
    except RecursionError:
        raise Unreadable(TOO_DEEP) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        fix = "put a text with ? , : { or } between { } in quotes" if "got '?'" in problem else "fix that line"
        raise Unreadable(f"not valid YAML ({problem}); {fix}", mark.line + 1 if mark else 0) from None
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:  # PyYAML, for single values
        raise Unreadable(f"has an invalid date, number or tag ({error}); put it in quotes") from None


def _lines(node: yaml.Node, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(key, yaml.ScalarNode):
            yield (*above, key.value), key.start_mark.line + 1
            yield from _lines(value, (*above, key.value))


def _measured(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """Returns the number of values in a node with all aliases expanded. sizes: of the nodes seen so far, by id; 0 while
    a node is being measured, which detects an alias to a node that contains it."""
    if depth > DEEPEST:
        raise Unreadable(TOO_DEEP, node.start_mark.line + 1)
    if (known := sizes.get(id(node))) is not None:
        if not known:
            raise Unreadable("holds itself by an alias; write the value out", node.start_mark.line + 1)
        return known
    sizes[id(node)] = 0
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        inner = [each for pair in node.value for each in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif SURROGATE.search(node.value):
        raise Unreadable(HALF, node.start_mark.line + 1)
    elif len(node.value) > LONGEST_NUMBER and node.tag.endswith((":int", ":float")):
        raise Unreadable(LONG_NUMBER, node.start_mark.line + 1)
    sizes[id(node)] = size = 1 + sum(_measured(each, sizes, depth + 1) for each in inner)
    if size > EXPANDED:
        raise Unreadable(
            f"stands for more than {EXPANDED:,} values by its aliases; write it out", node.start_mark.line + 1
        )
    return size


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen |= {key} if isinstance(key, Hashable) else set()
        return super().construct_mapping(node, deep)
