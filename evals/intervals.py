"""Intervals for votes that share questions: several votes on one question are not several independent votes."""

import math
from collections.abc import Callable

import numpy as np
from scipy.stats import norm, t
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint


def clustered_error(values: np.ndarray, clusters: np.ndarray) -> tuple[float, int]:
    """Standard error of the mean of values that are dependent within clusters, and the number of clusters.

    se^2 = G / (G - 1) * sum over the G clusters of (sum of its residuals)^2 / n^2      (Liang & Zeger 1986)
    """
    _, inverse = np.unique(np.asarray(clusters, str), return_inverse=True)
    sums = np.bincount(inverse, values - values.mean())
    groups = len(sums)
    if groups < 2:
        return math.nan, groups
    return math.sqrt(groups / (groups - 1) * (sums**2).sum()) / len(values), groups


def mean_estimate(values, clusters, *, null: float, level: float) -> dict:
    """A mean with its clustered t interval and the p value of `null`."""
    values = np.asarray(values, float)
    if not len(values):
        return unknown("no vote to measure it on")
    error, groups = clustered_error(values, clusters)
    return normal_estimate(values.mean(), error, len(values), groups, null=null, level=level)


def share_estimate(hits, clusters, *, null: float, level: float) -> dict:
    """A share with its Wilson interval (Wilson 1927) at the effective sample size, and the p value of `null`.

    The effective size is n where the votes are independent and less where votes on one question go together; a share
    of 0 or 1 counts each question once.
    """
    hits = np.asarray(hits, float)
    if not len(hits):
        return unknown("no vote to measure it on")
    share, (error, groups) = hits.mean(), clustered_error(hits, clusters)
    if groups < 2:
        return unknown("all votes are on one question, so there is nothing to judge its spread by", n=len(hits))
    effective = groups if error == 0 else min(len(hits), share * (1 - share) / error**2)
    lower, upper = proportion_confint(share * effective, effective, alpha=1 - level, method="wilson")
    z = (share - null) / math.sqrt(null * (1 - null) / effective)
    return _estimate(share, lower, upper, len(hits), groups, 2 * norm.sf(abs(z)))


def bootstrap_estimate(
    statistic: Callable[[np.ndarray], float], n: int, groups: int, *, null: float, level: float, rounds: int
) -> dict:
    """A statistic with the normal interval whose error comes from resampling whole questions.

    Args:
        statistic: value at (G,) counts, how often each question was drawn; ones give the estimate itself.
        n: votes it is measured on.
        groups: G, the number of questions.
    """
    value = statistic(np.ones(groups))
    if not math.isfinite(value) or groups < 2:
        return unknown("the votes do not vary enough to compute it", n=n)
    counts = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), size=rounds)  # (rounds, G)
    draws = np.array([statistic(row) for row in counts])
    draws = draws[np.isfinite(draws)]
    error = draws.std(ddof=1) if len(draws) > 1 else math.nan
    return normal_estimate(value, error, n, groups, null=null, level=level)


def normal_estimate(value: float, error: float, n: int, groups: int, *, null: float, level: float) -> dict:
    """An estimate whose error is known, with a t interval on the number of questions."""
    if not math.isfinite(error):
        return unknown("the votes do not vary enough to judge its spread", n=n)
    half = t.ppf((1 + level) / 2, max(groups - 1, 1)) * error
    z = abs(value - null) / error if error else (0.0 if value == null else math.inf)
    return _estimate(value, value - half, value + half, n, groups, 2 * t.sf(z, max(groups - 1, 1)))


def unknown(reason: str, n: int = 0) -> dict:
    """A figure that cannot be had, and why."""
    return {"value": None, "lower": None, "upper": None, "n": n, "p_value": None, "reason": reason}


def _estimate(value, lower, upper, n, groups, p_value) -> dict:
    names = ("value", "lower", "upper", "p_value")
    figures = dict(zip(names, map(float, (value, lower, upper, p_value)), strict=True))
    return {**figures, "n": int(n), "questions": int(groups)}


def holm(figures: list[dict], *, alpha: float) -> None:
    """Write each figure's Holm-adjusted p value (Holm 1979) beside it as `p_adjusted` and `significant`."""
    known = [figure for figure in figures if figure["p_value"] is not None]
    if known:
        significant, adjusted, *_ = multipletests([figure["p_value"] for figure in known], alpha, method="holm")
        for figure, flag, p in zip(known, significant, adjusted, strict=True):
            figure |= {"p_adjusted": float(p), "significant": bool(flag)}
