"""AlpacaEval's win rate, and the win rate that is left when both answers are equally long."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn
from omegaconf import DictConfig
from scipy.special import expit
from scipy.stats import norm
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import make_scorer
from sklearn.model_selection import GroupKFold
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import proportion_effectsize

from evals.readers import read_rows, read_votes
from evals.verdicts import fold_orders, points, swapped
from runtime.plots import plot_intervals
from runtime.report import print_table


class LengthControlError(ValueError):
    """These votes do not allow to control for length."""


def win_rate(preference: np.ndarray) -> dict:
    """Win rate of model b in percent, its standard error and counts; AlpacaEval (Li et al. 2023).

        win_rate = 100 * mean(p), standard_error = 100 * sd(p, ddof=1) / sqrt(n)

    Args:
        preference: (n,) probability that b is better; 0.5 is a tie, NaN rows (no verdict) are left out.
    Raises:
        ValueError: no row has a preference.
    """
    p = preference[~np.isnan(preference)]
    if not len(p):
        raise ValueError(f"none of the {len(preference)} rows has a preference")
    discrete = np.where(p == 0.5, 0.5, np.round(p))  # a probability rounds to the winner, only 0.5 is a tie
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
    """The smallest distance from 0.5 at which n comparisons without ties tell a win rate from it, two-sided.

    Inverse of `comparisons_needed`; at most 0.5.
    """
    effect = (norm.ppf(1 - alpha / 2) + norm.ppf(power)) / math.sqrt(n)
    return math.sin(min(effect, math.pi / 2)) / 2


def comparisons_needed(win_rate: float, *, alpha: float, power: float) -> int:
    """Comparisons without ties that tell a win rate from 0.5: 783 for 0.55, 194 for 0.60 at alpha .05 and power .8.

    Cohen 1988, section 6.2: effect size 2 asin(sqrt(p)) - 2 asin(sqrt(1/2)).
    """
    return math.ceil(
        NormalIndPower().solve_power(proportion_effectsize(win_rate, 0.5), alpha=alpha, power=power, ratio=0)
    )


def length_controlled(
    preference: np.ndarray, length_a: np.ndarray, length_b: np.ndarray, difficulty: np.ndarray | None
) -> dict:
    """The length-controlled win rate of model b in percent; Dubois et al. 2024 (arXiv:2404.04475), Eq. 2.

        logit P(b wins) = w_length * tanh((length_a - length_b) / sd) + w_difficulty * difficulty + w_model
        length_controlled_win_rate = 100 * mean over the rows of sigmoid(w_difficulty * difficulty + w_model)

    An L1 logistic regression whose strength is chosen by 5-fold cross-validation. The published figures also regularise
    towards a gamed baseline (`df_gamed`), which is not in any file a user has: leaving it out moves a figure by 1-2
    points, and the result says so.

    Args:
        preference: (n,) probability that b is better, NaN where there is no verdict (predicted, not fitted).
        length_a, length_b: (n,) characters.
        difficulty: (n,) of each instruction, or None: fitted without it.
    Raises:
        LengthControlError: all length differences or all verdicts are the same, or fewer than ten verdicts.
    """
    gap = np.asarray(length_a, float) - np.asarray(length_b, float)
    seen, unknown = ~np.isnan(preference), int(np.isnan(gap).sum())
    if seen.sum() < 10 or unknown or not gap.std() > 0 or np.ptp(preference[seen]) == 0:
        raise LengthControlError(
            "length control needs ten verdicts or more that differ, and lengths that differ: "
            f"{seen.sum()} verdicts, {len(np.unique(preference[seen]))} different, {unknown} rows without lengths"
        )
    columns = [np.tanh(gap / gap.std(ddof=1)), np.ones(len(gap))]
    if difficulty is not None:
        columns.insert(1, np.asarray(difficulty, float))
    features = np.column_stack(columns)  # (n, 2 or 3)
    model = _fit(features[seen], preference[seen])
    features[:, 0] = 0
    predicted = expit(features @ model.coef_[0])
    names = ["length", *(["difficulty"] if difficulty is not None else []), "model"]
    return {
        "length_controlled_win_rate": 100 * predicted.mean(),
        "length_controlled_standard_error": 100 * predicted.std(ddof=1) / math.sqrt(len(predicted)),
        "length_control": {
            "weights": dict(zip(names, map(float, model.coef_[0]), strict=True)),
            "C": float(model.C_),
            "difficulty": difficulty is not None,
            "gamed_baseline_regulariser": False,
            "sklearn": sklearn.__version__,
        },
    }


def _soft_log_loss(y: np.ndarray, predicted: np.ndarray, p_label: np.ndarray) -> float:
    p = np.where(y == 1, p_label, 1 - p_label)  # both copies of a row carry the same target
    predicted = np.clip(predicted, 1e-15, 1 - 1e-15)
    return -np.mean(p * np.log(predicted) + (1 - p) * np.log(1 - predicted))


def _fit(features: np.ndarray, preference: np.ndarray) -> LogisticRegressionCV:
    """A soft label p is the row twice: once as a win with weight p, once as a loss with weight 1 - p."""
    n = len(features)
    p_label = np.concatenate([preference, 1 - preference])
    scorer = make_scorer(_soft_log_loss, response_method="predict_proba", greater_is_better=False)
    with sklearn.config_context(enable_metadata_routing=True):
        model = LogisticRegressionCV(
            Cs=10,
            cv=GroupKFold(5),
            l1_ratios=(1,),
            solver="liblinear",
            fit_intercept=False,
            scoring=scorer.set_score_request(p_label=True),
            random_state=123,
            use_legacy_attributes=False,
        ).set_fit_request(sample_weight=True)
        groups = np.tile(np.arange(n), 2)
        labels = np.repeat([1, 0], n)
        return model.fit(np.vstack([features, features]), labels, sample_weight=p_label, groups=groups, p_label=p_label)


def predicted_win_rate(weights: dict, baseline_weights: dict, difficulty: np.ndarray) -> float:
    """Length-controlled win rate in percent of one model against another, from both models' fits to one baseline."""
    slope = weights["difficulty"] - baseline_weights["difficulty"]
    return 100 * expit(slope * difficulty + weights["model"] - baseline_weights["model"]).mean()


def read_difficulty(file: str) -> tuple[dict, str]:
    """{key: difficulty} and what the key is: `instruction`, or `index` where the file has nothing else.

    A JSON object maps instructions; CSV and JSONL have columns instruction or index, and difficulty or
    instruction_difficulty.
    """
    rows = _read_mapping(file) if file.endswith(".json") else [row for _, row in read_rows(file)]
    key = "instruction" if rows and "instruction" in rows[0] else "index"
    value = "difficulty" if rows and "difficulty" in rows[0] else "instruction_difficulty"
    if not rows or key not in rows[0] or value not in rows[0]:
        raise ValueError(f"{file} needs columns instruction (or index) and difficulty, it has {list(rows[0] or [])}")
    return {(row[key] if key == "instruction" else int(row[key])): float(row[value]) for row in rows}, key


def _read_mapping(file: str) -> list[dict]:
    if not Path(file).is_file():
        raise ValueError(f"no file {file} (task.difficulty); it is looked up from {Path.cwd()}")
    mapping = json.loads(Path(file).read_text(encoding="utf-8"))
    if isinstance(mapping, list):
        return mapping
    return [{"instruction": instruction, "difficulty": value} for instruction, value in mapping.items()]


def join_difficulty(votes: pd.DataFrame, file: str) -> tuple[np.ndarray, str]:
    """(n,) difficulty of each vote's question and how it was joined.

    Raises:
        ValueError: a question has no difficulty in the file.
    """
    table, key = read_difficulty(file)
    questions = votes["question"] if key == "instruction" else pd.Series(range(len(votes)))
    missing = [question for question in questions if question not in table]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(votes)} questions have no difficulty in {file}, the first is {missing[0]!r}; "
            "leave task.difficulty=null to fit without it"
        )
    return np.array([table[question] for question in questions]), key


def model_win_rate(votes: pd.DataFrame, difficulty_file: str | None, *, alpha: float, power: float) -> dict:
    """Every figure of one model against one baseline; a length-controlled rate that cannot be had is null, with why."""
    preference = votes["preference"].fillna(1 - points(votes["verdict"])).to_numpy(float)
    result = win_rate(preference)
    seen = preference[~np.isnan(preference)]
    result["minimum_detectable_effect"] = 100 * detectable_effect(len(seen), alpha=alpha, power=power)
    texts = votes[["hash_a", "hash_b"]]
    result["distinct_answers"] = int(texts["hash_b"].nunique()) if texts["hash_b"].notna().all() else None
    try:
        difficulty, joined = join_difficulty(votes, difficulty_file) if difficulty_file else (None, None)
        lengths = votes["length_a"].to_numpy(), votes["length_b"].to_numpy()
        result |= length_controlled(preference, *lengths, difficulty)
        result["length_control"]["difficulty_joined_on"] = joined
    except LengthControlError as error:
        result |= {"length_controlled_win_rate": None, "length_control": {"reason": str(error)}}
    return result


def run(cfg: DictConfig, out: Path) -> dict:
    """task=winrate: the win rate of model b, raw and length-controlled, beside the difference it could have shown."""
    task = cfg.task
    votes = read_votes(task.input, task.format)
    if (votes["shown"].eq("b") & ~votes["human"]).any():
        votes = fold_orders(votes)
        if task.baseline is not None:
            votes = swapped(votes, votes["model_b"] == task.baseline)
    names = votes.groupby(["model_a", "model_b"], sort=False)
    results = {}
    for (baseline, model), part in names:
        result = model_win_rate(part.reset_index(drop=True), task.difficulty, alpha=task.alpha, power=task.power)
        results.setdefault(model, {})[baseline] = {"model": model, "baseline": baseline} | result
    flat = [result for others in results.values() for result in others.values()]
    columns = ("win_rate", "standard_error", "length_controlled_win_rate", "minimum_detectable_effect", "n_total")
    print_table(
        "win rate in percent (detectable: distance from 50 that so many comparisons would show)",
        ("model", "against", "win rate", "s.e.", "length-controlled", "detectable", "n"),
        [(r["model"], r["baseline"], *(r[name] for name in columns)) for r in flat],
    )
    rows = [
        (
            f"{r['model']} against {r['baseline']}",
            r["win_rate"],
            *(r["win_rate"] + s * 1.96 * r["standard_error"] for s in (-1, 1)),
        )
        for r in flat
        if r["standard_error"] is not None
    ]
    plot_intervals(out / "win_rate.png", "win rate, percent", rows[:60], null=50)
    return flat[0] if len(flat) == 1 else {"models": results}
