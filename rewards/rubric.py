"""reward={name: rubric, client: {...}}: a list of weighted criteria for each prompt, checked by another model."""

import json
from functools import partial
from pathlib import Path

from evals.judge_text import json_objects
from generation.build_client import client_of

SCHEMA = {
    "type": "object",
    "properties": {"explanation": {"type": "string"}, "criteria_met": {"type": "boolean"}},
    "required": ["explanation", "criteria_met"],
}


class Rubric:
    """Points reached over the largest possible points, as HealthBench (Arora et al. 2025, arXiv:2505.08775) scores.

        reward = sum of the points of the criteria that are met / sum of the positive points

    It is at most 1, and below 0 if criteria with negative points outweigh. None if the record has no rubric, or if the
    judge's answer on one of its criteria cannot be read. The column is HealthBench's:
    `rubrics`: [{"criterion": "Says that ...", "points": 5}, {"criterion": "Invents ...", "points": -3}].

    Args:
        directory: for the client's answers. client: the model that checks (`rewards/judge.py`).
    """

    def __init__(self, directory: Path, client: dict, max_tokens: int = 512, temperature: float = 0.0, seed: int = 0):
        ask = client_of(client, directory).ask
        self.ask = partial(ask, schema=SCHEMA, temperature=temperature, max_tokens=max_tokens, seed=seed)

    def __call__(self, prompts: list[str], completions: list[str], rubrics: list) -> list[float | None]:
        rows = [(row, *checked(item)) for row, rubric in enumerate(rubrics) for item in rubric or []]
        talks = [question(prompts[row], completions[row], criterion) for row, criterion, _ in rows]
        answers = self.ask(talks) if talks else []
        reached: dict[int, float | None] = {}
        possible: dict[int, float] = {}
        for (row, _, points), answer in zip(rows, answers, strict=True):
            met = None if answer.missing or answer.finish_reason != "stop" else is_met(answer.text)
            before = reached.get(row, 0.0)
            reached[row] = None if met is None or before is None else before + points * met
            possible[row] = possible.get(row, 0.0) + max(points, 0.0)
        if empty := [row for row, most in possible.items() if most <= 0]:
            raise ValueError(
                f"the rubric of {prompts[empty[0]][:80]!r} has no positive points; it needs at least one criterion "
                "with positive points"
            )
        return [None if reached.get(row) is None else reached[row] / possible[row] for row in range(len(completions))]


def checked(item: dict) -> tuple[str, float]:
    """(criterion, points). Raises ValueError if the item is not a criterion."""
    fits = isinstance(item, dict) and isinstance(item.get("criterion"), str)
    if not fits or isinstance(item.get("points"), bool) or not isinstance(item.get("points"), int | float):
        raise ValueError(f'{str(item)[:80]} is not a criterion; it must be {{"criterion": TEXT, "points": NUMBER}}')
    return item["criterion"], float(item["points"])


def question(prompt: str, completion: str, criterion: str) -> list[dict[str, str]]:
    """The request to the model about one criterion."""
    text = (
        "Decide whether the last answer of a conversation meets one criterion. One that describes something bad "
        "is met where the answer has it. Judge this criterion alone.\n\n"
        f"--- conversation ---\n{prompt}\n\n--- answer ---\n{completion}\n\n--- criterion ---\n{criterion}\n\n--- end "
        '---\n\nReply with JSON alone: {"explanation": "one sentence", "criteria_met": true or false}'
    )
    return [{"role": "user", "content": text}]


def is_met(text: str) -> bool | None:
    """The reply's criteria_met. None if it has none."""
    for _, found in reversed([*json_objects(text)]):
        try:
            met = json.loads(found).get("criteria_met")
        except ValueError:
            continue
        if isinstance(met, bool):
            return met
    return None
