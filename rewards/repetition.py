"""reward=repetition: a penalty for repeated words."""

from rollouts.monitor import repeated_share


def repetition(prompts: list[str], completions: list[str], *, n: int = 3) -> list[float]:
    """Minus the share of runs of n words that occurred earlier in the completion.

    Yeo et al. 2025 (arXiv:2502.03373) and open-r1's `repetition_penalty` with max_penalty=-1.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"reward=repetition counts runs of n >= 1 words, got {n=}")
    return [-repeated_share(completion, n) for completion in completions]
