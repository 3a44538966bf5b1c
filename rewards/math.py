"""reward=math: 1 for the right answer to a mathematical question, else 0."""

from evals.benchmarks.gsm8k import gold_number, last_number
from evals.judge_text import without_thinking
from rewards.exact import answer_text


def math(prompts: list[str], completions: list[str], answer: list, *, symbolic: bool = False) -> list[float | None]:
    """1.0 or 0.0 per completion. None if the record has no answer.

    Args:
        answer: the solution: GSM8K's (with its number after ####), one in \\boxed{}, or only the value.
        symbolic: False compares numbers: after ####, in \\boxed{}, after "the answer is", or else the last number. True
            compares expressions by math-verify (the extra `math`): 1/2, 0.5 and \\frac{1}{2} are equal, and so are
            equal sets and intervals.
    Raises:
        ValueError: an answer is not a number (or, if symbolic, math-verify cannot read it).
    """
    same = _same_expression if symbolic else _same_number
    return [
        None if a is None else float(same(completion, answer_text(a)))
        for completion, a in zip(completions, answer, strict=True)
    ]


def _same_number(completion: str, answer: str) -> bool:
    try:
        return last_number(completion) == gold_number(answer)
    except ValueError as error:
        raise ValueError(
            f"{error}; use {{name: math, symbolic: true}} for expressions, or give the number after ####"
        ) from None


def _same_expression(completion: str, answer: str) -> bool:
    from math_verify import parse, verify

    answer = answer.rsplit("####", 1)[-1].strip()
    # its alarms need their own thread, and a reward already has a time limit
    without_alarm = {"parsing_timeout": None}
    expected = parse(answer, **without_alarm) or parse(f"${answer}$", **without_alarm)
    if not expected:
        raise ValueError(f"math-verify cannot read the answer {answer[:80]!r}")
    return verify(expected, parse(without_thinking(completion) or "", **without_alarm), timeout_seconds=None)
