"""reward=length: a penalty for completions that are too short or too long."""


def length(
    prompts: list[str], completions: list[str], tokens: list[list[int]], *, least: int = 0, most: int = 256
) -> list[float]:
    """0 for `least` to `most` tokens; otherwise minus the share by which a completion is too long or too short."""
    counts = [len(ids) for ids in tokens]
    return [-max(0.0, (n - most) / most, (least - n) / max(least, 1)) for n in counts]
