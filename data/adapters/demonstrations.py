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


def rest(row: dict, *used: str) -> dict:
    """The fields that an adapter has not used."""
    return {name: value for name, value in row.items() if name not in used}


def text(row: dict, name: str) -> str:
    """The text in a field. Raises ValueError if the value is not a text."""
    if not isinstance(row.get(name), str):
        raise ValueError(f"{name} must be text, got {type(row.get(name)).__name__}")
    return row[name]


def alternating(*contents: str) -> list[dict]:
    """User, assistant, user, ... in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def alpaca(row: dict) -> dict:
    """An instruction, an optional input that is put below it, and an output.

    `text` repeats them in Alpaca's template.
    """
    asked = text(row, "instruction")
    if row.get("input"):
        asked += f"\n\n{text(row, 'input')}"
    return {"messages": alternating(asked, text(row, "output"))} | rest(row, "instruction", "input", "output", "text")


def alpaca_prompt(row: dict) -> dict:
    """Alpaca's fields without an answer: AlpacaEval's and PandaLM's instructions."""
    asked = text(row, "instruction") + (f"\n\n{text(row, 'input')}" if row.get("input") else "")
    return {"prompt": asked} | rest(row, "instruction", "input")


def dolly(row: dict) -> dict:
    """An instruction, an optional context, and a response."""
    asked = text(row, "instruction") + (f"\n\n{text(row, 'context')}" if row.get("context") else "")
    return {"messages": alternating(asked, text(row, "response"))} | rest(row, "instruction", "context", "response")


def self_instruct(row: dict) -> dict:
    """A seed task, of which the first instance is used."""
    first = row["instances"][0] if isinstance(row["instances"], list) and row["instances"] else None
    if not isinstance(first, dict):
        raise ValueError("instances must be a list of {input, output}")
    asked = text(row, "instruction") + (f"\n\n{text(first, 'input')}" if first.get("input") else "")
    return {"messages": alternating(asked, text(first, "output"))} | rest(row, "instruction", "instances")


def sharegpt(row: dict) -> dict:
    """Turns of `from` and `value`. `from` has many spellings.

    Calls (`function_call`) are refused, as their form varies.
    """
    turns = []
    for i, turn in enumerate(row["conversations"]):
        role = ROLES.get(turn.get("from"))
        if role is None:
            raise ValueError(f"conversations[{i}] is from {turn.get('from')!r}; known: {', '.join(ROLES)}")
        weight = {"weight": turn["weight"]} if turn.get("weight") is not None else {}
        turns.append({"role": role, "content": text(turn, "value")} | weight)
    return {"messages": turns} | rest(row, "conversations")


def lima(row: dict) -> dict:
    """A list of texts that begins with the user's. Rows of LIMA's test set have only a prompt."""
    turns = alternating(*row["conversations"])
    if len(turns) == 1:
        return {"prompt": turns} | rest(row, "conversations")
    return {"messages": turns} | rest(row, "conversations")


def ultrachat(row: dict) -> dict:
    """UltraChat as first published: a list of texts that begins with the user's."""
    return {"messages": alternating(*row["data"])} | rest(row, "data")


def capybara(row: dict) -> dict:
    """Exchanges of `input` and `output`."""
    turns = [content for turn in row["conversation"] for content in (text(turn, "input"), text(turn, "output"))]
    return {"messages": alternating(*turns)} | rest(row, "conversation")


def chats(row: dict) -> dict:
    """LMSYS-Chat-1M and WildChat: messages under `conversation`. Other fields of a message are not text."""
    turns = [{"role": turn["role"], "content": text(turn, "content")} for turn in row["conversation"]]
    return {"messages": turns} | rest(row, "conversation")


def openorca(row: dict) -> dict:
    """A system prompt, a question and a response."""
    asked = {"system": row.get("system_prompt"), "messages": alternating(text(row, "question"), text(row, "response"))}
    return asked | rest(row, "system_prompt", "question", "response")


def gsm8k(row: dict) -> dict:
    """A question and its solution, which serves as a demonstration or as the reference of reward=math."""
    return {"prompt": text(row, "question"), "answer": text(row, "answer")} | rest(row, "question", "answer")


def competition_math(row: dict) -> dict:
    """Hendrycks' MATH: a problem and its solution with the answer in \\boxed{}. MATH-500 also has the answer alone."""
    answer = row["answer"] if isinstance(row.get("answer"), str) else text(row, "solution")
    return {"prompt": text(row, "problem"), "answer": answer} | rest(row, "problem", "answer")


def mbpp(row: dict) -> dict:
    """A task in words, and asserts that its code must pass.

    The prompt shows the first, because it names the function.
    """
    if not isinstance(row["test_list"], list) or not row["test_list"]:
        raise ValueError("test_list has no test")
    return {"prompt": f"{text(row, 'text')}\nYour code should pass this test:\n{row['test_list'][0]}"} | rest(
        row, "text"
    )


def questions(row: dict) -> dict:
    """FastChat's questions (MT-Bench, Vicuna, Arena-Hard): the user's turns. The first turn is the prompt."""
    turns = row["turns"]
    turns = [turns] if isinstance(turns, str) else turns
    contents = [turn["content"] if isinstance(turn, dict) else turn for turn in turns]
    first, *later = (join_text(content, f"turns[{i}]") for i, content in enumerate(contents))
    return {"prompt": first, "later_turns": later} | rest(row, "turns")


def taskmaster(row: dict) -> dict:
    """Utterances of a dialogue and its API calls. Calls are the assistant's turns, responses the tool's.

    Consecutive utterances of one speaker are one turn. TM-1 and TM-2 have no calls. TM-3 has `apis` before the
    utterance that needs them. TM-4 has them in `annotations` after the user's utterance.
    """
    turns: list[dict] = []
    for line in row["utterances"]:
        role = {"user": "user", "assistant": "assistant"}.get(str(line.get("speaker")).lower())
        if role is None:
            raise ValueError(f"an utterance must be by USER or ASSISTANT, got speaker {line.get('speaker')!r}")
        before = [(api["name"], api.get("args"), api.get("response")) for api in line.get("apis") or []]
        turns += _calls(before)
        if turns and turns[-1]["role"] == role and not before:
            turns[-1]["content"] += f"\n{text(line, 'text')}"
        else:
            turns.append({"role": role, "content": text(line, "text")})
        turns += _calls(_annotated(line.get("annotations") or []))
    return {"messages": turns} | rest(row, "utterances")


def taskmaster_reward(row: dict) -> dict:
    """A rated generation whose context and generation are JSON texts."""
    return row | {"context": json.loads(row["context"]), "generation": json.loads(row["generation"])}


def _annotated(annotations: list[dict]) -> list[tuple[str, Any, Any]]:
    """(name, arguments, response) of TM-4's annotations, which have four entries per call, in order."""
    calls, values = [], {}
    for entry in annotations:
        values[entry["name"]] = entry["value"]
        if entry["name"] == "response":
            calls.append((values["api_call"], json.loads(values["request"]), json.loads(entry["value"])))
    return calls


def _calls(calls: list[tuple[str, Any, Any]]) -> list[dict]:
    turns = []
    for name, arguments, response in calls:
        turns.append({"role": "assistant", "content": f"call {name} {json.dumps(arguments, ensure_ascii=False)}"})
        turns.append({"role": "tool", "content": json.dumps({name: response}, ensure_ascii=False)})
    return turns
