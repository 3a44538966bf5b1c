"""The mixture of several files in an epoch: passes over each file, and its rows, tokens and targets."""

import logging
from collections.abc import Sequence

log = logging.getLogger(__name__)


def mix(
    files: Sequence[str],
    rows: Sequence[int],
    tokens: Sequence[int],
    targets: Sequence[int],
    *,
    weights: Sequence[float] | None,
    proportions: Sequence[float] | None,
) -> list[float]:
    """Passes over each file in an epoch. Logs the mixture.

    `weights` are the passes. `proportions` are the files' shares of the epoch's targets, or of its rows if there are no
    targets (prompts); an epoch then has as many targets as one pass over all files.

    Raises:
        ValueError: both are given, their number is wrong, one is not above 0, or a file has less than half a row.
    """
    if proportions and weights:
        raise ValueError(
            f"data.weights={list(weights)} and data.proportions={list(proportions)}; give only one of them"
        )
    sizes = targets if sum(targets) else rows
    passes = [1.0] * len(files) if not weights else _checked("data.weights", weights, files)
    if proportions:
        wanted = _checked("data.proportions", proportions, files)
        passes = [sum(sizes) * p / sum(wanted) / size for p, size in zip(wanted, sizes, strict=True)]
    for file, w, count in zip(files, passes, rows, strict=True):
        if w < 1 and not round(w * count):
            name = "data.proportions" if proportions else "data.weights"
            raise ValueError(
                f"{name} gives {file} {w:.3g} of its {count} rows, which is none; raise it, or leave it out"
            )
    whole = sum(w * size for w, size in zip(passes, sizes, strict=True))
    for file, w, *counts, size in zip(files, passes, rows, tokens, targets, sizes, strict=True):
        counts, share = [round(w * count) for count in counts], 100 * w * size / whole
        log.info("an epoch has %.3g of %s: %d rows, %d tokens, %d targets (%.1f %%)", w, file, *counts, share)
    return passes


def _checked(name: str, given: Sequence[float], files: Sequence[str]) -> list[float]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ValueError(f"{name}={given} must be a list with a number for each file: {name}=[1,0.5]")
    if len(given) != len(files):
        raise ValueError(f"{name} has {len(given)} entries for {len(files)} files; give one per file")
    if any(isinstance(w, bool) or not isinstance(w, int | float) or not 0 < w < float("inf") for w in given):
        raise ValueError(f"{name} must be positive numbers, got {list(given)}; leave a file out instead")
    return [float(w) for w in given]
