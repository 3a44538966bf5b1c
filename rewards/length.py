"""reward=length: a penalty for completions that are too short or too long."""


def length(
    prompts: list[str], completions: list[str], tokens: list[list[int]], *, least: int = 0, most: int = 256
) -> list[float]:
    """0 for `least` to `most` tokens; otherwise minus the share by which a completion is too long or too short.

    Raises:
        ValueError: 0 <= least <= most, most >= 1 does not hold.
    """
    if not 0 <= least <= most or most < 1:
        raise ValueError(f"reward=length needs 0 <= least <= most and most >= 1, got {least=} and {most=}")
    counts = [len(ids) for ids in tokens]
    return [-max(0.0, (n - most) / most, (least - n) / max(least, 1)) for n in counts]
