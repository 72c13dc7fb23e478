"""Converts documents in the formats of other tools to the project's own format (train/data/documents.py).

These are read directly: `messages_json`; messages as a string of JSON or of Python literals; `content` instead of
`text`; ShareGPT's `conversations` with `from` and `value`; contents as lists of text parts. Null means absent
everywhere.
"""

import ast
import warnings
from typing import Any

from train.runtime.errors import UserError
from train.runtime.text_formats import Unreadable, parse_json

CHATS = ("messages", "messages_json", "conversations")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
TO_CHAT = '{messages: [{role: "user", content: .%s}, {role: "assistant", content: .%s}]}'
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("question", "answer"))


def own_form(row: Any, where: str) -> dict[str, Any]:
    """Returns the row with either "text" or "messages" (a list), whatever format it has.

    Raises UserError, beginning with `where`, if the row holds no document or more than one.
    """
    if not isinstance(row, dict):
        lines = "write one document per line: jq -c '.[]' FILE > NEW.jsonl"
        fix = lines if isinstance(row, list) else 'write {"text": ...} around it'
        raise UserError(f"{where}: a document must be a JSON object, not {kind(row)}; {fix}")
    chats = [key for key in CHATS if not _empty(row.get(key))]
    text = next((key for key in ("text", "content") if not _empty(row.get(key))), None)
    text = None if text == "content" and chats else text  # beside a chat, "content" is metadata
    if len(chats) + (text is not None) > 1:
        found = "both" if text else " and ".join(chats)
        raise UserError(f'{where}: a document has either "text" or "messages", this one has {found}; keep one')
    rest = {key: value for key, value in row.items() if key not in ("text", *CHATS, text)}
    if text:
        return {"text": row[text], **rest}
    if chats:
        messages = parsed_list(row[chats[0]], f"{where}: {chats[0]}")
        if chats[0] == "conversations" and rest.get("system"):  # ShareGPT keeps it beside the messages
            messages = [{"role": "system", "content": rest.pop("system")}, *messages]
        return {"messages": [_message(each) for each in messages], **rest}
    raise UserError(f"{where}: {_what_is_there(row)}")


def kind(value: Any) -> str:
    """Returns the type of a JSON value in words, for error messages."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _empty(value: Any) -> bool:
    return value is None or value == "" or value == []


def _what_is_there(row: dict[str, Any]) -> str:
    """Returns what is wrong with a row that holds no document, and the fix."""
    for prompt, completion in PAIRS:
        if prompt in row and completion in row:
            query = TO_CHAT % (prompt, completion)
            return (
                f'"{prompt}" and "{completion}" are not supported, because they do not say which part is trained; '
                f"convert them to chats: jq -c '{query}' FILE > NEW.jsonl"
            )
    for key in ("text", "content"):
        if row.get(key) == "":
            return f"{key} is empty; leave the document out, or use --bad-rows skip"
    for key in CHATS:
        if not _empty(row.get(key, [])) or row.get(key) == []:
            return f"{key} is an empty list; give a list of at least one"
    return 'a document has either "text" or "messages", this one has neither; give one'


def parsed_list(value: Any, where: str) -> list[Any]:
    """Returns a list that is given as such or as a string of JSON or of Python literals.

    Raises UserError, beginning with `where`, if the value is not a list or is empty.
    """
    if isinstance(value, str):
        value = _parsed(value, where)
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else kind(value)
        raise UserError(f"{where} is {found}; give a list of at least one")
    return value


def _parsed(text: str, where: str) -> Any:
    """Parses a string as JSON or as Python literals, as which some tools write lists. Nothing in it is executed."""
    try:
        return parse_json(text)
    except Unreadable as error:
        reason = str(error).partition("; ")[0]
    try:
        with warnings.catch_warnings(action="ignore"):  # about backslashes that begin no valid escape
            tree = ast.parse(text.strip(), mode="eval")
            value = ast.literal_eval(tree)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise UserError(
            f"{where} is a string that is neither JSON nor a Python literal ({reason}); give a list"
        ) from None
    for node in ast.walk(tree):
        keys = [ast.dump(key) for key in node.keys if key] if isinstance(node, ast.Dict) else []
        if len(set(keys)) < len(keys):
            raise UserError(f"{where}: an object has the same key twice; keep one of the two")
    return value


def _message(message: Any) -> Any:
    """Returns a message without nulls, and with ShareGPT's from and value renamed to role and content."""
    if not isinstance(message, dict):
        return message
    message = {key: value for key, value in message.items() if value is not None}
    if "from" in message and "value" in message and not message.keys() & {"role", "content"}:
        role = message.pop("from")
        content = message.pop("value")
        message = {
            "role": SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role,
            "content": content,
            **message,
        }
    return message


def text_of(content: Any, where: str) -> Any:
    """Returns a content with the text parts of a list joined; any other value is returned as it is.

    Raises UserError, beginning with `where`, if a part of the list is not text.
    """
    if not isinstance(content, list):
        return content
    texts = []
    for n, part in enumerate(content):
        is_text = isinstance(part, dict) and part.get("type", "text") == "text"
        text = part.get("text") if is_text else part
        if not isinstance(text, str):
            other = f"a part of type {part.get('type')!r}" if isinstance(part, dict) else kind(part)
            found = f"a text part whose text is {kind(text)}" if is_text else other
            raise UserError(f"{where}[{n}] is {found}; only text parts are read: leave it out, or write it as text")
        texts.append(text)
    return "".join(texts)
