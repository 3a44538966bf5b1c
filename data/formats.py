"""From a published row to our records: the kind is recognised from the fields that the row has."""

import json
import re
from collections.abc import Iterator
from typing import Any

from data.chat_template import Message
from data.messages import parse_messages, parse_role, parse_tools
from data.records import Comparison, Example, Prompt, Ranking, Rated

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def examples(row: dict) -> list[Example]:
    """Demonstrations: `messages`, `prompt` + `completion`, an OpenAssistant tree (its best replies)."""
    tools = parse_tools(row.get("tools"))
    if "messages" in row:
        return [Example(parse_messages(row["messages"]), tools=tools, columns=_rest(row, "messages", "tools"))]
    if "prompt" in row and "completion" in row:
        said = [*_prompt(row["prompt"]), *_continuation(row["completion"])]
        return [Example(said, tools=tools, columns=_rest(row, "prompt", "completion", "tools"))]
    if _is_tree(row):
        paths = _tree_paths(row["prompt"], [])
        return [Example(path, columns=_rest(row, "prompt")) for path in paths]
    raise ValueError(f"no demonstration: expected messages, or prompt and completion; got {_fields(row)}")


def preferences(row: dict) -> list[Comparison | Ranking | Rated]:
    """Comparisons, rankings and ratings, of the four kinds in our files and of Anthropic's, UltraFeedback's, OASST's.

    Raises:
        ValueError: sides that are identical or empty, pairs whose prompts differ, ranks that do not fit.
    """
    tools = parse_tools(row.get("tools"))
    if _is_tree(row):
        return [
            _ranking(prompt, replies, _rest(row, "prompt")) for prompt, replies in _tree_rankings(row["prompt"], [])
        ]
    if "chosen" in row and "rejected" in row:
        return [_comparison(row)]
    if "completions" in row and "ranks" in row:
        completions = [_completion(c, f"completions[{i}]") for i, c in enumerate(_list(row, "completions"))]
        replies = list(zip(_list(row, "ranks"), completions, strict=False))
        if len(replies) != len(completions) or len(replies) != len(row["ranks"]):
            raise ValueError(f"{len(completions)} completions but {len(row['ranks'])} ranks")
        rest = _rest(row, "prompt", "completions", "ranks", "tools")
        return [_ranking(_prompt(row.get("prompt")), replies, rest, tools)]
    for name in ("generation", "completion"):
        if name in row and "reward" in row:
            prompt = _prompt(row["context"] if "context" in row else row.get("prompt"))
            completion = _completion(row[name], name)
            reward = _number(row["reward"], "reward")
            if not 0 <= reward <= 1:
                raise ValueError(f"reward must lie in [0, 1] (1 = good), got {reward}")
            rest = _rest(row, "context", "prompt", name, "reward", "tools")
            return [Rated(prompt, completion, reward, tools=tools, columns=rest)]
    raise ValueError(
        "no comparison: expected prompt/chosen/rejected, prompt/completions/ranks, context/generation/reward or "
        f"context/chosen/rejected; got {_fields(row)}"
    )


def prompts(row: dict) -> list[Prompt]:
    """What to ask: `prompt` or `context`; of `messages` or Anthropic's text, all before the last assistant turn."""
    if _is_tree(row):
        return [Prompt(_prompt(row["prompt"].get("text")), columns=_rest(row, "prompt"))]
    if "prompt" in row or "context" in row:
        name = "prompt" if "prompt" in row else "context"
        asked = _prompt(row[name])
    elif "messages" in row:
        name, asked = "messages", parse_messages(row["messages"])
        last = max((i for i, m in enumerate(asked) if m["role"] == "assistant"), default=len(asked))
        asked = asked[:last]
    elif "chosen" in row:  # a comparison that repeats the conversation on each side
        name, (asked, _) = "chosen", _side(row["chosen"], None, "chosen")
    else:
        raise ValueError(f"no prompt: expected prompt, context or messages; got {_fields(row)}")
    if not any(m["content"].strip() for m in asked if m["role"] != "system"):
        raise ValueError(f"{name} asks nothing")
    return [Prompt(asked, tools=parse_tools(row.get("tools")), columns=_rest(row, name, "tools"))]


def _comparison(row: dict) -> Comparison:
    given = row["context"] if "context" in row else row.get("prompt")
    (prompt, chosen), (other, rejected) = (_side(row[name], given, name) for name in ("chosen", "rejected"))
    if prompt != other:
        raise ValueError("chosen and rejected answer different prompts")
    chosen, rejected = _filled(chosen, "chosen"), _filled(rejected, "rejected")
    if chosen == rejected:
        raise ValueError("chosen and rejected are identical")
    margin, tie = _number(row.get("margin") or 0, "margin"), row.get("tie") or False
    if not isinstance(tie, bool):
        raise ValueError(f"tie must be true or false, got {tie!r}")
    columns = _rest(row, "context", "prompt", "chosen", "rejected", "margin", "tie", "messages", "tools")
    tools = parse_tools(row.get("tools"))
    return Comparison(prompt, chosen, rejected, margin, tie, tools=tools, columns=columns)


def _side(value: Any, given: Any, name: str) -> tuple[list[Message], str]:
    """(prompt, completion) of a side, which may repeat the conversation: Anthropic's text, UltraFeedback's messages."""
    if isinstance(value, str) and given is None:
        said = parse_hh(value, name)
    elif isinstance(value, list):
        said = parse_messages(value, name)
        if len(said) == 1:
            said = [*_prompt(given), *said]
        elif isinstance(given, str) and all(m["content"].strip() != given.strip() for m in said[:-1]):
            raise ValueError(f"{name} does not answer the row's prompt: the prompt is none of its messages")
    else:
        return _prompt(given), _completion(value, name)
    if not said or said[-1]["role"] != "assistant":
        raise ValueError(f"{name} must end with an assistant turn")
    return said[:-1], _answer(said[-1], name)


def parse_hh(text: str, name: str = "text") -> list[Message]:
    """Messages of Anthropic's raw text, "\\n\\nHuman: ... \\n\\nAssistant: ..."."""
    first, *rest = _HH_TURN.split(text)
    if not rest or first.strip():
        raise ValueError(f'{name} is not in the form "\\n\\nHuman: ... \\n\\nAssistant: ...": it begins {text[:40]!r}')
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": c.strip()} for r, c in zip(rest[::2], rest[1::2], strict=True)]


def _prompt(value: Any) -> list[Message]:
    """A prompt is text, messages, or Taskmaster's context of `text`, `api` and `response` turns."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if isinstance(value, list) and any(isinstance(m, dict) and "content" not in m for m in value):
        return [
            {"role": parse_role(t.get("role"), f"context[{i}]"), "content": _taskmaster(t)} for i, t in _turns(value)
        ]
    return parse_messages(value, "prompt")


def _continuation(value: Any) -> list[Message]:
    """How a demonstration goes on: a text, or messages of which the assistant's are learned."""
    if isinstance(value, list):
        return parse_messages(value, "completion")
    return [_assistant(_completion(value, "completion"))]


def _answer(message: Message, name: str) -> str:
    """The text of an answer that is compared or rated. Raises ValueError where it is more than text."""
    more = sorted(message.keys() - {"role", "content", "name", "written"})
    if more:
        raise ValueError(f"{name} has {', '.join(more)} beside its text; compared and rated answers are texts here")
    return message["content"]


def _completion(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and "content" not in value:
        return _taskmaster(value)
    said = parse_messages(value if isinstance(value, list) else [value], name)
    if len(said) != 1 or said[0]["role"] != "assistant":
        raise ValueError(f"{name} must be text or one assistant message")
    return _answer(said[0], name)


def _taskmaster(turn: dict) -> str:
    """`text` as it is; an API call as `call NAME {json}`; a response as its JSON."""
    if isinstance(turn.get("text"), str):
        return turn["text"]
    if isinstance(turn.get("api"), dict):
        return "\n".join(f"call {name} {_json(arguments)}" for name, arguments in turn["api"].items())
    if "response" in turn:
        return _json(turn["response"])
    raise ValueError(f"a Taskmaster turn has text, api or response; got {_fields(turn)}")


def _ranking(
    prompt: list[Message], replies: list[tuple[Any, str]], columns: dict, tools: list[dict] | None = None
) -> Ranking:
    if len(replies) < 2:
        raise ValueError(f"a ranking needs two completions or more, got {len(replies)}")
    ranks = [_number(rank, "ranks") for rank, _ in replies]
    completions = [_filled(text, f"completions[{i}]") for i, (_, text) in enumerate(replies)]
    if len(set(completions)) < len(completions):
        raise ValueError("two completions of a ranking are identical")
    return Ranking(prompt, completions, ranks, tools=tools, columns=columns)


# OpenAssistant: a tree of messages; `rank` 0 is the best of the assistant replies to a message.


def _is_tree(row: dict) -> bool:
    return isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]


def _node(node: dict) -> Message:
    if not isinstance(node.get("text"), str) or node.get("role") not in ("prompter", "assistant"):
        raise ValueError(f"an OpenAssistant message has text and role prompter or assistant; got {_fields(node)}")
    return {"role": "user" if node["role"] == "prompter" else "assistant", "content": node["text"]}


def _replies(node: dict) -> list[dict]:
    """Replies that nobody deleted or rejected, best first; those without a rank keep their place at the end."""
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(r, dict) for r in replies):
        raise ValueError("replies must be a list of OpenAssistant messages")
    kept = [r for r in replies if not r.get("deleted") and r.get("review_result") is not False]
    return sorted(kept, key=lambda r: float("inf") if r.get("rank") is None else _number(r["rank"], "rank"))


def _tree_paths(node: dict, before: list[Message]) -> Iterator[list[Message]]:
    """Every conversation that follows the best assistant reply and ends with one."""
    said, replies = [*before, _node(node)], _replies(node)
    followed = replies[:1] if said[-1]["role"] == "user" else [r for r in replies if r.get("replies")]
    if said[-1]["role"] == "assistant" and not followed:
        yield said
    for reply in followed:
        yield from _tree_paths(reply, said)


def _tree_rankings(node: dict, before: list[Message]) -> Iterator[tuple[list[Message], list[tuple[Any, str]]]]:
    said = [*before, _node(node)]
    ranked = [(r["rank"], _node(r)["content"]) for r in _replies(node) if r.get("rank") is not None]
    if said[-1]["role"] == "user" and len(ranked) > 1:
        yield said, ranked
    for reply in _replies(node):
        yield from _tree_rankings(reply, said)


def _turns(context: list) -> Iterator[tuple[int, dict]]:
    for i, turn in enumerate(context):
        if not isinstance(turn, dict):
            raise ValueError(f"context[{i}] must be an object, got {type(turn).__name__}")
        yield i, turn


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _filled(text: str, name: str) -> str:
    if not text.strip():
        raise ValueError(f"{name} is empty")
    return text


def _list(row: dict, name: str) -> list:
    if not isinstance(row[name], list):
        raise ValueError(f"{name} must be a list, got {type(row[name]).__name__}")
    return row[name]


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise ValueError(f"{name} must be a number (finite), got {value!r}")
    if abs(value) > 1e300:  # a whole number of JSON may exceed every float
        raise ValueError(f"{name} is too large")
    return float(value)


def _rest(row: dict, *used: str) -> dict:
    return {name: value for name, value in row.items() if name not in used}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _fields(row: dict) -> str:
    return ", ".join(map(str, row)) or "no fields"
