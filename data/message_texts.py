"""Forms of messages that chat templates accept, and all texts in messages."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

Message = dict[str, Any]  # {"role", "content"} and the other fields that data/messages.py accepts
THINKING = ("reasoning_content", "thinking", "reasoning")  # three names of the same field
_OURS = ("weight", "train", "written")  # fields that are not given to templates


def for_template(message: Message) -> Message:
    """The message as transformers gives it to templates: no null fields, thinking under each of its names."""
    message = message | {"content": message.get("written", message.get("content"))}
    taken = {name: value for name, value in message.items() if value is not None and name not in _OURS}
    thought = next((taken[name] for name in THINKING if name in taken), None)
    return taken if thought is None else {"thinking": thought, **taken, "reasoning_content": thought}


def ways_to_write(messages: list[Message]) -> Iterator[list[Message]]:
    """The messages unchanged, then in the other forms that a template may accept.

    The forms: missing content as an empty text, text parts as one text, `developer` as `system`, arguments as JSON
    text.
    """
    others = [(_filled, any("content" not in m for m in messages))]
    others.append((_joined, any(isinstance(m.get("content"), list) for m in messages)))
    others.append((_as_system, any(m["role"] == "developer" for m in messages)))
    others.append((_as_json, any(m.get("tool_calls") for m in messages)))
    for chosen in itertools.product((False, True), repeat=sum(applies for _, applies in others)):
        changes = [change for change, applies in others if applies]
        taken = messages
        for change in itertools.compress(changes, chosen):
            taken = [change(message) for message in taken]
        yield taken


def _filled(message: Message) -> Message:
    return {"content": ""} | message


def _joined(message: Message) -> Message:
    parts = message.get("content")
    return message | {"content": "".join(part["text"] for part in parts)} if isinstance(parts, list) else message


def _as_system(message: Message) -> Message:
    return message | {"role": "system"} if message["role"] == "developer" else message


def _as_json(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": _json(call["function"].get("arguments", {}))}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def texts_of(message: Message) -> list[tuple[str, str]]:
    """(field, text) of every text of the message."""
    found: list[tuple[str, str]] = []

    def noted(name: str, text: str) -> str:
        found.append((name, text))
        return text

    map_texts(message, noted)
    return found


def map_texts(message: Message, change) -> Message:
    """The message with `change(field, text)` in place of each non-blank text: content, thinking, calls."""

    def changed(name: str, text: Any) -> Any:
        return change(name, text) if isinstance(text, str) and text.strip() else text

    taken = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        taken["content"] = [part | {"text": changed("content", part["text"])} for part in content]
    elif content is not None:
        taken["content"] = changed("content", content)
    if "reasoning_content" in message:
        thought = changed("reasoning_content", message["reasoning_content"])
        taken |= {name: thought for name in THINKING if name in message}
    if "tool_calls" in message:
        taken["tool_calls"] = [_with_call(call, changed) for call in message["tool_calls"]]
    return taken


def _with_call(call: dict, changed) -> dict:
    function = dict(call["function"])
    function["name"] = changed("tool_calls", function["name"])
    given = function.get("arguments")
    if given is not None:
        arguments = json.loads(given) if isinstance(given, str) else given
        arguments = change_texts(arguments, lambda text: changed("tool_calls", text))
        function["arguments"] = _json(arguments) if isinstance(given, str) else arguments
    return call | {"function": function}


def with_described(tool: dict, change) -> dict:
    """A tool with its name and description changed."""
    function = dict(tool.get("function", tool))
    for name in ("name", "description"):
        if isinstance(function.get(name), str) and function[name].strip():
            function[name] = change(name, function[name])
    return tool | {"function": function} if "function" in tool else function


def change_texts(value: Any, change) -> Any:
    """The value with `change` applied to each non-blank text."""
    if isinstance(value, dict):
        return {name: change_texts(part, change) for name, part in value.items()}
    if isinstance(value, list):
        return [change_texts(part, change) for part in value]
    return change(value) if isinstance(value, str) and value.strip() else value


def shape(value: Any, name: str = "") -> Any:
    """The value without its texts, except roles. It determines how a template writes the value."""
    if isinstance(value, dict):
        return {key: shape(part, key) for key, part in value.items()}
    if isinstance(value, list):
        return [shape(part) for part in value]
    if isinstance(value, str) and name not in ("role", "type"):
        return bool(value.strip())
    return value


def dense(text: str) -> str:
    """The text without white space, because templates may trim it."""
    return "".join(text.split())
