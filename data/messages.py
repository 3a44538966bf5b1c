"""Convert messages of published sets to ours: {role, content}, with calls, thinking and weight if there are any."""

import json
import re
from typing import Any

from data.chat import ROLES
from data.message_texts import THINKING, Message

ALIASES = {"human": "user", "gpt": "assistant", "agent": "assistant", "api": "tool", "function": "tool"}
KNOWN = {
    "role",
    "content",
    "written",
    "name",
    "tool_call_id",
    "tool_calls",
    "function_call",
    "weight",
    "train",
    *THINKING,
}
_ABOUT_CALL = ("id", "type", "index")  # fields of a call beside its function
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def parse_messages(value: Any, name: str = "messages") -> list[Message]:
    """A list of {role, content} with our role names. Raises ValueError for any other value.

    A message also keeps `tool_calls` (or `function_call`), `tool_call_id`, `name`, its thinking, and `weight` or
    `train`, which state whether the turn is a target.
    """
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list of {{role, content}} messages, got {type(value).__name__}")
    return [_parse_message(message, f"{name}[{i}]") for i, message in enumerate(value)]


def parse_role(role: Any, name: str) -> str:
    """One of our role names. Aliases are converted."""
    known = ALIASES.get(role, role) if isinstance(role, str) else None
    if known not in ROLES:
        raise ValueError(f"{name} has role {role!r}; known roles: {', '.join((*ROLES, *ALIASES))}")
    return known


def parse_hh(text: str, name: str = "text") -> list[Message]:
    """Messages of Anthropic's raw text, "\\n\\nHuman: ... \\n\\nAssistant: ...". An empty last answer is left out."""
    first, *rest = _HH_TURN.split(text)
    if not rest or first.strip():
        raise ValueError(f'{name} is not of the form "\\n\\nHuman: ... \\n\\nAssistant: ...": it begins {text[:40]!r}')
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[r], "content": c.strip()} for r, c in zip(rest[::2], rest[1::2], strict=True)]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def is_hh(value: Any) -> bool:
    """Whether a text is a conversation in Anthropic's form."""
    return isinstance(value, str) and value.startswith(("\n\nHuman:", "\n\nAssistant:"))


def join_text(content: Any, name: str) -> str:
    """Content as one text: a text, or the joined parts of type text."""
    return content if isinstance(content, str) else "".join(_part(part, name) for part in _filled(content, name))


def parse_tools(value: Any) -> list[dict] | None:
    """JSON schemas of functions, given as a list or as JSON text. None if there are no functions."""
    tools = _from_json(value, "tools") if isinstance(value, str) and value.strip() else value or None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("tools must be a list of JSON schemas")
    for i, tool in enumerate(tools):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"tools[{i}] needs a name")
    return tools


def _parse_message(message: Any, name: str) -> Message:
    """The message with its content as text. Null or a list of text parts is kept in `written`, for the chat template.

    A call's arguments become an object, whether they were one or JSON text. Unknown fields are refused by name, because
    they may change the meaning of the message.
    """
    if not isinstance(message, dict):
        raise ValueError(f"{name} must be an object with role and content, got {type(message).__name__}")
    message = {key: value for key, value in message.items() if value is not None}
    unknown = sorted(message.keys() - KNOWN)
    if unknown:
        raise ValueError(
            f"{name} has {', '.join(unknown)}, which is not supported; remove such fields from the messages"
        )
    parsed: Message = {"role": parse_role(message.get("role"), name)}
    calls = _parse_calls(message, f"{name} ({parsed['role']})")
    content = message.get("written", message.get("content"))
    if isinstance(content, list):
        parsed |= {"content": join_text(content, name), "written": content}
    elif isinstance(content, str):
        parsed["content"] = content
    elif content is None and calls:
        parsed |= {"content": "", "written": None}
    else:
        kind = "null" if content is None else type(content).__name__
        raise ValueError(f"{name} ({parsed['role']}) needs a text or a list of text parts as content, got {kind}")
    if calls:
        parsed["tool_calls"] = calls
    for key in ("name", "tool_call_id", *THINKING):
        if not isinstance(message.get(key, ""), str):
            raise ValueError(f"{name}: {key} must be a text, got {type(message[key]).__name__}")
    for key, allowed in (("weight", (0, 1)), ("train", (False, True))):
        if message.get(key, 1) not in allowed:
            raise ValueError(f"{name}: {key} must be {allowed[0]} or {allowed[1]}, got {message[key]!r}".lower())
    return parsed | {
        key: message[key] for key in ("name", "tool_call_id", "weight", "train", *THINKING) if key in message
    }


def _filled(parts: list, name: str) -> list:
    if parts == []:
        raise ValueError(f'{name} has an empty list as content; an empty message has the text ""')
    return parts


def _part(part: Any, name: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and not isinstance(part.get("text"), str):
        raise ValueError(f"{name} has a part of type text whose text is {type(part.get('text')).__name__}")
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise ValueError(f"{name} has a content part of type {kind!r}; only text is read")
    return part["text"]


def _parse_calls(message: dict, name: str) -> list[dict]:
    calls = message.get("tool_calls", [])
    if "function_call" in message:  # OpenAI's older name for a single call
        calls = [{"type": "function", "function": message["function_call"]}]
    if not isinstance(calls, list):
        raise ValueError(f"{name}: tool_calls must be a list, got {type(calls).__name__}")
    if calls and message.get("role") in ("system", "developer", "user", "human", "tool", "function"):
        raise ValueError(f"{name} calls tools, which only the assistant may do")
    return [_parse_call(call, f"{name}: tool_calls[{i}]") for i, call in enumerate(calls)]


def _parse_call(call: Any, name: str) -> dict:
    """The call with its fields in their order, because a template may write it as JSON."""
    if isinstance(call, dict) and "function" not in call:  # {"name": ..., "arguments": ...}
        about = {key: call[key] for key in _ABOUT_CALL if key in call}
        call = {"type": "function"} | about | {"function": {key: call[key] for key in call if key not in about}}
    function = call["function"] if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise ValueError(f"{name} needs a function with a name")
    _check_fields(call, (*_ABOUT_CALL, "function"), name)
    _check_fields(function, ("name", "arguments"), f"{name}.function")
    arguments = function.get("arguments")
    arguments = {} if arguments in (None, "") else arguments
    arguments = _from_json(arguments, f"{name}.arguments") if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise ValueError(f"{name}: arguments must be a JSON object, got {type(arguments).__name__}")
    parsed = call | {"function": function | {"arguments": arguments}}
    return {key: value for key, value in parsed.items() if value is not None}


def _check_fields(value: dict, known: tuple[str, ...], name: str) -> None:
    if unknown := sorted(key for key, part in value.items() if part is not None and key not in known):
        raise ValueError(f"{name} has {', '.join(unknown)}; the fields that are supported are {', '.join(known)}")


def _from_json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
