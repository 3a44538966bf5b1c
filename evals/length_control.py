"""AlpacaEval 2's length control: the predicted win rate if both answers were equally long."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import sklearn
from scipy.optimize import linprog
from scipy.special import expit
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import make_scorer
from sklearn.model_selection import GroupKFold

from data.files import read_rows

FEW = 30  # with fewer verdicts the cross-validated lasso is too unstable
REFITS = 100
GAMED_WEIGHT = 0.2 / 2  # alpaca_eval's regularize_to_baseline_lambda, for two gamed baselines
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # (n, F) features, (n,) targets, (n,) weights
NO_DIFFICULTY = (
    "fitted without instruction difficulty (task.difficulty): the rate holds for these instructions together, "
    "and does not distinguish wins on easy instructions from wins on hard ones"
)


class LengthControlError(ValueError):
    """Length control is not possible with these votes."""


def length_controlled(
    preference: np.ndarray,
    length_a: np.ndarray,
    length_b: np.ndarray,
    difficulty: np.ndarray | None,
    gamed: pd.DataFrame | None = None,
) -> dict:
    """The length-controlled win rate of model b in percent; Dubois et al. 2024 (arXiv:2404.04475), Eq. 2.

        logit P(b wins) = w_length * tanh((length_a - length_b) / sd) + w_difficulty * difficulty + w_model
        length_controlled_win_rate = 100 * mean over the rows of sigmoid(w_difficulty * difficulty + w_model)

    This is an L1 logistic regression, with the strength chosen by 5-fold cross-validation. With fewer than `FEW`
    verdicts, or where length separates wins from losses, that fit is unstable or infinite. Then ridge is used, and
    `estimator` says so. Standard error and interval come from `REFITS` fits to resampled rows at the chosen strength.
    (alpaca_eval prints the standard error of the mean prediction, which is not a sampling error.)

    Args:
        preference: (n,) probability that b is better. Rows with NaN (no verdict) are predicted and not fitted.
        length_a, length_b: (n,) characters.
        difficulty: (n,) of each instruction. None: the fit has no difficulty.
        gamed: alpaca_eval's df_gamed (preference, std_delta_len, instruction_difficulty). Its rows, with weight 0.1
            each, regularise the weights of length and difficulty. None: no regulariser. That changes published figures
            by 1-2 points, and the result says so.
    Raises:
        LengthControlError: there are fewer than ten verdicts, or all verdicts or all length differences are equal.
    """
    features = _features(preference, np.asarray(length_a, float) - np.asarray(length_b, float), difficulty)
    equal_length = features * np.r_[0, np.ones(features.shape[1] - 1)]  # length difference 0
    seen = ~np.isnan(preference)
    own = features[seen], preference[seen], np.ones(seen.sum())
    extra = _gamed_rows(gamed, features.shape[1])
    fit = _fit(own, extra)
    rates = [100 * expit(equal_length @ weights).mean() for weights in _refits(own, extra, fit)]
    predicted = expit(equal_length @ fit.weights)
    names = ["length", *(["difficulty"] if difficulty is not None else []), "model"]
    return {
        "length_controlled_win_rate": 100 * predicted.mean(),
        "length_controlled_standard_error": float(np.std(rates, ddof=1)),
        "length_controlled_lower": float(np.quantile(rates, 0.025)),
        "length_controlled_upper": float(np.quantile(rates, 0.975)),
        "length_control": {
            "weights": dict(zip(names, map(float, fit.weights), strict=True)),
            "C": fit.strength,
            "estimator": fit.estimator,
            "difficulty": difficulty is not None,
            "without_difficulty": None if difficulty is not None else NO_DIFFICULTY,
            "gamed_baseline_regulariser": gamed is not None,
            "alpaca_eval_standard_error": spread_of(predicted),
            "sklearn": sklearn.__version__,
        },
    }


def spread_of(predicted: np.ndarray) -> float:
    """alpaca_eval's standard error of the mean prediction, in percent. It is not a sampling error."""
    return 100 * float(predicted.std(ddof=1)) / math.sqrt(len(predicted))


class Fit(NamedTuple):
    """A fit: weights (F,), the strength and the kind of the penalty, and its description."""

    weights: np.ndarray
    strength: float
    penalty: str
    estimator: str


def _features(preference: np.ndarray, gap: np.ndarray, difficulty: np.ndarray | None) -> np.ndarray:
    """(n, 2 or 3): length, difficulty if it is known, and 1 for the model."""
    seen, unknown = ~np.isnan(preference), int(np.isnan(gap).sum())
    if seen.sum() < 10 or unknown or not gap.std() > 0 or np.ptp(preference[seen]) == 0:
        raise LengthControlError(
            "length control needs ten verdicts or more that differ, and lengths that differ: "
            f"{seen.sum()} verdicts, {len(np.unique(preference[seen]))} different, {unknown} rows without lengths"
        )
    known = [] if difficulty is None else [np.asarray(difficulty, float)]
    return np.column_stack([np.tanh(gap / gap.std(ddof=1)), *known, np.ones(len(gap))])


def _fit(own: Rows, extra: Rows | None) -> Fit:
    features, target, _ = own
    if len(target) >= FEW and not _separable(features, target):
        model = _fit_by_folds(*_stack(own, extra))
        return Fit(model.coef_[0], float(model.C_), "lasso", "lasso, C by 5-fold cross-validation")
    few = f"{len(target)} verdicts are few (under {FEW})"
    reason = few if len(target) < FEW else "length separates wins from losses"
    return Fit(_refit(_stack(own, extra), 1.0, "ridge"), 1.0, "ridge", f"ridge: {reason}")


def _refits(own: Rows, extra: Rows | None, fit: Fit) -> Iterator[np.ndarray]:
    """Yield the weights of fits to resampled rows, at the chosen strength."""
    rng, n = np.random.default_rng(0), len(own[1])
    for _ in range(REFITS):
        picked = rng.integers(0, n, n)
        yield _refit(_stack(tuple(column[picked] for column in own), extra), fit.strength, fit.penalty)


def _gamed_rows(gamed: pd.DataFrame | None, width: int) -> Rows | None:
    """(features, targets, weights) of alpaca_eval's two gamed baselines. They do not affect the model's own weight."""
    if gamed is None:
        return None
    columns = [np.tanh(gamed["std_delta_len"]), np.zeros(len(gamed))]
    if width == 3:
        columns.insert(1, gamed["instruction_difficulty"])
    return np.column_stack(columns), gamed["preference"].to_numpy(float), np.full(len(gamed), GAMED_WEIGHT)


def _stack(own: Rows, extra: Rows | None) -> Rows:
    return own if extra is None else tuple(np.concatenate([e, o]) for e, o in zip(extra, own, strict=True))


def _separable(features: np.ndarray, target: np.ndarray) -> bool:
    """Whether the features separate all wins from all losses. A fit without ridge is then infinite."""
    if not np.isin(target, (0, 1)).all():
        return False
    sides = -np.where(target == 1, 1.0, -1.0)[:, None] * features
    found = linprog(np.zeros(features.shape[1]), A_ub=sides, b_ub=-np.ones(len(target)), bounds=(None, None))
    return found.status == 0


def _soft_log_loss(y: np.ndarray, predicted: np.ndarray, p_label: np.ndarray, row_weight: np.ndarray) -> float:
    p = np.where(y == 1, p_label, 1 - p_label)  # both copies of a row have the same target
    predicted = np.clip(predicted, 1e-15, 1 - 1e-15)
    return -np.mean(row_weight * (p * np.log(predicted) + (1 - p) * np.log(1 - predicted)))


def _fit_by_folds(features: np.ndarray, target: np.ndarray, weight: np.ndarray) -> LogisticRegressionCV:
    """Fit soft labels p by two copies of each row: a win with weight p and a loss with weight 1 - p."""
    n = len(features)
    p_label, row_weight = np.concatenate([target, 1 - target]), np.tile(weight, 2)
    scorer = make_scorer(_soft_log_loss, response_method="predict_proba", greater_is_better=False)
    with sklearn.config_context(enable_metadata_routing=True):
        model = LogisticRegressionCV(
            Cs=10,
            cv=GroupKFold(5),
            l1_ratios=(1,),
            solver="liblinear",
            fit_intercept=False,
            scoring=scorer.set_score_request(p_label=True, row_weight=True),
            random_state=123,
            use_legacy_attributes=False,
        ).set_fit_request(sample_weight=True)
        return model.fit(
            np.vstack([features, features]),
            np.repeat([1, 0], n),
            sample_weight=p_label * row_weight,
            groups=np.tile(np.arange(n), 2),
            p_label=p_label,
            row_weight=row_weight,
        )


def _refit(rows: Rows, strength: float, penalty: str) -> np.ndarray:
    """(F,) weights at a given strength of lasso or ridge."""
    features, target, weight = rows
    ratio = {"lasso": 1.0, "ridge": 0.0}[penalty]
    model = LogisticRegression(C=strength, l1_ratio=ratio, solver="liblinear", fit_intercept=False, random_state=123)
    labels, sample_weight = np.repeat([1, 0], len(target)), np.r_[weight * target, weight * (1 - target)]
    if not (sample_weight[labels == 1].any() and sample_weight[labels == 0].any()):
        sample_weight = sample_weight + 1e-6  # needed for a resample with wins only
    return model.fit(np.vstack([features, features]), labels, sample_weight=sample_weight).coef_[0]


def read_difficulty(file: str) -> tuple[dict, str]:
    """({key: difficulty}, kind of key): the kind is `instruction`, or `index` if the file has only numbers.

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
        raise ValueError(f"no file {file} (task.difficulty); relative paths start at {Path.cwd()}")
    mapping = json.loads(Path(file).read_text(encoding="utf-8"))
    if isinstance(mapping, list):
        return mapping
    return [{"instruction": instruction, "difficulty": value} for instruction, value in mapping.items()]


def join_difficulty(votes: pd.DataFrame, file: str) -> tuple[np.ndarray, str]:
    """((n,) difficulty of each vote's question, how it was joined).

    A file with numbers only is joined on the `index` of the annotations. Joining by the order of rows could silently
    misalign a file that was shuffled or filtered.

    Raises:
        ValueError: a question has no difficulty in the file, or there is no column to join on.
    """
    table, key = read_difficulty(file)
    questions = votes["question"] if key == "instruction" else votes["index"]
    if key == "index" and questions.isna().any():
        raise ValueError(
            f"{file} gives difficulties by number, but the annotations have no `index`, and their order may not be "
            f"that of "
            "the benchmark. Give task.difficulty by instruction, or add index (0 to 804 in AlpacaEval's order) "
            "to the rows"
        )
    missing = [question for question in questions if question not in table]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(votes)} questions have no difficulty in {file}, the first is {missing[0]!r}; "
            "leave task.difficulty=null to fit without it"
        )
    return np.array([table[question] for question in questions]), key


def read_gamed(file: str | None) -> pd.DataFrame | None:
    """alpaca_eval's df_gamed: preferences on two baselines that were instructed to be long or short."""
    if file is None:
        return None
    rows = pd.DataFrame([row for _, row in read_rows(file)])
    needed = ["preference", "std_delta_len", "instruction_difficulty"]
    missing = [name for name in needed if name not in rows]
    if missing:
        raise ValueError(f"{file} (task.gamed) lacks {', '.join(missing)}; it must be alpaca_eval's df_gamed.csv")
    return rows[needed].astype(float).dropna()
