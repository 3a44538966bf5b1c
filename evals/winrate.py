"""AlpacaEval's win rate, and the win rate that is left when both answers are equally long."""

import math

import numpy as np
import pandas as pd
import sklearn
from scipy.special import expit
from scipy.stats import norm
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import make_scorer
from sklearn.model_selection import GroupKFold

from evals.readers import read_rows


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


def detectable_effect(sd: float, n: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest difference from 0.5 that n comparisons of that spread show with this power (two-sided normal)."""
    return (norm.ppf(1 - alpha / 2) + norm.ppf(power)) * sd / math.sqrt(n)


def comparisons_needed(win_rate: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Comparisons without ties that tell this win rate from 0.5 (arcsine; Cohen 1988): 783 for 0.55, 194 for 0.60."""
    if not 0 < win_rate < 1 or win_rate == 0.5:
        raise ValueError(f"win_rate must lie in (0, 1) and not be 0.5, got {win_rate}")
    effect = 2 * (math.asin(math.sqrt(win_rate)) - math.asin(math.sqrt(0.5)))
    return math.ceil(((norm.ppf(1 - alpha / 2) + norm.ppf(power)) / effect) ** 2)


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
        ValueError: all length differences are the same, or fewer than ten verdicts.
    """
    gap = np.asarray(length_a, float) - np.asarray(length_b, float)
    seen = ~np.isnan(preference)
    if seen.sum() < 10 or not np.nanstd(gap) > 0 or np.isnan(gap).any():
        raise ValueError(
            f"length control needs ten verdicts or more and lengths that differ: {seen.sum()} verdicts, "
            f"{int(np.isnan(gap).sum())} rows without lengths, sd of the length difference {np.nanstd(gap):.3g}"
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
        return model.fit(
            np.vstack([features, features]), labels, sample_weight=p_label, groups=groups, p_label=p_label
        )


def predicted_win_rate(weights: dict, baseline_weights: dict, difficulty: np.ndarray) -> float:
    """Length-controlled win rate in percent of one model against another, from both models' fits to one baseline."""
    slope = weights["difficulty"] - baseline_weights["difficulty"]
    return 100 * expit(slope * difficulty + weights["model"] - baseline_weights["model"]).mean()


def read_difficulty(file: str) -> tuple[dict, str]:
    """{key: difficulty} and what the key is: `instruction`, or `index` where the file has nothing else.

    A JSON object maps instructions; CSV and JSONL have columns instruction or index, and difficulty or
    instruction_difficulty.
    """
    rows = [row for _, row in read_rows(file)] if not file.endswith(".json") else _read_mapping(file)
    key = "instruction" if rows and "instruction" in rows[0] else "index"
    value = "difficulty" if rows and "difficulty" in rows[0] else "instruction_difficulty"
    if not rows or key not in rows[0] or value not in rows[0]:
        raise ValueError(f"{file} needs columns instruction (or index) and difficulty, it has {list(rows[0] or [])}")
    return {(row[key] if key == "instruction" else int(row[key])): float(row[value]) for row in rows}, key


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
