"""JSON and YAML as they are read and written here. Read: no key twice, of which other readers keep the last in silence.
Written: strict JSON (RFC 8259), without NaN and Infinity."""

import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any

import yaml

SURROGATE = re.compile("[\ud800-\udfff]")


def json_line(value: Any, indent: int | None = None) -> str:
    """Letters as they are; escaped where one is half a surrogate pair, which UTF-8 cannot hold. A number that is not
    finite, which JSON cannot say, is null."""
    try:
        text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    except ValueError:
        return json_line(strict(value), indent)
    return text if not SURROGATE.search(text) else json.dumps(value, indent=indent)


def strict(value: Any) -> Any:
    """The value with null for what JSON cannot say: numbers that are not finite, and bytes; other objects, such as
    dates, as text."""
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
    """Why a text is no JSON or YAML, or no regular expression, with the fix. line: where, from 1; 0 if unknown."""

    def __init__(self, message: str, line: int = 0):
        super().__init__(message)
        self.line = line


def parse_json(text: str, strictly: bool = False) -> Any:
    """JSON in which no object gives a key twice, and which nests no deeper than DEEPEST; else Unreadable. strictly: nor
    has it NaN or Infinity, which Python reads, or half a surrogate pair."""
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_refused if strictly else None)
    except Unreadable:
        raise
    except RecursionError:
        raise Unreadable(TOO_DEEP) from None
    except ValueError as error:
        what = LONG_NUMBER if "integer string conversion" in str(error) else f"not valid JSON ({error})"
        raise Unreadable(
            what if what == LONG_NUMBER else f"{what}; {'mend it' if strictly else 'give one object a line'}"
        ) from None
    if text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST:
        raise Unreadable(TOO_DEEP)
    if strictly and "\\u" in text and any(SURROGATE.search(each) for each in _strings(value)):
        raise Unreadable(HALF)
    return value


DEEPEST = 100  # levels of lists and objects
EXPANDED = 1_000_000  # values of a YAML file with each alias written out
LONGEST_NUMBER = 4300  # digits, which Python's int() takes at most
TOO_DEEP = f"nests deeper than {DEEPEST} levels; write it flat"
LONG_NUMBER = f"has a number of more than {LONGEST_NUMBER} digits; write it as a string"
HALF = "has half a surrogate pair, which no text has; write the whole character"


def _refused(constant: str) -> None:
    raise Unreadable(f"has {constant}, which is no JSON; write null or a number")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= DEEPEST:
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        depth, level = depth + 1, [each for values in inner for each in values]
    return depth


def _strings(value: Any) -> Iterator[str]:
    """All keys and texts in a value."""
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


def parse_yaml(text: str) -> Any:
    """YAML's safe subset in which no mapping gives a key twice, and whose aliases do not multiply; else Unreadable."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measured(node, {}, 0)
        return loader.construct_document(node)
    except Unreadable:
        raise
    except RecursionError:
        raise Unreadable(TOO_DEEP) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        fix = "put a text with ? , : { or } between { } in quotes" if "got '?'" in problem else "mend that line"
        raise Unreadable(f"not valid YAML ({problem}); {fix}", mark.line + 1 if mark else 0) from None
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:  # PyYAML's, of single values
        raise Unreadable(f"has a date, number or tag that is none ({error}); put it in quotes") from None


def _measured(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """How many values a node stands for, with each alias written out. sizes: of nodes seen; 0 while they are open."""
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
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen |= {key} if isinstance(key, Hashable) else set()
        return super().construct_mapping(node, deep)
