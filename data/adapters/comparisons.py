"""Published comparisons, rankings and ratings -> rows of ours: prompt with chosen/rejected, completions/ranks or
completion/reward. There is one function per format. A pair without a preference becomes a tie.
"""

import json
import re
from typing import Any

from data.adapters.demonstrations import alternating, asked, beside, listed, past, rest, sharegpt, text
from data.messages import join_text, parse_hh

WINNERS = {"model_a": 1, "model_b": -1, "tie": 0, "tie (bothbad)": 0, "both_bad": 0}
ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def pair(prompt: Any, first: Any, second: Any, preference: float, columns: dict) -> dict:
    """A row with two sides. `preference` above 0 is for the first, below 0 for the second, 0 is a tie."""
    chosen, rejected = (second, first) if preference < 0 else (first, second)
    return beside({"prompt": prompt, "chosen": chosen, "rejected": rejected, "tie": preference == 0}, columns)


def whole(value: Any, name: str, *allowed: int) -> int:
    """A label that must be one of a few whole numbers. A text, as in a CSV, is converted."""
    try:
        number = number_of(value, name)
    except (TypeError, ValueError):
        number = float("nan")
    if number not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    return int(number)


def number_of(value: Any, name: str) -> float:
    """A finite number. A text, as in a CSV, is converted. Raises ValueError for any other value."""
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf"):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return number


def openai_preference(row: dict) -> dict:
    """OpenAI's preference files: `input.messages`, and the two outputs as lists of messages."""
    messages = listed(row["input"], "messages", dict)
    row = {"tools": row["input"].get("tools") or None} | row
    made = {"prompt": messages, "chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    return beside(made, rest(row, "input", "preferred_output", "non_preferred_output"))


def orca_dpo(row: dict) -> dict:
    """Intel's pairs: `system`, `question` and two texts."""
    return beside({"prompt": text(row, "question")}, rest(row, "question"))


def distilabel_orca(row: dict) -> dict:
    """Distilabel's version of Intel's pairs: the question is `input`, and rows that it marks as ties are ties."""
    return beside({"prompt": text(row, "input"), "tie": row.get("status") == "tie"}, rest(row, "input", "status"))


def alpaca_dpo(row: dict) -> dict:
    """LLaMA-Factory's pairs in Alpaca's fields, with earlier rounds in `history`."""
    turns = [*past(row), *alternating(asked(row, "instruction", "input"))]
    return beside({"prompt": turns}, rest(row, "instruction", "input", "history"))


def alpaca_farm(row: dict) -> dict:
    """AlpacaFarm's comparisons: Alpaca's fields, two outputs, and `preference`: 1, 2, or 1.5 for AlpacaEval's ties."""
    preference = number_of(row["preference"], "preference")
    if preference not in (1, 1.5, 2):
        raise ValueError(f"preference must be one of 1, 1.5, 2, got {row['preference']!r}")
    columns = rest(row, "instruction", "input", "output_1", "output_2", "preference")
    sides = text(row, "output_1"), text(row, "output_2")
    return pair(asked(row, "instruction", "input"), *sides, 1.5 - preference, columns)


def sharegpt_dpo(row: dict) -> dict:
    """LLaMA-Factory's pairs in ShareGPT's fields: the conversation, then two last turns."""
    begun = sharegpt(row)
    sides = {name: text(row[name], "value") for name in ("chosen", "rejected")}
    return rest(begun, "messages") | {"prompt": begun["messages"]} | sides


def ultrafeedback(row: dict) -> dict:
    """UltraFeedback as published: four completions with ratings, ranked by the mean of the ratings.

    `overall_score` is not used, because it has a known error (10 for 1). Each completion had its own system prompt,
    which stays in `completions_of`.
    """
    ranks = []
    for i, completion in enumerate(listed(row, "completions", dict)):
        ratings = [completion["annotations"][aspect].get("Rating") for aspect in ASPECTS]
        numbers = [whole(rating, "Rating", 1, 2, 3, 4, 5) for rating in ratings if rating not in (None, "N/A")]
        if not numbers:
            raise ValueError(f"completions[{i}] has no rating")
        ranks.append(-sum(numbers) / len(numbers))
    texts = [text(completion, "response") for completion in row["completions"]]
    columns = rest(row, "instruction", "completions") | {"completions_of": [c.get("model") for c in row["completions"]]}
    return beside({"prompt": text(row, "instruction"), "completions": texts, "ranks": ranks}, columns)


def shp(row: dict) -> dict:
    """Stanford Human Preferences: a post and two comments. `labels` is 1 if A is preferred."""
    sides = text(row, "human_ref_A"), text(row, "human_ref_B")
    preference = 1 if whole(row["labels"], "labels", 0, 1) else -1
    columns = rest(row, "history", "human_ref_A", "human_ref_B", "labels")
    return pair(text(row, "history"), *sides, preference, columns)


def helpsteer(row: dict) -> dict:
    """HelpSteer and HelpSteer2: one response with ratings from 0 to 4. The reward is its helpfulness / 4.

    Earlier turns are in the prompt, separated by the marks "<extra_id_1>User" and "<extra_id_1>Assistant".
    """
    reward = whole(row["helpfulness"], "helpfulness", 0, 1, 2, 3, 4) / 4
    answer = {"prompt": _helpsteer_turns(row), "completion": text(row, "response"), "reward": reward}
    return beside(answer, rest(row, "prompt", "response"))


def _helpsteer_turns(row: dict) -> list[dict]:
    """The turns of a prompt with marks. A mark in another place is refused: it would be trained on as text."""
    first, *later = re.split(r"\n?<extra_id_1>(User|Assistant)\n", text(row, "prompt"))
    if any("<extra_id_" in content for content in (first, *later)):
        raise ValueError("prompt holds a mark <extra_id_...> that begins no line of a User or an Assistant")
    turns = [{"role": r.lower(), "content": c} for r, c in zip(later[::2], later[1::2], strict=True) if c.strip()]
    return [*alternating(first), *turns]


def helpsteer2_preference(row: dict) -> dict:
    """HelpSteer2-Preference: strength from -3 to 3, below 0 for the first response; prompts as in `helpsteer`."""
    strength = whole(row["preference_strength"], "preference_strength", *range(-3, 4))
    columns = rest(row, "prompt", "response_1", "response_2") | {"margin": abs(float(strength))}
    return pair(_helpsteer_turns(row), text(row, "response_1"), text(row, "response_2"), -strength, columns)


def helpsteer3(row: dict) -> dict:
    """HelpSteer3: messages as context, overall preference from -3 to 3, below 0 for the first response."""
    strength = whole(row["overall_preference"], "overall_preference", *range(-3, 4))
    columns = rest(row, "context", "response1", "response2") | {"margin": abs(float(strength))}
    return pair(row["context"], text(row, "response1"), text(row, "response2"), -strength, columns)


def pku_better(row: dict) -> dict:
    """PKU-SafeRLHF, compared by helpfulness: `better_response_id`."""
    return _pku(row, "better_response_id")


def pku_safer(row: dict) -> dict:
    """PKU-SafeRLHF, compared by harmlessness: `safer_response_id`."""
    return _pku(row, "safer_response_id")


def _pku(row: dict, name: str) -> dict:
    preference = 1 - 2 * whole(row[name], name, 0, 1)
    columns = rest(row, "prompt", "response_0", "response_1")
    return pair(text(row, "prompt"), text(row, "response_0"), text(row, "response_1"), preference, columns)


def nectar(row: dict) -> dict:
    """Nectar: seven answers with ranks from 1, to a conversation in Anthropic's form."""
    answers = [text(answer, "answer") for answer in listed(row, "answers", dict)]
    ranks = [answer["rank"] for answer in row["answers"]]
    prompt = parse_hh("\n\n" + text(row, "prompt").strip(), "prompt")
    return beside({"prompt": prompt, "completions": answers, "ranks": ranks}, rest(row, "prompt", "answers"))


def arena(row: dict) -> dict:
    """Chatbot Arena's battles (33k, 100k, 140k): the last answers of two conversations with equal earlier turns."""
    if row["winner"] not in WINNERS:
        raise ValueError(f"winner must be one of {', '.join(WINNERS)}, got {row['winner']!r}")
    first, second = (_content_alone(row[f"conversation_{side}"]) for side in "ab")
    if first[:-1] != second[:-1]:
        raise ValueError(
            "the two models' earlier answers differ, so their last answers belong to different conversations"
        )
    columns = rest(row, "conversation_a", "conversation_b", "full_conversation", "winner")
    columns |= {"both_bad": True} if "bad" in row["winner"] else {}
    return pair(first[:-1], [first[-1]], [second[-1]], WINNERS[row["winner"]], columns)


def _content_alone(messages: Any) -> list[dict]:
    """Role and text of a conversation. Messages of the 140k set also have counts and parts."""
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError("conversation_a and conversation_b must be lists of messages")
    return [
        {"role": message["role"], "content": join_text(message["content"], f"conversation[{i}]")}
        for i, message in enumerate(messages)
    ]


def arena_55k(row: dict) -> dict:
    """LMSYS's Kaggle set: prompts and responses are JSON lists of turns, the winner is in three columns of 0 and 1."""
    turns, first, second = (_texts(row, name) for name in ("prompt", "response_a", "response_b"))
    if len(turns) != 1 or len(first) != 1 or len(second) != 1:
        raise ValueError(
            "the two models' earlier answers differ, so their last answers belong to different conversations"
        )
    votes = {name: whole(row[name], name, 0, 1) for name in ("winner_model_a", "winner_model_b", "winner_tie")}
    if sum(votes.values()) != 1:
        raise ValueError(f"one of winner_model_a, winner_model_b and winner_tie must be 1, got {votes}")
    columns = rest(row, "prompt", "response_a", "response_b", *votes)
    return pair(turns[0], first[0], second[0], votes["winner_model_a"] - votes["winner_model_b"], columns)


def _texts(row: dict, name: str) -> list[str]:
    """The texts of a JSON list. Raises ValueError where one is null, as for an answer that was never made."""
    try:
        turns = json.loads(text(row, name))
    except ValueError as error:
        raise ValueError(f"{name} is not a JSON list of texts: {error}") from None
    return listed({name: turns}, name, str)


def webgpt(row: dict) -> dict:
    """WebGPT comparisons: two answers with scores that sum to 0."""
    columns = rest(row, "question", "answer_0", "answer_1")
    preference = number_of(row["score_0"], "score_0") - number_of(row["score_1"], "score_1")
    return pair(text(row["question"], "full_text"), text(row, "answer_0"), text(row, "answer_1"), preference, columns)


def summaries(row: dict) -> dict:
    """OpenAI's summarize-from-feedback comparisons: a post, two summaries, and `choice` 0 or 1."""
    post = text(row["info"], "post" if row["info"].get("post") is not None else "article")
    first, second = (text(summary, "text") for summary in listed(row, "summaries", dict))
    preference = 1 - 2 * whole(row["choice"], "choice", 0, 1)
    return pair(f"{post}\n\nTL;DR:", first, second, preference, rest(row, "info", "summaries", "choice"))
