"""JSON and YAML as they are read and written here. Read: no key twice, of which other readers keep the last in silence.
Written: strict JSON (RFC 8259), without NaN and Infinity."""

import json
import math
import re
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
    """Why a text is no JSON, with the fix."""


def parse_json(text: str) -> Any:
    """JSON in which no object gives a key twice; else Unreadable."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except Unreadable:
        raise
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not valid JSON ({error}); give one object a line") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Unreadable(f"the key {json.dumps(twice)} is given twice; keep one of the two")
    return row


def parse_yaml(text: str) -> Any:
    """YAML's safe subset in which no mapping gives a key twice; else yaml.YAMLError."""
    return yaml.load(text, Loader=_Keys)


class _Keys(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key if isinstance(key, str) else repr(key))
        return super().construct_mapping(node, deep)
