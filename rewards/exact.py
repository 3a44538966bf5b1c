"""reward=exact: 1 if a completion equals the answer exactly."""

from evals.judge_text import without_thinking


def exact(prompts: list[str], completions: list[str], answer: list, *, ignore_case: bool = False) -> list[float | None]:
    """1.0 or 0.0 per completion. None if the record has no answer. Surrounding space and thinking are ignored."""

    def plain(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    return [
        None if a is None else float(plain(without_thinking(completion) or "") == plain(str(a)))
        for completion, a in zip(completions, answer, strict=True)
    ]
