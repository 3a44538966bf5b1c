"""reward=format: 1 if a completion has the required form."""

import re

THINK_THEN_ANSWER = r"<think>.*?</think>\s*<answer>.*?</answer>"  # DeepSeek-AI 2025 (arXiv:2501.12948), section 2.2


def format(prompts: list[str], completions: list[str], *, pattern: str = THINK_THEN_ANSWER) -> list[float]:
    """1.0 if the regular expression matches the whole completion without surrounding space, else 0.0. `.` matches any
    character, including line ends.
    """
    wanted = re.compile(pattern, re.DOTALL)
    return [float(wanted.fullmatch(completion.strip()) is not None) for completion in completions]
