"""reward=math: 1 for the right answer of a mathematical question, 0 for another."""

from evals.benchmarks.gsm8k import last_number
from evals.judge_text import without_thinking


def math(prompts: list[str], completions: list[str], answer: list, *, symbolic: bool = False) -> list[float | None]:
    """1.0 or 0.0 a completion, None where the record has no answer.

    Args:
        answer: the solution: GSM8K's (its number stands after ####), one in \\boxed{}, or the bare value.
        symbolic: False compares numbers: after ####, in \\boxed{}, after "the answer is", else the last one there is.
            True compares expressions by math-verify (the extra `math`): 1/2, 0.5 and \\frac{1}{2} are equal, as are
            sets and intervals.
    Raises:
        ValueError: an answer that is no number (or, symbolic, that math-verify cannot read).
    """
    same = _same_expression if symbolic else _same_number
    return [
        None if a is None else float(same(completion, str(a)))
        for completion, a in zip(completions, answer, strict=True)
    ]


def _same_number(completion: str, answer: str) -> bool:
    expected = last_number(answer)
    if expected is None:
        raise ValueError(
            f"the answer {answer[:80]!r} holds no number; {{name: math, symbolic: true}} reads expressions"
        )
    return last_number(completion) == expected


def _same_expression(completion: str, answer: str) -> bool:
    from math_verify import parse, verify

    answer = answer.rsplit("####", 1)[-1].strip()
    without_alarm = {"parsing_timeout": None}  # its alarms need a thread of their own; a reward has a limit already
    expected = parse(answer, **without_alarm) or parse(f"${answer}$", **without_alarm)
    if not expected:
        raise ValueError(f"math-verify cannot read the answer {answer[:80]!r}")
    return verify(expected, parse(without_thinking(completion) or "", **without_alarm), timeout_seconds=None)
