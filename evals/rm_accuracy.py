"""How right a reward model is on held-out human judgements: accuracy and AUC with intervals, calibration, length.

statsmodels, scikit-learn and scipy come with the `eval` extra and are imported where they are used.
"""

import importlib
import itertools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data.preferences import Element
from model.packing import Rows, make_rows
from runtime.plots import save_figure

LENGTH_BUCKETS = (32, 128, 512)  # tokens of the completion; the upper bounds of all buckets but the last
BOOTSTRAPS = 500


@torch.no_grad()
def score_elements(
    score: Callable[..., torch.Tensor], elements: list[Element], *, pad_id: int, micro_batch_size: int, device
) -> list[np.ndarray]:
    """The scores of each element's rows: one array per element, in their order.

    Args:
        score: `reward_model.score`. micro_batch_size: elements of a forward; like lengths share one.
    """
    order = sorted(range(len(elements)), key=lambda i: len(elements[i].rows[0]["input_ids"]), reverse=True)
    scores: list[np.ndarray] = [np.empty(0)] * len(elements)
    for start in range(0, len(order), micro_batch_size):
        part = order[start : start + micro_batch_size]
        rows: Rows = make_rows([row for i in part for row in elements[i].rows], pad_id).to(device)
        sizes = [len(elements[i].rows) for i in part]
        for i, values in zip(part, score(*rows).cpu().double().split(sizes), strict=True):
            scores[i] = values.numpy()
    return scores


def evaluate_reward_model(elements: list[Element], scores: list[np.ndarray], *, plot: Path | None) -> dict[str, float]:
    """Every figure of a reward model on held-out elements, by metric key; a calibration plot at `plot`.

    Comparisons and rankings give `accuracy` over all decided pairs; rated completions `auc`. Both with 95 % intervals,
    overall, per source and per length bucket of the (chosen) completion, and the rank correlation of score and length.
    """
    flat = np.concatenate(scores)
    lengths = np.array([int(row["completion_mask"].sum()) for element in elements for row in element.rows])
    figures = {
        "score_mean": float(flat.mean()),
        "score_std": float(flat.std()),
        "score_length_correlation": score_length_correlation(flat, lengths),
    }
    rated = elements[0].reward is not None
    figures |= _rated_figures(elements, flat, plot) if rated else _pair_figures(elements, scores, plot)
    return {f"eval/{name}": value for name, value in figures.items()}


def check_measurable(elements: list[Element]) -> None:
    """Raise ValueError where held-out judgements leave nothing to measure: before a training, not after it."""
    if any(decided_pairs(element.ranks) for element in elements):
        return
    good = {element.is_good for element in elements if element.reward is not None} - {None}
    if len(good) < 2:
        rated = elements[0].reward is not None
        what = f"all {len(elements)} ratings lie on one side of 1/2" if rated else "every comparison is a tie"
        raise ValueError(f"data.eval cannot tell a good reward model from a bad one: {what}; hold out other rows")


def _rated_figures(elements: list[Element], scores: np.ndarray, plot: Path | None) -> dict[str, float]:
    labels = np.array([element.reward for element in elements])
    figures = auc_report(scores, labels) | {"loss": float(np.mean(_softplus(scores) - labels * scores))}
    if plot is not None:
        predicted, decided = 1 / (1 + np.exp(-scores)), labels != 0.5
        plot_calibration(plot, calibration(predicted[decided], labels[decided] > 0.5, bins=10), "rated good")
    return figures


def _pair_figures(elements: list[Element], scores: list[np.ndarray], plot: Path | None) -> dict[str, float]:
    chosen, rejected, groups = [], [], {"source": [], "length": []}
    for element, values in zip(elements, scores, strict=True):
        for better, worse in decided_pairs(element.ranks):
            chosen.append(values[better])
            rejected.append(values[worse])
            groups["source"].append(element.source)
            groups["length"].append(length_bucket(int(element.rows[better]["completion_mask"].sum())))
    chosen, rejected = np.array(chosen), np.array(rejected)
    figures = accuracy_report(chosen, rejected) | {"loss": float(np.mean(_softplus(rejected - chosen)))}
    for members in groups.values():
        for group, report in by_group(chosen, rejected, members).items():
            figures |= {f"{name}/{group}": value for name, value in report.items()}
    if plot is not None:
        # each pair in both orders: the curve is symmetric, and no order is preferred
        predicted = 1 / (1 + np.exp(-np.concatenate([chosen - rejected, rejected - chosen])))
        observed = np.arange(2 * len(chosen)) < len(chosen)
        plot_calibration(plot, calibration(predicted, observed, bins=10), "preferred")
    return figures


def decided_pairs(ranks: list[float]) -> list[tuple[int, int]]:
    """(better, worse) of every pair of an element that is not a tie; rows come best first."""
    return [(i, j) for i, j in itertools.combinations(range(len(ranks)), 2) if ranks[i] < ranks[j]]


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, x)


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
    """Area under the ROC curve of (B,) scores for labels above 1/2 against those below, with a 95 % bootstrap interval
    over rows. A label of 1/2 says neither and does not count."""
    scores, good = scores[labels != 0.5], labels[labels != 0.5] > 0.5
    roc_auc_score, rng = _extra("sklearn.metrics").roc_auc_score, np.random.default_rng(0)
    draws = (rng.integers(len(good), size=len(good)) for _ in range(BOOTSTRAPS))
    resampled = [roc_auc_score(good[rows], scores[rows]) for rows in draws if 0 < good[rows].sum() < len(rows)]
    lower, upper = np.quantile(resampled, [0.025, 0.975])
    return {"auc": float(roc_auc_score(good, scores)), "auc_lower": float(lower), "auc_upper": float(upper)}


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
