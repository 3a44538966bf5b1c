"""Confidence intervals clustered by question, because votes on the same question are not independent."""

import math
from collections.abc import Callable, Sequence
from statistics import stdev

import numpy as np
from scipy.stats import norm, t
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint


def clustered_error(values: np.ndarray, clusters: np.ndarray) -> tuple[float, int]:
    """(standard error of the mean of values that are dependent within clusters, number of clusters).

    se^2 = G / (G - 1) * sum over the G clusters of (sum of its residuals)^2 / n^2      (Liang & Zeger 1986)
    """
    _, inverse = np.unique(np.asarray(clusters, str), return_inverse=True)
    sums = np.bincount(inverse, values - values.mean())
    groups = len(sums)
    if groups < 2:
        return math.nan, groups
    return math.sqrt(groups / (groups - 1) * (sums**2).sum()) / len(values), groups


def mean_estimate(values, clusters, *, null: float, level: float, max_deviation: float) -> dict:
    """A mean with its clustered t interval and the p value of `null`.

    Args:
        max_deviation: the largest possible distance of a value from the mean. Two clusters at this distance, one on
            each side, are added to the variance (the idea of Agresti & Coull). Otherwise three questions with the same
            value would have no error, and in a quarter of such studies a fair judge would be called biased.
    """
    values = np.asarray(values, float)
    if not len(values):
        return unknown("there are no votes")
    error, groups = clustered_error(values, clusters)
    if groups < 2:
        return unknown("all votes are on one question, so the variance is unknown", n=len(values))
    size = len(values) / groups  # votes per question
    squares = (error * len(values)) ** 2 * (groups - 1) / groups + 2 * (max_deviation * size) ** 2
    error = math.sqrt((groups + 2) / (groups + 1) * squares) / (len(values) + 2 * size)
    return estimate_of(values.mean(), error, len(values), groups, null=null, level=level, degrees=groups + 1)


def share_estimate(hits, clusters, *, null: float, level: float) -> dict:
    """A share with its Wilson interval (Wilson 1927) at the effective sample size, and the p value of `null`.

    The effective size is n for independent votes. It is smaller where votes on the same question are correlated, and
    larger where ties reduce the variance. For a share of 0 or 1 each question counts once. The interval is in [0, 1].

    Args:
        hits: (n,) in [0, 1]; 0.5 is a tie.
    """
    hits = np.asarray(hits, float)
    if not len(hits):
        return unknown("there are no votes")
    share, (error, groups) = hits.mean(), clustered_error(hits, clusters)
    binary = bool(np.isin(hits, (0, 1)).all())
    if groups < 2 and not (binary and len(hits) == 1):
        return unknown("all votes are on one question, so the variance is unknown", n=len(hits))
    if error == 0 and 0 < share < 1:  # all questions have the same mean
        error = math.sqrt((groups + 2) / (groups + 1) / 2) / (groups + 2)
    effective = groups if share in (0, 1) else share * (1 - share) / error**2
    effective = min(effective, len(hits)) if binary else effective
    tail = (1 - level) / 2
    independent = binary and groups == len(hits)
    if 0 < share < 1 and not independent:  # the variance is estimated: use Student's quantile
        tail = max(norm.sf(t.isf(tail, groups - 1)), 1e-300)  # with two questions the interval may be 0 to 1
    lower, upper = proportion_confint(share * effective, effective, alpha=2 * tail, method="wilson")
    z = (share - null) / math.sqrt(null * (1 - null) / effective)
    lower, upper = (round(min(max(bound, 0.0), 1.0), 12) for bound in (lower, upper))  # Wilson at 0 is 3e-17
    return _estimate(share, lower, upper, len(hits), groups, 2 * norm.sf(abs(z)))


def t_interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """(mean, lower, upper) of the 95 % t interval. None where there are too few values."""
    if not values:
        return None, None, None
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None, None
    half = t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def mean_of_independent(figures: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """(value, lower, upper) of the mean of independent figures (MOVER: Zou & Donner 2008)."""
    values, lower, upper = (np.array(column, float) for column in zip(*figures, strict=True))
    below, above = (math.hypot(*gaps) / len(values) for gaps in (values - lower, upper - values))
    return float(values.mean()), float(values.mean()) - below, float(values.mean()) + above


def percent(estimate: dict) -> dict:
    """An estimate of a share, in percent."""
    scaled = {name: None if estimate[name] is None else 100 * estimate[name] for name in ("value", "lower", "upper")}
    return estimate | scaled


def bootstrap_estimate(
    statistic: Callable[[np.ndarray], float], n: int, groups: int, *, null: float, level: float, rounds: int
) -> dict:
    """A statistic with a normal interval, whose standard error comes from resampling whole questions.

    Args:
        statistic: function of (G,) counts, how often each question was drawn. Counts of 1 give the estimate.
        n: number of votes.
        groups: G, the number of questions.
    """
    value = statistic(np.ones(groups))
    if not math.isfinite(value) or groups < 2:
        return unknown("the votes do not vary enough to compute it", n=n)
    counts = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), size=rounds)  # (rounds, G)
    draws = np.array([statistic(row) for row in counts])
    draws = draws[np.isfinite(draws)]
    error = draws.std(ddof=1) if len(draws) > 1 else math.nan
    return estimate_of(value, error, n, groups, null=null, level=level)


def estimate_of(
    value: float, error: float, n: int, groups: int, *, null: float, level: float, degrees: float | None = None
) -> dict:
    """An estimate with standard error `error` and a t interval with `degrees` of freedom (default: groups - 1).

    With an error of 0 there is no interval: votes that do not vary say nothing about their variance.
    """
    if not math.isfinite(error) or error < 1e-6:  # smaller errors are rounding
        return unknown("the votes do not vary enough to estimate the variance", n=n)
    degrees = max(groups - 1, 1) if degrees is None else degrees
    half = t.ppf((1 + level) / 2, degrees) * error
    return _estimate(value, value - half, value + half, n, groups, 2 * t.sf(abs(value - null) / error, degrees))


def unknown(reason: str, n: int = 0) -> dict:
    """A figure that cannot be computed, with the reason."""
    return {"value": None, "lower": None, "upper": None, "n": n, "p_value": None, "reason": reason}


def _estimate(value, lower, upper, n, groups, p_value) -> dict:
    names = ("value", "lower", "upper", "p_value")
    figures = dict(zip(names, map(float, (value, lower, upper, p_value)), strict=True))
    return {**figures, "n": int(n), "questions": int(groups)}


def holm(figures: list[dict], *, alpha: float) -> None:
    """Add `p_adjusted`, the Holm-adjusted p value (Holm 1979), and `significant` to each figure."""
    known = [figure for figure in figures if figure["p_value"] is not None]
    if known:
        significant, adjusted, *_ = multipletests([figure["p_value"] for figure in known], alpha, method="holm")
        for figure, flag, p in zip(known, significant, adjusted, strict=True):
            figure |= {"p_adjusted": float(p), "significant": bool(flag)}
