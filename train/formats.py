"""Strict JSON (RFC 8259), as everything that is written here: no NaN, no Infinity, no half surrogates as raw bytes."""

import json
import math
import re
from typing import Any

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
