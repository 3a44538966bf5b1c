"""Published demonstrations and prompts -> rows of ours (`messages`, or only `prompt`). There is one function per
format.

Fields that a function does not use stay in the row, such as ids, sources and licenses. `data/formats.py` reads `system`
as the system turn.
"""

import json
from typing import Any

from data.messages import join_text

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "tool_response": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
ALPACA = ("instruction", "input", "output", "text", "prompt", "history", "kto_tag")
CALL = ("api_call", "request", "api_response", "response")  # TM-4's annotations of one call


def rest(row: dict, *used: str) -> dict:
    """The fields that an adapter has not used."""
    return {name: value for name, value in row.items() if name not in used}


def beside(made: dict, columns: dict) -> dict:
    """A row of ours with the other fields of the published row. Raises ValueError if two have the same name."""
    if both := sorted(name for name, value in columns.items() if name in made and value not in (None, made[name])):
        raise ValueError(
            f"{', '.join(both)} is a column and also a field of the row that is made; rename the column, for example "
            f"with data.columns={{other: {both[0]}}}"
        )
    return made | {name: value for name, value in columns.items() if name not in made}


def text(row: dict, name: str) -> str:
    """The text in a field. Raises ValueError if the value is not a text."""
    if not isinstance(row.get(name), str):
        raise ValueError(f"{name} must be text, got {type(row.get(name)).__name__}")
    return row[name]


def optional_text(row: dict, name: str) -> str:
    """The text in a field that may be missing or null; then "". Raises ValueError if the value is not a text."""
    return "" if row.get(name) is None else text(row, name)


def listed(row: dict, name: str, kind: type) -> list:
    """The elements of a list, all of one type (str or dict). Raises ValueError if there is none, or another value."""
    values = row.get(name)
    if not isinstance(values, list) or not values:
        found = "an empty list" if values == [] else "null" if values is None else type(values).__name__
        raise ValueError(f"{name} must be a list with an element or more, got {found}")
    for i, value in enumerate(values):
        if not isinstance(value, kind):
            wanted = "text" if kind is str else "an object"
            raise ValueError(f"{name}[{i}] must be {wanted}, got {type(value).__name__}")
    return values


def asked(row: dict, name: str, more: str) -> str:
    """The text of a field, with that of an optional second field below it. Raises ValueError if both are blank."""
    parts = [part for part in (text(row, name), optional_text(row, more)) if part]
    if not "".join(parts).strip():
        raise ValueError(f"{name} has no text")
    return "\n\n".join(parts)


def alternating(*contents: str) -> list[dict]:
    """User, assistant, user, ... in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def alpaca(row: dict) -> dict:
    """An instruction, an optional input that is put below it, and an output.

    `text` and `prompt` repeat them in Alpaca's template. LLaMA-Factory adds `history`, earlier rounds, and `kto_tag`,
    a rating.
    """
    turns = [*past(row), *alternating(asked(row, "instruction", "input"), text(row, "output"))]
    return beside(rated(turns, row), rest(row, *ALPACA))


def past(row: dict) -> list[dict]:
    """LLaMA-Factory's `history`, a list of [question, answer]; no turns where the row has none."""
    rounds = row.get("history") or []
    if not isinstance(rounds, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(content, str) for content in pair)
        for pair in rounds
    ):
        raise ValueError("history must be a list of [question, answer], both texts")
    return alternating(*(content for pair in rounds for content in pair))


def rated(turns: list[dict], row: dict) -> dict:
    """A conversation; with LLaMA-Factory's `kto_tag`, its last answer and whether people found it good."""
    if row.get("kto_tag") is None:
        return {"messages": turns}
    if turns[-1]["role"] != "assistant":
        raise ValueError(f"kto_tag rates the last turn, which must be the assistant's, not of {turns[-1]['role']}")
    return {"prompt": turns[:-1], "completion": turns[-1]["content"], "label": row["kto_tag"]}


def alpaca_prompt(row: dict) -> dict:
    """Alpaca's fields without an answer: AlpacaEval's and PandaLM's instructions."""
    return beside({"prompt": asked(row, "instruction", "input")}, rest(row, "instruction", "input"))


def dolly(row: dict) -> dict:
    """An instruction, an optional context, and a response."""
    messages = alternating(asked(row, "instruction", "context"), text(row, "response"))
    return beside({"messages": messages}, rest(row, "instruction", "context", "response"))


def self_instruct(row: dict) -> dict:
    """A seed task, of which the first instance is used."""
    first = listed(row, "instances", dict)[0] | {"instruction": row.get("instruction")}
    messages = alternating(asked(first, "instruction", "input"), text(first, "output"))
    return beside({"messages": messages}, rest(row, "instruction", "instances"))


def sharegpt(row: dict) -> dict:
    """Turns of `from` and `value`. `from` has many spellings.

    Calls (`function_call`) are refused, as their form varies. LLaMA-Factory adds `kto_tag`, a rating.
    """
    turns = []
    for i, turn in enumerate(listed(row, "conversations", dict)):
        role = ROLES.get(turn.get("from"))
        if role is None:
            raise ValueError(f"conversations[{i}] is from {turn.get('from')!r}; known: {', '.join(ROLES)}")
        weight = {"weight": turn["weight"]} if turn.get("weight") is not None else {}
        turns.append({"role": role, "content": text(turn, "value")} | weight)
    return beside(rated(turns, row), rest(row, "conversations", "kto_tag"))


def lima(row: dict) -> dict:
    """A list of texts that begins with the user's. Rows of LIMA's test set have only a prompt."""
    turns = alternating(*listed(row, "conversations", str))
    if len(turns) == 1:
        return beside({"prompt": turns}, rest(row, "conversations"))
    return beside({"messages": turns}, rest(row, "conversations"))


def ultrachat(row: dict) -> dict:
    """UltraChat as first published: a list of texts that begins with the user's."""
    return beside({"messages": alternating(*listed(row, "data", str))}, rest(row, "data"))


def capybara(row: dict) -> dict:
    """Exchanges of `input` and `output`."""
    exchanges = listed(row, "conversation", dict)
    turns = [content for turn in exchanges for content in (text(turn, "input"), text(turn, "output"))]
    return beside({"messages": alternating(*turns)}, rest(row, "conversation"))


def chats(row: dict) -> dict:
    """LMSYS-Chat-1M and WildChat: messages under `conversation`. Other fields of a message are not text."""
    turns = [{"role": turn["role"], "content": text(turn, "content")} for turn in listed(row, "conversation", dict)]
    return beside({"messages": turns}, rest(row, "conversation"))


def openorca(row: dict) -> dict:
    """A system prompt, a question and a response."""
    turns = {"system": row.get("system_prompt"), "messages": alternating(text(row, "question"), text(row, "response"))}
    return beside(turns, rest(row, "system_prompt", "question", "response"))


def gsm8k(row: dict) -> dict:
    """A question and its solution, which serves as a demonstration or as the reference of reward=math."""
    return beside({"prompt": text(row, "question"), "answer": text(row, "answer")}, rest(row, "question", "answer"))


def competition_math(row: dict) -> dict:
    """Hendrycks' MATH: a problem and its solution with the answer in \\boxed{}. MATH-500 also has the answer alone."""
    answer = text(row, "solution") if row.get("answer") is None else text(row, "answer")
    return beside({"prompt": text(row, "problem"), "answer": answer}, rest(row, "problem", "answer"))


def mbpp(row: dict) -> dict:
    """A task in words (`text`, or `prompt` in the sanitized set), and asserts that its code must pass.

    The prompt shows the first assert, because it names the function. What the asserts need to run (`test_imports`,
    `test_setup_code`) is put before them.
    """
    tests = listed(row, "test_list", str)
    needed = [] if row.get("test_imports") in (None, []) else listed(row, "test_imports", str)
    needed += [code] if (code := optional_text(row, "test_setup_code")) else []
    asked = text(row, "text" if "text" in row else "prompt")
    shown = {"prompt": f"{asked}\nYour code should pass this test:\n{tests[0]}", "test_list": [*needed, *tests]}
    return beside(shown, rest(row, "text", "prompt", "test_list", "test_imports", "test_setup_code"))


def questions(row: dict) -> dict:
    """FastChat's questions (MT-Bench, Vicuna, Arena-Hard): the user's turns. The first turn is the prompt.

    The Hub's copy of MT-Bench has them under `prompt`.
    """
    name = "turns" if "turns" in row else "prompt"
    turns = row[name]
    turns = [turns] if isinstance(turns, str) else turns
    contents = [turn["content"] if isinstance(turn, dict) else turn for turn in turns]
    first, *later = (join_text(content, f"{name}[{i}]") for i, content in enumerate(contents))
    return beside({"prompt": first, "later_turns": later}, rest(row, name))


def taskmaster(row: dict) -> dict:
    """Utterances of a dialogue and its API calls. Calls are the assistant's turns, responses the tool's.

    Consecutive utterances of one speaker are one turn. TM-1 and TM-2 have no calls. TM-3 has `apis` before the
    utterance that needs them. TM-4 has them in `annotations` after the user's utterance.
    """
    turns: list[dict] = []
    for line in listed(row, "utterances", dict):
        role = {"user": "user", "assistant": "assistant"}.get(str(line.get("speaker")).lower())
        if role is None:
            raise ValueError(f"an utterance must be by USER or ASSISTANT, got speaker {line.get('speaker')!r}")
        apis = listed(line, "apis", dict) if line.get("apis") not in (None, []) else []
        before = [(text(api, "name"), api.get("args"), api.get("response")) for api in apis]
        turns += _calls(before)
        if turns and turns[-1]["role"] == role and not before:
            turns[-1]["content"] += f"\n{text(line, 'text')}"
        else:
            turns.append({"role": role, "content": text(line, "text")})
        turns += _calls(_annotated(line))
    return beside({"messages": turns}, rest(row, "utterances"))


def taskmaster_reward(row: dict) -> dict:
    """A rated generation whose context and generation are JSON texts."""
    return row | {name: _json(text(row, name), name) for name in ("context", "generation")}


def _annotated(line: dict) -> list[tuple[str, Any, Any]]:
    """(name, arguments, response) of an utterance's annotations in TM-4: the entries of each call, in order.

    A call without arguments has no `request`.
    """
    calls: list[tuple[str, Any, Any]] = []
    call: dict[str, str] = {}
    for entry in listed(line, "annotations", dict) if line.get("annotations") not in (None, []) else []:
        name = text(entry, "name")
        if name not in CALL or name in call or (name == "api_call") != (not call):
            raise ValueError(f"annotations must have {', '.join(CALL)} in this order, got {name!r}")
        call[name] = text(entry, "value")
        if name == "response":
            arguments, response = (_json(call.get(part, "{}"), part) for part in ("request", "response"))
            calls.append((call["api_call"], arguments, response))
            call = {}
    if call:
        raise ValueError(f"annotations end within a call: after {', '.join(call)} the response is missing")
    return calls


def _json(content: str, name: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None


def _calls(calls: list[tuple[str, Any, Any]]) -> list[dict]:
    turns = []
    for name, arguments, response in calls:
        turns.append({"role": "assistant", "content": f"call {name} {json.dumps(arguments, ensure_ascii=False)}"})
        turns.append({"role": "tool", "content": json.dumps({name: response}, ensure_ascii=False)})
    return turns
