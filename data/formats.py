"""From a row in our format to records. The kind is recognised by its fields. `data/adapters` converts other formats."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from data.chat_template import Message
from data.messages import THINKING, is_hh, parse_hh, parse_messages, parse_role, parse_tools
from data.records import Comparison, Example, Prompt, Ranking, Rated, Record

_NUMBER = re.compile(r"[-+]?(\d{1,300}(\.\d{0,300})?|\.\d{1,300})([eE][-+]?\d{1,3})?")
# how a message begins in JSON, and as Python prints it
_MESSAGE = re.compile(r"""\s*\[?\s*\{\s*['"](role|content)['"]\s*:""")
_KEYS = [re.compile(rf"""['"]{key}['"]\s*:""") for key in ("role", "content")]
QUESTIONS = ("prompt", "question", "query", "instruction", "input")  # texts that a context may belong to
GIVEN: tuple[str, ...] = ("context", "prompt", "system", "tools")  # fields before the answer


def examples(row: dict) -> list[Example]:
    """Demonstrations: `messages`, `prompt` + `completion` (or `answer`, `response`), or an OpenAssistant tree.

    Raises:
        ValueError: there is no demonstration, or the completion was rated bad.
    """
    found = _demonstrations(row)
    if (good := _reward(row)) is not None and good < 0.5:
        field = "reward" if row.get("reward") is not None else "label"
        raise ValueError(
            f"rated bad ({field}={json.dumps(row[field])}), so it is not a demonstration; leave such rows out with "
            "data.on_bad_row=skip, or learn from both kinds with train_dpo.py loss=kto"
        )
    return found


def _demonstrations(row: dict) -> list[Example]:
    if is_tree(row):
        paths = _tree_paths(_root(row), [])
        if not paths:
            raise ValueError(f"the tree has no answer: {_count_replies(row['prompt'])}")
        return [Example(path, columns=_rest(row, "prompt")) for path in paths]
    name = next((name for name in ("completion", "answer", "response") if name in row), None)
    used: tuple[str, ...]
    if "messages" in row:
        turns, used = _with_system(row, parse_messages(row["messages"])), ("messages", "system", "tools")
    elif "prompt" in row and name:
        turns, used = _go_on(row, _given(row), _answers(row[name], name)), (*GIVEN, name)
    else:
        raise ValueError(f"not a demonstration: it needs messages, or prompt and completion; {_names(row)}")
    return [Example(turns, tools=parse_tools(row.get("tools")), columns=_rest(row, *used))]


def preferences(row: dict) -> list[Comparison | Ranking | Rated]:
    """Comparisons, rankings and ratings, in our four forms and in those of Anthropic, UltraFeedback and OpenAssistant.

    Raises:
        ValueError: sides are identical or empty, the prompts of a pair differ, or ranks do not fit.
    """
    if is_tree(row):
        rankings = list(_tree_rankings(_root(row), []))
        if not rankings:
            raise ValueError(f"no message of the tree has two ranked answers: {_count_replies(row['prompt'])}")
        return [_ranking(prompt, replies, columns=_rest(row, "prompt")) for prompt, replies in rankings]
    if "chosen" in row and "rejected" in row:
        return [_comparison(row)]
    if "completions" in row and "ranks" in row:
        completions = [_completion(c, f"completions[{i}]") for i, c in enumerate(_list(row, "completions"))]
        ranks = _list(row, "ranks")
        if len(ranks) != len(completions):
            raise ValueError(f"{len(completions)} completions but {len(ranks)} ranks")
        prompt, *completions = _begun(row, _given(row), *completions)
        columns = _rest(row, *GIVEN, "completions", "ranks")
        return [
            _ranking(
                _asked(prompt, "prompt"),
                list(zip(ranks, completions, strict=True)),
                tools=parse_tools(row.get("tools")),
                columns=columns,
            )
        ]
    for name in ("generation", "completion"):
        if name in row and (reward := _reward(row)) is not None:
            prompt, completion = _begun(row, _given(row), _completion(row[name], name))
            columns = _rest(row, *GIVEN, name, "reward", "label")
            asked = _asked(prompt, "prompt")
            return [Rated(asked, completion, reward, tools=parse_tools(row.get("tools")), columns=columns)]
    if "messages" in row and (reward := _reward(row)) is not None:
        prompt, completion = _side(row["messages"], [], "messages")
        columns = _rest(row, "messages", "system", "tools", "reward", "label")
        asked = _asked(_with_system(row, prompt), "messages")
        return [Rated(asked, completion, reward, tools=parse_tools(row.get("tools")), columns=columns)]
    raise ValueError(
        "not a comparison: it needs prompt/chosen/rejected, prompt/completions/ranks, context/generation/reward, "
        f"prompt/completion/label, messages/label or context/chosen/rejected; {_names(row)}"
    )


def prompts(row: dict) -> list[Prompt]:
    """Prompts: `prompt` or `context`, or all turns of `messages` or Anthropic's text before the last assistant turn."""
    if is_tree(row):
        return [Prompt(_prompt(_root(row).get("text")), columns=_rest(row, "prompt"))]
    if "prompt" in row or "context" in row:
        name, asked, used = "prompt" if "prompt" in row else "context", _given(row), GIVEN
    elif "messages" in row:
        name, asked, used = "messages", _with_system(row, parse_messages(row["messages"])), ("messages", *GIVEN)
        last = max((i for i, m in enumerate(asked) if m["role"] == "assistant"), default=len(asked))
        asked = asked[:last]
    elif "chosen" in row:  # a comparison that repeats the conversation on both sides
        name, (asked, _), used = "chosen", _side(row["chosen"], [], "chosen"), ("chosen", *GIVEN)
        asked = _with_system(row, asked)
    else:
        raise ValueError(f"no prompt: the row needs prompt, context or messages; {_names(row)}")
    return [Prompt(_asked(asked, name), tools=parse_tools(row.get("tools")), columns=_rest(row, *used))]


def any_record(row: dict) -> Sequence[Record]:
    """The records of a row of any kind. Checks use it, because they do not know the kind."""
    rated = row.get("reward") is not None or row.get("label") is not None
    if "messages" in row or is_tree(row) or "prompt" in row and "completion" in row and not rated:
        return _demonstrations(row)  # also rows that were rated bad
    if "chosen" in row or "ranks" in row or rated and ("completion" in row or "generation" in row):
        return preferences(row)
    return prompts(row)


def as_row(record: Record) -> dict:
    """A record as a row that the functions above read back."""
    if isinstance(record, Example):
        row: dict = {"messages": record.messages}
    elif isinstance(record, Comparison):
        row = {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}
        row |= ({"margin": record.margin} if record.margin else {}) | ({"tie": True} if record.tie else {})
    elif isinstance(record, Ranking):
        row = {"prompt": record.prompt, "completions": record.completions, "ranks": record.ranks}
    elif isinstance(record, Rated):
        row = {"prompt": record.prompt, "completion": record.completion, "reward": record.reward}
    else:
        assert isinstance(record, Prompt)
        row = {"prompt": record.prompt}
    row |= {"tools": record.tools} if record.tools else {}
    return row | {name: value for name, value in record.columns.items() if name not in row}


def _comparison(row: dict) -> Comparison:
    given = _given(row) if row.get("context") is not None or row.get("prompt") is not None else []
    (prompt, chosen), (other, rejected) = (_side(row[name], given, name) for name in ("chosen", "rejected"))
    if prompt != other:
        raise ValueError("chosen and rejected answer different prompts")
    if not given:
        prompt = _with_system(row, prompt)
    chosen, rejected = _filled(chosen, "chosen"), _filled(rejected, "rejected")
    if chosen == rejected:
        raise ValueError("chosen and rejected are identical")
    margin, tie = _number(row.get("margin") or 0, "margin"), _flag(row.get("tie") or False, "tie")
    if margin < 0:
        raise ValueError(f"margin must be 0 or more, as chosen is the better side, got {margin}")
    prompt, chosen, rejected = _begun(row, prompt, chosen, rejected)
    columns = _rest(row, *GIVEN, "chosen", "rejected", "margin", "tie", "messages")
    return Comparison(
        _asked(prompt, "prompt"), chosen, rejected, margin, tie, tools=parse_tools(row.get("tools")), columns=columns
    )


def _asked(messages: list[Message], name: str) -> list[Message]:
    """The messages before an answer. Raises ValueError if none but the system's has a text."""
    if not any(m["content"].strip() for m in messages if m["role"] != "system"):
        raise ValueError(f"{name} has no text")
    return messages


def _side(value: Any, given: list[Message], name: str) -> tuple[list[Message], str]:
    """(prompt, completion) of a side. It may repeat the conversation, as Anthropic's and UltraFeedback's rows do."""
    if is_hh(value) or isinstance(value, str) and not given:
        turns = parse_hh(value, name)
    elif isinstance(value, list):
        turns = parse_messages(value, name)
    else:
        return given, _completion(value, name)
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError(f"{name} must end with an assistant turn")
    return _joined(given, turns[:-1], name), _text_alone(turns[-1], name)


def _joined(given: list[Message], turns: list[Message], name: str) -> list[Message]:
    """The row's prompt, and the turns of a side before its last one. These may repeat the prompt or continue it."""
    asked = [m for m in given if m["role"] != "system"]
    if turns[: len(given)] == given:
        return turns
    if turns[: len(asked)] == asked:  # only the prompt has a system turn
        return [*given, *turns[len(asked) :]]
    if len(asked) == 1 and any(m["content"].strip() == asked[0]["content"].strip() for m in turns):
        return turns  # the prompt is a text, which is one turn of the conversation in the side
    if not turns or turns[0]["role"] in ("assistant", "tool"):
        return [*given, *turns]
    raise ValueError(f"{name} does not answer the row's prompt: none of its messages is the prompt")


def _given(row: dict) -> list[Message]:
    """The conversation before the answer: `context`, then `prompt` if the row has both, with the row's system text."""
    context, prompt = row.get("context"), row.get("prompt")
    others = [name for name in QUESTIONS if isinstance(row.get(name), str)]
    if isinstance(context, str) and others:
        raise ValueError(
            f"context and {others[0]} are both texts, and it is unknown whether the context is part of the question; "
            "if it is not, rename it, for example with data.columns={background: context}"
        )
    turns = [] if context is None else _prompt(context)
    if prompt is not None or context is None:
        asked = _prompt(prompt)
        turns = turns if turns and turns[-len(asked) :] == asked else [*turns, *asked]
    return _with_system(row, turns)


def _with_system(row: dict, messages: list[Message]) -> list[Message]:
    """The conversation with the row's `system` text as its first turn."""
    system = row.get("system")
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise ValueError(f"system must be text, got {type(system).__name__}")
    if messages and messages[0]["role"] in ("system", "developer"):
        if messages[0]["content"] != system:
            raise ValueError("the row has a system text and another system turn; keep one")
        return messages
    return [{"role": "system", "content": system}, *messages]


def _go_on(row: dict, prompt: list[Message], answers: list[Message]) -> list[Message]:
    """A conversation whose prompt may end inside the assistant turn that the answer continues."""
    begun, text = _begun(row, prompt, answers[0]["content"])
    return [*begun, answers[0] | {"content": text}, *answers[1:]]


def _begun(row: dict, prompt: list[Message], *completions: str) -> tuple:
    """The prompt and its completions. If the messages of `prompt` end with an assistant turn (a prefill), each
    completion begins with that turn and includes it in the targets. In a difference of two sides it cancels."""
    if not isinstance(row.get("prompt"), list) or not prompt or prompt[-1]["role"] != "assistant":
        return prompt, *completions
    beginning = _text_alone(prompt[-1], "the prompt's last turn")
    return prompt[:-1], *(beginning + completion for completion in completions)


def _answers(value: Any, name: str) -> list[Message]:
    """The messages after the prompt: of a text, a message, or a conversation that continues the prompt."""
    if not isinstance(value, list):
        return [_assistant(_completion(value, name))]
    turns = parse_messages(value, name)
    if not turns or turns[0]["role"] != "assistant":
        raise ValueError(f"{name} must begin with an assistant turn")
    return turns


def _reward(row: dict) -> float | None:
    """The human rating of a completion in [0, 1]: `reward`, or KTO's `label`. None if there is none."""
    if row.get("reward") is None:
        return None if row.get("label") is None else float(_flag(row["label"], "label"))
    reward = _number(row["reward"], "reward")
    if not 0 <= reward <= 1:
        raise ValueError(f"reward must lie in [0, 1] (1 = good), got {reward}")
    return reward


def _flag(value: Any, name: str) -> bool:
    """true or false, also in the spellings of tables."""
    known = {"true": True, "false": False, "1": True, "0": False}
    if str(value).lower() not in known:
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return known[str(value).lower()]


def _prompt(value: Any) -> list[Message]:
    """The messages of a prompt: a text, messages, or Taskmaster's context of `text`, `api` and `response` turns."""
    if is_hh(value):
        return parse_hh(value, "prompt")
    if isinstance(value, str):
        return [{"role": "user", "content": _plain(value, "the prompt")}]
    if isinstance(value, list) and any(isinstance(m, dict) and "content" not in m for m in value):
        return [
            {"role": parse_role(t.get("role"), f"context[{i}]"), "content": _taskmaster(t)} for i, t in _turns(value)
        ]
    return parse_messages(value, "prompt")


def _plain(text: str, name: str) -> str:
    """The text. Raises ValueError if it is a list of messages that was written as a text."""
    if _MESSAGE.match(text) and all(key.search(text) for key in _KEYS):
        raise ValueError(
            f"{name} is a text that lists messages: {text[:40]!r}; give the list itself, or, if this text is meant, a "
            "message that has it as content"
        )
    return text


def _completion(value: Any, name: str) -> str:
    if isinstance(value, str):
        return _plain(value, name)
    if not isinstance(value, list | dict):
        raise ValueError(f"{name} must be text or one assistant message, got {type(value).__name__}")
    if isinstance(value, dict) and "content" not in value:
        return _taskmaster(value)
    turns = parse_messages(value if isinstance(value, list) else [value], name)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise ValueError(f"{name} must be text or one assistant message")
    return _text_alone(turns[0], name)


def _text_alone(message: Message, name: str) -> str:
    """The text of an answer. Raises ValueError if it has calls or thinking, which a text cannot express."""
    more = [key for key in ("tool_calls", *THINKING) if key in message]
    if more:
        raise ValueError(
            f"{name} has {', '.join(more)}, but a completion must be a text here; write them into the text"
        )
    return message["content"]


def _taskmaster(turn: dict) -> str:
    """`text` unchanged, an API call as `call NAME {json}`, a response as its JSON."""
    if isinstance(turn.get("text"), str):
        return turn["text"]
    if isinstance(turn.get("api"), dict):
        return "\n".join(f"call {name} {_json(arguments)}" for name, arguments in turn["api"].items())
    if "response" in turn:
        return _json(turn["response"])
    raise ValueError(f"a Taskmaster turn must have text, api or response; got {_fields(turn)}")


def _ranking(prompt: list[Message], replies: list[tuple[Any, str]], **more) -> Ranking:
    if len(replies) < 2:
        raise ValueError(f"a ranking needs two completions or more, got {len(replies)}")
    ranks = [_number(rank, "ranks") for rank, _ in replies]
    completions = [_filled(text, f"completions[{i}]") for i, (_, text) in enumerate(replies)]
    if len(set(completions)) < len(completions):
        raise ValueError("two completions of a ranking are identical")
    return Ranking(prompt, completions, ranks, **more)


# OpenAssistant: a tree of messages; `rank` 0 is the best of the assistant replies to a message.


def is_tree(row: dict) -> bool:
    """Whether the row is an OpenAssistant tree."""
    return isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]


def _node(node: dict) -> Message:
    if not isinstance(node.get("text"), str) or node.get("role") not in ("prompter", "assistant"):
        raise ValueError(f"an OpenAssistant message must have text and role prompter or assistant; got {_fields(node)}")
    return {"role": "user" if node["role"] == "prompter" else "assistant", "content": node["text"]}


def _root(row: dict) -> dict:
    """The first message of a tree. Raises ValueError if it was deleted or rejected."""
    if _dropped(row["prompt"]):
        raise ValueError("the prompt of the tree was deleted or rejected in review")
    return row["prompt"]


def _dropped(node: dict) -> bool:
    return bool(node.get("deleted")) or node.get("review_result") is False


def _all_replies(node: dict) -> list[dict]:
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(r, dict) for r in replies):
        raise ValueError("replies must be a list of OpenAssistant messages")
    return replies


def _replies(node: dict) -> list[dict]:
    """Replies that were not deleted or rejected, best first. Those without a rank are at the end, in their order."""
    kept = [r for r in _all_replies(node) if not _dropped(r)]
    return sorted(kept, key=lambda r: float("inf") if r.get("rank") is None else _number(r["rank"], "rank"))


def _count_replies(node: dict) -> str:
    """How many replies to the first message there are and were dropped."""
    replies = _all_replies(node)
    if not replies:
        return "its prompt has no reply"
    deleted = sum(bool(reply.get("deleted")) for reply in replies)
    rejected = sum(map(_dropped, replies)) - deleted
    return f"of {len(replies)} replies {deleted} were deleted and {rejected} rejected in review"


def _tree_paths(node: dict, before: list[Message]) -> list[list[Message]]:
    """The conversations that follow the best assistant replies. Each ends with an assistant's message."""
    turns, replies = [*before, _node(node)], _replies(node)
    followed = replies[:1] if turns[-1]["role"] == "user" else replies
    paths = [path for reply in followed for path in _tree_paths(reply, turns)]
    return paths or [turns] * (turns[-1]["role"] == "assistant")


def _tree_rankings(node: dict, before: list[Message]) -> Iterator[tuple[list[Message], list[tuple[Any, str]]]]:
    turns = [*before, _node(node)]
    ranked = [(r["rank"], _node(r)["content"]) for r in _replies(node) if r.get("rank") is not None]
    if turns[-1]["role"] == "user" and len(ranked) > 1:
        yield turns, ranked
    for reply in _replies(node):
        yield from _tree_rankings(reply, turns)


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
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):  # numbers of a CSV are texts
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise ValueError(f"{name} must be a number (finite), got {value!r}")
    if abs(value) > 1e300:  # a whole number in JSON may be larger than every float
        raise ValueError(f"{name} is too large")
    return float(value)


def _rest(row: dict, *used: str) -> dict:
    return {name: value for name, value in row.items() if name not in used}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _names(row: dict) -> str:
    return f"got {_fields(row)} (other names can be mapped, for example with data.columns={{messages: dialogue}})"


def _fields(row: dict) -> str:
    return ", ".join(map(str, row)) or "no fields"
