"""reward=exact: 1 if a completion equals the answer exactly."""

import math

from evals.judge_text import without_thinking


def exact(prompts: list[str], completions: list[str], answer: list, *, ignore_case: bool = False) -> list[float | None]:
    """1.0 or 0.0 per completion. None if the record has no answer. Surrounding space and thinking are ignored.

    Raises:
        ValueError: an answer is no text and no number.
    """

    def plain(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    return [
        None if a is None else float(plain(without_thinking(completion) or "") == plain(answer_text(a)))
        for completion, a in zip(completions, answer, strict=True)
    ]


def answer_text(answer) -> str:
    """The answer in a record as text. Raises ValueError if it is no text and no finite number."""
    number = isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)
    if not number and not isinstance(answer, str):
        raise ValueError(f"the answer {str(answer)[:80]} must be one text or number, got {type(answer).__name__}")
    return str(answer)
