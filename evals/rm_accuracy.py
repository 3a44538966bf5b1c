"""How right a reward model is on held-out human judgements: accuracy and AUC with intervals, calibration, length.

statsmodels, scikit-learn and scipy come with the `eval` extra and are imported where they are used.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np

LENGTH_BUCKETS = (32, 128, 512)  # tokens of the completion; the upper bounds of all buckets but the last


def accuracy_report(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """Share of pairs with chosen above rejected (a tie counts one half) and its 95 % Wilson interval.

    Args:
        chosen, rejected: (P,) scores of the pairs that people did decide.
    """
    proportion_confint = _extra("statsmodels.stats.proportion").proportion_confint
    right = float((chosen > rejected).sum() + 0.5 * (chosen == rejected).sum())
    lower, upper = proportion_confint(right, len(chosen), method="wilson")
    return {"accuracy": right / len(chosen), "accuracy_lower": float(lower), "accuracy_upper": float(upper)}


def auc_report(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Area under the ROC curve of (B,) scores for labels above 1/2.

    Raises:
        ValueError: all labels on one side: no pair to rank.
    """
    good = labels > 0.5
    if good.all() or not good.any():
        raise ValueError(f"AUC needs good and bad completions, but all {len(labels)} labels are on one side of 1/2")
    return {"auc": float(_extra("sklearn.metrics").roc_auc_score(good, scores))}


def score_length_correlation(scores: np.ndarray, lengths: np.ndarray) -> float:
    """Spearman's rank correlation of (B,) scores with completion lengths; 0 where either is constant."""
    if np.ptp(scores) == 0 or np.ptp(lengths) == 0:
        return 0.0
    return float(_extra("scipy.stats").spearmanr(scores, lengths).statistic)


def by_group(chosen: np.ndarray, rejected: np.ndarray, groups: list[str]) -> dict[str, dict[str, float]]:
    """accuracy_report of each group (a source, a length bucket), with its number of pairs."""
    members = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    return {
        group: accuracy_report(chosen[rows], rejected[rows]) | {"pairs": len(rows)}
        for group, rows in sorted(members.items())
    }


def length_bucket(tokens: int) -> str:
    """The name of the bucket that a completion of so many tokens belongs to."""
    for low, high in zip((0, *LENGTH_BUCKETS), LENGTH_BUCKETS, strict=False):
        if tokens <= high:
            return f"{low + 1}-{high} tokens"
    return f"over {LENGTH_BUCKETS[-1]} tokens"


def calibration(predicted: np.ndarray, observed: np.ndarray, *, bins: int) -> list[dict[str, float]]:
    """Predicted against observed preference, in bins of equal numbers of pairs or rows.

    Args:
        predicted: (n,) probabilities. observed: (n,) bool, what people said.
    """
    edges = np.array_split(np.argsort(predicted, kind="stable"), bins)
    return [
        {"predicted": float(predicted[rows].mean()), "observed": float(observed[rows].mean()), "n": len(rows)}
        for rows in edges
        if len(rows)
    ]


def plot_calibration(path: Path, table: list[dict[str, float]], title: str) -> None:
    """A PNG of the calibration table with 95 % Wilson intervals, beside the diagonal."""
    from matplotlib.figure import Figure

    proportion_confint = _extra("statsmodels.stats.proportion").proportion_confint
    x, y, n = (np.array([row[key] for row in table]) for key in ("predicted", "observed", "n"))
    lower, upper = proportion_confint(np.round(y * n), n, method="wilson")
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="gray", linewidth=1)
    axes.errorbar(x, y, yerr=np.abs([y - lower, upper - y]), fmt="o", capsize=3)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted", ylabel="observed", title=title)
    figure.savefig(path, dpi=120)


def _extra(module: str):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{module} is missing; evaluation needs the eval extra: pip install -e '.[eval]'") from error
