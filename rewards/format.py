"""reward=format: 1 where a completion has the wanted form."""

import re

THINK_THEN_ANSWER = r"<think>.*?</think>\s*<answer>.*?</answer>"  # DeepSeek-AI 2025 (arXiv:2501.12948), section 2.2


def format(prompts: list[str], completions: list[str], *, pattern: str = THINK_THEN_ANSWER) -> list[float]:
    """1.0 where the regular expression matches a whole completion but for space around it, else 0.0; `.` is any
    character, also the end of a line.
    """
    wanted = re.compile(pattern, re.DOTALL)
    return [float(wanted.fullmatch(completion.strip()) is not None) for completion in completions]
