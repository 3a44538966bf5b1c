"""Evaluate a reward model on held-out human judgements: accuracy and AUC with intervals, calibration, length.

statsmodels, scikit-learn and scipy belong to the `eval` extra, so they are imported where they are used.
"""

import importlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from data.preferences import PreferenceGroup
from model.packing import Rows, make_rows
from runtime.plots import save_figure

LENGTH_BUCKETS = (32, 128, 512)  # tokens of the completion; the upper bounds of all buckets but the last
BOOTSTRAPS = 500


@torch.no_grad()
def score_preferences(
    score: Callable[..., torch.Tensor], groups: list[PreferenceGroup], *, pad_id: int, micro_batch_size: int, device
) -> list[np.ndarray]:
    """The scores of each group's rows: one array per group, in their order.

    Args:
        score: `reward_model.score`. micro_batch_size: groups of a forward. Groups of similar length share one.
    """
    order = sorted(range(len(groups)), key=lambda i: len(groups[i].rows[0]["input_ids"]), reverse=True)
    scores: list[np.ndarray] = [np.empty(0)] * len(groups)
    for start in range(0, len(order), micro_batch_size):
        part = order[start : start + micro_batch_size]
        rows: Rows = make_rows([row for i in part for row in groups[i].rows], pad_id).to(device)
        sizes = [len(groups[i].rows) for i in part]
        for i, values in zip(part, score(*rows).cpu().double().split(sizes), strict=True):
            scores[i] = values.numpy()
    return scores


def evaluate_reward_model(
    groups: list[PreferenceGroup], scores: list[np.ndarray], *, plot: Path | None
) -> dict[str, float]:
    """metric key -> figure of a reward model on held-out groups. It writes a calibration plot to `plot`.

    Comparisons and rankings give `accuracy` over all decided pairs, rated completions give `auc`. Both have 95 %
    intervals: overall, per source and length bucket of the (chosen) completion. `score_length_correlation` is the rank
    correlation of score and length.
    """
    flat = np.concatenate(scores)
    lengths = np.array([int(row["completion_mask"].sum()) for group in groups for row in group.rows])
    figures = {
        "score_mean": float(flat.mean()),
        "score_std": float(flat.std()),
        "score_length_correlation": score_length_correlation(flat, lengths),
    }
    rated = groups[0].reward is not None
    figures |= _rated_figures(groups, flat, plot) if rated else _pair_figures(groups, scores, plot)
    return {f"eval/{name}": value for name, value in figures.items()}


def check_measurable(groups: Sequence[PreferenceGroup]) -> None:
    """Raise ValueError, before training starts, if the held-out judgements have nothing to measure."""
    if any(decided_pairs(group.ranks) for group in groups):
        return
    good = {group.is_good for group in groups if group.reward is not None} - {None}
    if len(good) < 2:
        rated = groups[0].reward is not None
        what = f"all {len(groups)} ratings lie on one side of 1/2" if rated else "every comparison is a tie"
        raise ValueError(f"data.eval cannot measure a reward model: {what}; hold out other rows")


def _rated_figures(groups: list[PreferenceGroup], scores: np.ndarray, plot: Path | None) -> dict[str, float]:
    labels = np.array([group.reward for group in groups])
    figures = auc_report(scores, labels) | {"loss": float(np.mean(_softplus(scores) - labels * scores))}
    if plot is not None:
        predicted, decided = 1 / (1 + np.exp(-scores)), labels != 0.5
        plot_calibration(plot, calibration(predicted[decided], labels[decided] > 0.5, bins=10), "rated good")
    return figures


def _pair_figures(groups: list[PreferenceGroup], scores: list[np.ndarray], plot: Path | None) -> dict[str, float]:
    chosen, rejected = [], []
    subsets: dict[str, list] = {"source": [], "length": []}
    for group, values in zip(groups, scores, strict=True):
        for better, worse in decided_pairs(group.ranks):
            chosen.append(values[better])
            rejected.append(values[worse])
            subsets["source"].append(group.source)
            subsets["length"].append(length_bucket(int(group.rows[better]["completion_mask"].sum())))
    chosen, rejected = np.array(chosen), np.array(rejected)
    figures = accuracy_report(chosen, rejected) | {"loss": float(np.mean(_softplus(rejected - chosen)))}
    for members in subsets.values():
        for subset, report in by_group(chosen, rejected, members).items():
            figures |= {f"{name}/{subset}": value for name, value in report.items()}
    if plot is not None:
        # each pair in both orders, so that the curve is symmetric
        predicted = 1 / (1 + np.exp(-np.concatenate([chosen - rejected, rejected - chosen])))
        observed = np.arange(2 * len(chosen)) < len(chosen)
        plot_calibration(plot, calibration(predicted, observed, bins=10), "preferred")
    return figures


def decided_pairs(ranks: list[float]) -> list[tuple[int, int]]:
    """(better, worse) row indices of every pair of a group that is not a tie. Rows are sorted, best first."""
    return [(i, j) for i, j in itertools.combinations(range(len(ranks)), 2) if ranks[i] < ranks[j]]


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, x)


def accuracy_report(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """Share of pairs with chosen above rejected (a tie counts one half) and its 95 % Wilson interval.

    Args:
        chosen, rejected: (P,) scores of the pairs without ties.
    """
    proportion_confint = _extra("statsmodels.stats.proportion").proportion_confint
    right = float((chosen > rejected).sum() + 0.5 * (chosen == rejected).sum())
    lower, upper = proportion_confint(right, len(chosen), method="wilson")
    return {"accuracy": right / len(chosen), "accuracy_lower": float(lower), "accuracy_upper": float(upper)}


def auc_report(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Area under the ROC curve of (B,) scores, for labels above 1/2 against labels below 1/2.

    The 95 % interval is a bootstrap over rows. A label of 1/2 does not count.
    """
    scores, good = scores[labels != 0.5], labels[labels != 0.5] > 0.5
    roc_auc_score, rng = _extra("sklearn.metrics").roc_auc_score, np.random.default_rng(0)
    draws = (rng.integers(len(good), size=len(good)) for _ in range(BOOTSTRAPS))
    resampled = [roc_auc_score(good[rows], scores[rows]) for rows in draws if 0 < good[rows].sum() < len(rows)]
    lower, upper = np.quantile(resampled, [0.025, 0.975])
    return {"auc": float(roc_auc_score(good, scores)), "auc_lower": float(lower), "auc_upper": float(upper)}


def score_length_correlation(scores: np.ndarray, lengths: np.ndarray) -> float:
    """Spearman's rank correlation of (B,) scores with completion lengths. It is 0 where either is constant."""
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
    """The name of the length bucket of a completion with so many tokens."""
    for low, high in zip((0, *LENGTH_BUCKETS), LENGTH_BUCKETS, strict=False):
        if tokens <= high:
            return f"{low + 1}-{high} tokens"
    return f"over {LENGTH_BUCKETS[-1]} tokens"


def calibration(predicted: np.ndarray, observed: np.ndarray, *, bins: int) -> list[dict[str, float]]:
    """A calibration table: predicted and observed preference, in bins with equal numbers of pairs or rows.

    Args:
        predicted: (n,) probabilities. observed: (n,) bool, the human judgements.
    """
    edges = np.array_split(np.argsort(predicted, kind="stable"), bins)
    return [
        {"predicted": float(predicted[rows].mean()), "observed": float(observed[rows].mean()), "n": len(rows)}
        for rows in edges
        if len(rows)
    ]


def plot_calibration(path: Path, table: list[dict[str, float]], title: str) -> None:
    """Plot the calibration table with 95 % Wilson intervals and the diagonal."""
    from matplotlib.figure import Figure

    proportion_confint = _extra("statsmodels.stats.proportion").proportion_confint
    x, y, n = (np.array([row[key] for row in table]) for key in ("predicted", "observed", "n"))
    lower, upper = proportion_confint(np.round(y * n), n, method="wilson")
    figure = Figure(figsize=(5, 5))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="gray", linewidth=1)
    axes.errorbar(x, y, yerr=np.abs([y - lower, upper - y]), fmt="o", capsize=3)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted", ylabel="observed", title=title)
    save_figure(figure, path)


def _extra(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{module} is missing; evaluation needs the eval extra: pip install -e '.[eval]'") from error
