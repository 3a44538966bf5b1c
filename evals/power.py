"""task=power: the number of questions that a comparison needs, and whether a running comparison may stop.

Before a comparison: the power of its test. Without ties it is the exact sign test (McNemar's). Ties decide nothing, so
only the other comparisons count. Votes on one question are correlated (`icc`). A mean over seeds also has their
variance, which more questions do not reduce.

During a comparison: a confidence sequence is valid at all numbers of comparisons simultaneously, so one may stop at any
time. An ordinary interval is not. Ours is the mixture martingale of a bounded mean with a beta mixture over p (Robbins
1970; Waudby-Smith & Ramdas 2024, arXiv:2010.09686): for n points with sum s,

    p is in the sequence while  B(s + 1/2, n - s + 1/2) / B(1/2, 1/2) / (p^s (1 - p)^(n - s))  <  1 / alpha
"""

import math
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from scipy.optimize import brentq
from scipy.special import betaln
from scipy.stats import binom, norm

from evals.readers import read_votes
from evals.verdicts import fold_orders, points
from runtime.report import print_table


def exact_power(n: int, win_rate: float, ties: float, *, alpha: float) -> float:
    """Power of the exact two-sided sign test on n comparisons, of which a share `ties` are ties and decide nothing.

    `win_rate` counts ties half, so the share of wins among the others is (win_rate - ties / 2) / (1 - ties).
    """
    p = (win_rate - ties / 2) / (1 - ties)
    total = 0.0
    low, high = (int(binom.ppf(q, n, 1 - ties)) for q in (1e-6, 1 - 1e-6))
    for decided in range(low, high + 1):
        critical = int(binom.ppf(alpha / 2, decided, 0.5)) - 1
        while binom.cdf(critical + 1, decided, 0.5) <= alpha / 2:
            critical += 1
        if critical >= 0:
            named = binom.cdf(critical, decided, p) + binom.sf(decided - critical - 1, decided, p)
            total += binom.pmf(decided, n, 1 - ties) * named
    return float(total)


def comparisons_for(win_rate: float, ties: float, *, alpha: float, power: float) -> int:
    """The smallest number of independent comparisons from which on the exact test has this power."""
    low, high = 4, 8
    while exact_power(high, win_rate, ties, alpha=alpha) < power:
        low, high = high, 2 * high
        if high > 200_000:
            raise ValueError(
                f"a win rate of {win_rate} needs more than 200,000 comparisons; ask for a larger difference"
            )
    while high - low > 1:
        middle = (low + high) // 2
        reached = all(exact_power(n, win_rate, ties, alpha=alpha) >= power for n in (middle, middle + 1, middle + 2))
        low, high = (low, middle) if reached else (middle, high)
    return high


def with_clusters(comparisons: int, per_question: float, icc: float) -> int:
    """Questions that equal so many independent comparisons: design effect 1 + (m - 1) icc (Kish 1965)."""
    return math.ceil(comparisons * (1 + (per_question - 1) * icc) / per_question)


def seeds_for(difference: float, std: float, *, alpha: float, power: float) -> int:
    """Training seeds per side to detect a `difference` of means, if seeds have standard deviation `std`; at least 2."""
    needed = 2 * ((norm.ppf(1 - alpha / 2) + norm.ppf(power)) * std / difference) ** 2
    return max(2, math.ceil(needed + norm.ppf(1 - alpha / 2) ** 2 / 4))  # the last term: t for normal, Guenther 1981


def confidence_sequence(values: np.ndarray, *, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """(n,) lower and upper bounds of a mean in [0, 1] after each value. All hold together with probability 1 - alpha.

    Values between 0 and 1 (ties) count as fractions of a win, which only makes the sequence wider.
    """
    values = np.asarray(values, float)
    if len(values) and not (values.min() >= 0 and values.max() <= 1):
        raise ValueError("a confidence sequence needs values from 0 to 1")
    sums, lower, upper = np.cumsum(values), [], []
    low, high = 0.0, 1.0
    for n, s in enumerate(sums, 1):
        peak = s / n
        base = betaln(s + 0.5, n - s + 0.5) - betaln(0.5, 0.5) + math.log(alpha)

        def over(p: float, s: float = s, n: int = n, base: float = base) -> float:
            return base - s * math.log(p) - (n - s) * math.log1p(-p)

        tiny = 1e-12
        inside = min(max(peak, 2 * tiny), 1 - 2 * tiny)
        if s > 0 and over(tiny) > 0:
            low = max(low, brentq(over, tiny, inside))
        if s < n and over(1 - tiny) > 0:
            high = min(high, brentq(over, inside, 1 - tiny))
        lower.append(low)
        upper.append(high)
    return np.array(lower), np.array(upper)


def stopping(values: np.ndarray, *, alpha: float) -> dict:
    """The state of a running comparison: its sequence now, and the number of values after which it excluded 0.5."""
    lower, upper = confidence_sequence(values, alpha=alpha)
    outside = np.flatnonzero((lower > 0.5) | (upper < 0.5))
    return {
        "value": float(values.mean()),
        "lower": float(lower[-1]),
        "upper": float(upper[-1]),
        "n": len(values),
        "decided_at": int(outside[0]) + 1 if len(outside) else None,
    }


def run(cfg: DictConfig, out: Path) -> dict:
    """task=power: result.json with the sizes that were asked for and, with task.input, the state of running votes."""
    task = cfg.task
    if not 0.5 < task.win_rate < 1 or not 0 <= task.ties < 1 or (task.win_rate - task.ties / 2) / (1 - task.ties) >= 1:
        raise ValueError(f"need 0.5 < win_rate < 1 and ties that allow it, got {task.win_rate=}, {task.ties=}")
    alpha = task.alpha / task.comparisons
    settings = {"alpha": alpha, "power": task.power}
    independent = comparisons_for(task.win_rate, task.ties, **settings)
    result = {
        "comparisons": independent,
        "power": exact_power(independent, task.win_rate, task.ties, alpha=alpha),
        "questions": with_clusters(independent, task.per_question, task.icc),
        "alpha_each": alpha,
    }
    if task.seed_spread is not None:
        result["seeds"] = seeds_for(task.win_rate - 0.5, task.seed_spread, **settings)
    print_table(
        "required sizes (computed, not estimated)", ("", "number"), [(name, value) for name, value in result.items()]
    )
    if task.input:
        votes = fold_orders(read_votes(task.input, task.format))
        if len(judges := sorted(votes.loc[~votes["human"], "judge"].unique())) > 1:
            raise ValueError(f"task.input has verdicts of {', '.join(judges[:5])}; give the files of one judge")
        result["running"] = {}
        for (a, b), part in votes[votes["verdict"] != "error"].groupby(["model_a", "model_b"], sort=False):
            first = part.groupby("question", sort=False)["verdict"].agg(
                lambda own: points(own).mean()
            )  # one value per question
            result["running"][f"{a} against {b}"] = stopping(first.to_numpy(float), alpha=alpha)
        rows = [
            (name, *(row[k] for k in ("value", "lower", "upper", "n", "decided_at")))
            for name, row in result["running"].items()
        ]
        head = ("", "share", "lower", "upper", "questions", "decided at")
        print_table("confidence sequences: valid at every stop", head, rows)
    return result
