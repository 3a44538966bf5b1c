"""The check of annotator agreement before training on preferences. It imports no statistics library."""

import json
from pathlib import Path


def require_agreement(agreement: str | None, *, threshold: float, override: bool) -> str | None:
    """Refuse to train if annotators agree too little. Returns a line for the log, or None without `agreement`.

    Args:
        agreement: the result.json of `check_data.py check=agreement`.
        threshold: the lower end of alpha's interval must reach it, unless `override`.
    Raises:
        ValueError: the value is below the threshold without override, or the file is missing or not
            a result of that check.
    """
    if agreement is None:
        return None
    path = Path(agreement)
    try:
        alpha = json.loads(path.read_text())["krippendorff_alpha"]
        value, lower, upper = (float(alpha[key]) for key in ("value", "lower", "upper"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"agreement={path} is not a result of `check_data.py check=agreement` ({type(error).__name__}: {error})"
        ) from error
    figure = f"Krippendorff's alpha {value:.3f} [{lower:.3f}, {upper:.3f}]"
    if lower >= threshold:
        return f"agreement: {figure} is above {threshold}"
    if override:
        return f"agreement: {figure} is NOT surely above {threshold}; overridden"
    raise ValueError(
        f"annotators agree too little: {figure}, and its lower end is below agreement_threshold={threshold} ({path}). "
        "Improve the guidelines or the annotators (see docs/annotation.md), or train anyway with "
        "agreement_override=true"
    )
