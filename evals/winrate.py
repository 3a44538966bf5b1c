"""AlpacaEval's win rate, raw and length-controlled, and differences of models with the same opponent."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from scipy.stats import norm
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import proportion_effectsize

from evals.intervals import percent, share_estimate
from evals.length_control import LengthControlError, join_difficulty, length_controlled, read_gamed
from evals.paired import paired_differences, print_differences
from evals.readers import read_votes
from evals.verdicts import fold_orders, points, swapped
from runtime.plots import plot_intervals
from runtime.report import print_table


def win_rate(preference: np.ndarray) -> dict:
    """Win rate of model b in percent, its standard error and counts; AlpacaEval (Li et al. 2023).

        win_rate = 100 * mean(p), standard_error = 100 * sd(p, ddof=1) / sqrt(n)

    Args:
        preference: (n,) probability that b is better. 0.5 is a tie; NaN rows (no verdict) are left out.
    Raises:
        ValueError: no row has a preference.
    """
    p = preference[~np.isnan(preference)]
    if not len(p):
        raise ValueError(f"none of the {len(preference)} rows has a preference")
    discrete = np.where(p == 0.5, 0.5, np.round(p))  # a probability rounds to the winner, and only 0.5 is a tie
    return {
        "win_rate": 100 * p.mean(),
        "standard_error": 100 * p.std(ddof=1) / math.sqrt(len(p)) if len(p) > 1 else None,
        "discrete_win_rate": 100 * discrete.mean(),
        "n_wins": int((p > 0.5).sum()),
        "n_wins_base": int((p < 0.5).sum()),
        "n_draws": int((p == 0.5).sum()),
        "n_total": len(p),
        "n_errors": int(np.isnan(preference).sum()),
    }


def detectable_effect(n: int, *, alpha: float, power: float) -> float:
    """The smallest distance of a win rate from 0.5 that n comparisons without ties can detect, two-sided.

    Inverse of `comparisons_needed`; at most 0.5.
    """
    effect = (norm.ppf(1 - alpha / 2) + norm.ppf(power)) / math.sqrt(n)
    return math.sin(min(effect, math.pi / 2)) / 2


def comparisons_needed(win_rate: float, *, alpha: float, power: float) -> int:
    """Comparisons without ties to detect a win rate: 783 for 0.55, 194 for 0.60 at alpha .05 and power .8.

    Cohen 1988, section 6.2: effect size 2 asin(sqrt(p)) - 2 asin(sqrt(1/2)).
    """
    return math.ceil(
        NormalIndPower().solve_power(proportion_effectsize(win_rate, 0.5), alpha=alpha, power=power, ratio=0)
    )


def parts_far(raw: float, controlled: float) -> bool:
    """Whether a controlled rate is implausibly far from the raw one: over 10 points and over a quarter."""
    low, high = raw - max(raw / 4, 10), raw + max((100 - raw) / 4, 10)
    return not low <= controlled <= high


def preferences_of(votes: pd.DataFrame) -> pd.Series:
    """(n,) preference of each vote for b: its probability if it has one, else 1, 0 or, for a tie, 0.5."""
    return votes["preference"].fillna(1 - points(votes["verdict"]))


def paired_rates(votes: pd.DataFrame) -> dict[str, list[dict]]:
    """{baseline: paired differences in points of every two models that met it}, of oriented votes."""
    votes = votes.assign(value=100 * preferences_of(votes))
    found = {}
    for baseline, part in votes.groupby("model_a", sort=False):
        models = {model: own for model, own in part.groupby("model_b", sort=False)}
        if len(models) > 1:
            found[baseline] = paired_differences(models, max_difference=100.0)
    return found


def model_win_rate(votes: pd.DataFrame, task: DictConfig) -> dict:
    """Every figure of one model against one baseline. A figure that cannot be computed is null, with the reason."""
    preference = preferences_of(votes).to_numpy(float)
    seen = ~np.isnan(preference)
    if not seen.any():
        reason = f"none of the {len(votes)} verdicts is a win or a tie"
        return {
            "win_rate": None,
            "standard_error": None,
            "reason": reason,
            "n_total": 0,
            "n_errors": len(votes),
            "length_controlled_win_rate": None,
            "minimum_detectable_effect": None,
            "warnings": [],
        }
    result = win_rate(preference)
    estimate = percent(share_estimate(preference[seen], votes["question"][seen], null=0.5, level=0.95))
    result |= {"lower": estimate["lower"], "upper": estimate["upper"]}
    result["minimum_detectable_effect"] = 100 * detectable_effect(seen.sum(), alpha=task.alpha, power=task.power)
    result["distinct_answers"] = int(votes["hash_b"].nunique()) if votes["hash_b"].notna().all() else None
    try:
        difficulty, joined = join_difficulty(votes, task.difficulty) if task.difficulty else (None, None)
        lengths = votes["length_a"].to_numpy(), votes["length_b"].to_numpy()
        result |= length_controlled(preference, *lengths, difficulty, read_gamed(task.gamed))
        result["length_control"]["difficulty_joined_on"] = joined
    except LengthControlError as error:
        result |= {"length_controlled_win_rate": None, "length_control": {"reason": str(error)}}
    left_out = votes.loc[~seen, "text"].dropna().tolist()[:5]
    return result | {"left_out": left_out, "warnings": _warnings(result, votes, task)}


def _warnings(result: dict, votes: pd.DataFrame, task: DictConfig) -> list[str]:
    warnings, raw, controlled = [], result["win_rate"], result["length_controlled_win_rate"]
    if controlled is not None and parts_far(raw, controlled):
        warnings.append(
            f"the length-controlled rate {controlled:.1f} is far from the raw one {raw:.1f}: the model's lengths are "
            "outside of the regression's data, or were chosen to exploit it (a gamed model); do not rank by it"
        )
    same = votes["hash_b"].value_counts()
    if len(same) and same.iloc[0] >= 3 and same.iloc[0] / len(votes) > task.max_same_answer:
        warnings.append(
            f"{same.iloc[0]} of {len(votes)} answers are the same text; a constant text can win 77 % on AlpacaEval 2"
        )
    return warnings


def orient(votes: pd.DataFrame, baseline: str | None) -> pd.DataFrame:
    """The votes with the same model as a in each pair: the baseline, or the one that was first as a."""
    if baseline is not None and not ((votes["model_a"] == baseline) | (votes["model_b"] == baseline)).any():
        names = ", ".join(sorted(set(votes["model_a"]) | set(votes["model_b"])))
        raise ValueError(f"task.baseline={baseline} is not among the models in the votes: {names}")
    first: dict[frozenset[str], str] = {}
    for a, b in zip(votes["model_a"], votes["model_b"], strict=True):
        first.setdefault(frozenset((a, b)), a)
    turn = [
        b == baseline or (baseline not in (a, b) and first[frozenset((a, b))] != a)
        for a, b in zip(votes["model_a"], votes["model_b"], strict=True)
    ]
    return swapped(votes, pd.Series(turn, index=votes.index))


def run(cfg: DictConfig, out: Path) -> dict:
    """task=winrate: the win rate of model b, raw and length-controlled, and the detectable difference."""
    task = cfg.task
    votes = read_votes(task.input, task.format)
    judges = sorted(votes["judge"].unique())
    if len(judges) > 1 and not votes["human"].all():
        raise ValueError(
            f"the files have verdicts of {len(judges)} judges ({', '.join(judges[:5])}); give the files of one judge"
        )
    if (votes["shown"].eq("b") & ~votes["human"]).any():
        votes = fold_orders(votes)
    votes = orient(votes, task.baseline)
    names = votes.groupby(["model_a", "model_b"], sort=False)
    results: dict[str, dict[str, dict]] = {}
    for (baseline, model), part in names:
        result = model_win_rate(part.reset_index(drop=True), task)
        results.setdefault(model, {})[baseline] = {"model": model, "baseline": baseline} | result
    flat = [result for others in results.values() for result in others.values()]
    if all(result["win_rate"] is None for result in flat):
        raise ValueError(f"none of the {len(votes)} rows has a preference; check task.format")
    columns = ("win_rate", "lower", "upper", "length_controlled_win_rate", "length_controlled_lower",
               "length_controlled_upper", "minimum_detectable_effect", "n_total", "n_errors")  # fmt: skip
    print_table(
        "win rate in percent (detectable: distance from 50 that this number of comparisons detects)",
        (
            "model",
            "against",
            "win rate",
            "lower",
            "upper",
            "length-controlled",
            "lower",
            "upper",
            "detectable",
            "n",
            "errors",
        ),
        [(r["model"], r["baseline"], *(r.get(name) for name in columns)) for r in flat],
    )
    for r in flat:
        for warning in [*r["warnings"], *([r["reason"]] if r.get("reason") else [])]:
            print(f"warning: {r['model']} against {r['baseline']}: {warning}")
        for row in r.get("left_out", []):
            print(f"left out: {row}")
    rows = [
        (f"{r['model']} against {r['baseline']}", r["win_rate"], r["lower"], r["upper"])
        for r in flat
        if r["win_rate"] is not None and r["lower"] is not None
    ]
    plot_intervals(out / "win_rate.png", "win rate, percent", rows[:60], null=50)
    paired = paired_rates(votes)
    for baseline, differences in paired.items():
        known = [r for r in flat if r["baseline"] == baseline and r["win_rate"] is not None]
        print_differences(differences, [r["model"] for r in sorted(known, key=lambda r: -r["win_rate"])])
    return flat[0] if len(flat) == 1 else {"models": results, "paired": paired}
