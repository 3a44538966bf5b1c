"""reward=length: a price for completions outside of the wanted lengths."""


def length(
    prompts: list[str], completions: list[str], tokens: list[list[int]], *, least: int = 0, most: int = 256
) -> list[float]:
    """0 for `least` to `most` tokens; beyond, minus the share by which a completion is too long or too short."""
    counts = [len(ids) for ids in tokens]
    return [-max(0.0, (n - most) / most, (least - n) / max(least, 1)) for n in counts]
