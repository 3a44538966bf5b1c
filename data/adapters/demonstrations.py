"""Published demonstrations and prompts -> rows of ours (`messages`, or `prompt` alone). One function a format.

What a function does not use stays in the row: ids, sources and licenses travel along, and `system` is read by
`data/formats.py` as the system turn.
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
    """The text in a field; raises ValueError where it holds something else."""
    if not isinstance(row.get(name), str):
        raise ValueError(f"{name} must be text, got {type(row.get(name)).__name__}")
    return row[name]


def alternating(*contents: str) -> list[dict]:
    """User, assistant, user, ... in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def alpaca(row: dict) -> dict:
    """Instruction with perhaps an input below it, and an output. `text` is the same in Alpaca's own template."""
    asked = text(row, "instruction")
    if row.get("input"):
        asked += f"\n\n{text(row, 'input')}"
    return {"messages": alternating(asked, text(row, "output"))} | rest(row, "instruction", "input", "output", "text")


def alpaca_prompt(row: dict) -> dict:
    """The same without an answer: AlpacaEval's and PandaLM's instructions."""
    asked = text(row, "instruction") + (f"\n\n{text(row, 'input')}" if row.get("input") else "")
    return {"prompt": asked} | rest(row, "instruction", "input")


def dolly(row: dict) -> dict:
    """Instruction, perhaps a context that it is about, and a response."""
    asked = text(row, "instruction") + (f"\n\n{text(row, 'context')}" if row.get("context") else "")
    return {"messages": alternating(asked, text(row, "response"))} | rest(row, "instruction", "context", "response")


def self_instruct(row: dict) -> dict:
    """A seed task counts with its first instance."""
    first = row["instances"][0] if isinstance(row["instances"], list) and row["instances"] else None
    if not isinstance(first, dict):
        raise ValueError("instances must be a list of {input, output}")
    asked = text(row, "instruction") + (f"\n\n{text(first, 'input')}" if first.get("input") else "")
    return {"messages": alternating(asked, text(first, "output"))} | rest(row, "instruction", "instances")


def sharegpt(row: dict) -> dict:
    """Turns of `from` and `value`; `from` has many spellings. A call (`function_call`) is refused: its form varies."""
    turns = []
    for i, turn in enumerate(row["conversations"]):
        role = ROLES.get(turn.get("from"))
        if role is None:
            raise ValueError(f"conversations[{i}] is from {turn.get('from')!r}; known: {', '.join(ROLES)}")
        weight = {"weight": turn["weight"]} if turn.get("weight") is not None else {}
        turns.append({"role": role, "content": text(turn, "value")} | weight)
    return {"messages": turns} | rest(row, "conversations")


def lima(row: dict) -> dict:
    """A list of texts, user first. LIMA's test set has a prompt alone."""
    turns = alternating(*row["conversations"])
    if len(turns) == 1:
        return {"prompt": turns} | rest(row, "conversations")
    return {"messages": turns} | rest(row, "conversations")


def ultrachat(row: dict) -> dict:
    """UltraChat as first published: a list of texts, user first."""
    return {"messages": alternating(*row["data"])} | rest(row, "data")


def capybara(row: dict) -> dict:
    """Exchanges of `input` and `output`."""
    turns = [content for turn in row["conversation"] for content in (text(turn, "input"), text(turn, "output"))]
    return {"messages": alternating(*turns)} | rest(row, "conversation")


def chats(row: dict) -> dict:
    """LMSYS-Chat-1M and WildChat: messages under `conversation`; what else a message carries is not text."""
    turns = [{"role": turn["role"], "content": text(turn, "content")} for turn in row["conversation"]]
    return {"messages": turns} | rest(row, "conversation")


def openorca(row: dict) -> dict:
    """System prompt, question, response."""
    asked = {"system": row.get("system_prompt"), "messages": alternating(text(row, "question"), text(row, "response"))}
    return asked | rest(row, "system_prompt", "question", "response")


def gsm8k(row: dict) -> dict:
    """A question and its worked answer, which is a demonstration, or what reward=math compares with."""
    return {"prompt": text(row, "question"), "answer": text(row, "answer")} | rest(row, "question", "answer")


def competition_math(row: dict) -> dict:
    """Hendrycks' MATH: a problem and its solution with the answer in \\boxed{}; MATH-500 has the answer by itself."""
    answer = row["answer"] if isinstance(row.get("answer"), str) else text(row, "solution")
    return {"prompt": text(row, "problem"), "answer": answer} | rest(row, "problem", "answer")


def mbpp(row: dict) -> dict:
    """A task in words, and the asserts that its code must pass; the first is shown, as it says what to call it."""
    if not isinstance(row["test_list"], list) or not row["test_list"]:
        raise ValueError("test_list holds no test")
    return {"prompt": f"{text(row, 'text')}\nYour code should pass this test:\n{row['test_list'][0]}"} | rest(
        row, "text"
    )


def questions(row: dict) -> dict:
    """FastChat's questions (MT-Bench, Vicuna, Arena-Hard): what the user asks turn by turn; the prompt is the first."""
    turns = row["turns"]
    turns = [turns] if isinstance(turns, str) else turns
    contents = [turn["content"] if isinstance(turn, dict) else turn for turn in turns]
    first, *later = (join_text(content, f"turns[{i}]") for i, content in enumerate(contents))
    return {"prompt": first, "later_turns": later} | rest(row, "turns")


def taskmaster(row: dict) -> dict:
    """Utterances of a dialogue with the API calls beside them: calls are the assistant's, responses the tool's.

    Utterances of one speaker in a row are one turn. TM-1 and TM-2 have no calls, TM-3 has `apis` before the utterance
    that needs them, TM-4 has them in `annotations` after the user's.
    """
    turns: list[dict] = []
    for line in row["utterances"]:
        role = {"user": "user", "assistant": "assistant"}.get(str(line.get("speaker")).lower())
        if role is None:
            raise ValueError(f"an utterance is by USER or ASSISTANT, got speaker {line.get('speaker')!r}")
        before = [(api["name"], api.get("args"), api.get("response")) for api in line.get("apis") or []]
        turns += _calls(before)
        if turns and turns[-1]["role"] == role and not before:
            turns[-1]["content"] += f"\n{text(line, 'text')}"
        else:
            turns.append({"role": role, "content": text(line, "text")})
        turns += _calls(_annotated(line.get("annotations") or []))
    return {"messages": turns} | rest(row, "utterances")


def taskmaster_reward(row: dict) -> dict:
    """A rated generation whose context and generation are JSON in a text."""
    return row | {"context": json.loads(row["context"]), "generation": json.loads(row["generation"])}


def _annotated(annotations: list[dict]) -> list[tuple[str, Any, Any]]:
    """(name, arguments, response) of TM-4's annotations: four entries a call, in order."""
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
