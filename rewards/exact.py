"""reward=exact: 1 where a completion is the answer, letter for letter."""

from evals.judge_text import without_thinking


def exact(prompts: list[str], completions: list[str], answer: list, *, ignore_case: bool = False) -> list[float | None]:
    """1.0 or 0.0 a completion, None where the record has no answer. Space around both, and thinking, do not count."""

    def plain(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    return [
        None if a is None else float(plain(without_thinking(completion) or "") == plain(str(a)))
        for completion, a in zip(completions, answer, strict=True)
    ]
