"""AlpacaEval's win rate, and the win rate that is left when both answers are equally long."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn
from omegaconf import DictConfig
from scipy.optimize import linprog
from scipy.special import expit
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import make_scorer
from sklearn.model_selection import GroupKFold
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import proportion_effectsize

from data.files import read_rows
from evals.intervals import percent, share_estimate
from evals.readers import read_votes
from evals.verdicts import fold_orders, points, swapped
from runtime.plots import plot_intervals
from runtime.report import print_table

FEW = 30  # verdicts under which cross-validated lasso is too unstable to report
REFITS = 100
GAMED_WEIGHT = 0.2 / 2  # alpaca_eval's regularize_to_baseline_lambda, for two gamed baselines
NO_DIFFICULTY = (
    "fitted without instruction difficulty (task.difficulty): the rate holds for these instructions together, "
    "and cannot "
    "tell a model that wins on easy ones from one that wins on hard ones"
)


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
    preference: np.ndarray,
    length_a: np.ndarray,
    length_b: np.ndarray,
    difficulty: np.ndarray | None,
    gamed: pd.DataFrame | None = None,
) -> dict:
    """The length-controlled win rate of model b in percent; Dubois et al. 2024 (arXiv:2404.04475), Eq. 2.

        logit P(b wins) = w_length * tanh((length_a - length_b) / sd) + w_difficulty * difficulty + w_model
        length_controlled_win_rate = 100 * mean over the rows of sigmoid(w_difficulty * difficulty + w_model)

    An L1 logistic regression whose strength is chosen by 5-fold cross-validation. Where there are fewer than
    `FEW` verdicts, or length separates wins from losses, such a fit has no finite or no stable maximum: ridge is taken
    instead, and `estimator` says so. Errors and interval come from `REFITS` fits to resampled rows at the chosen
    strength (alpaca_eval prints the spread of the predictions instead, which is no sampling error: 0 without
    difficulties).

    Args:
        preference: (n,) probability that b is better, NaN where there is no verdict (predicted, not fitted).
        length_a, length_b: (n,) characters.
        difficulty: (n,) of each instruction, or None: fitted without it.
        gamed: alpaca_eval's df_gamed (preference, std_delta_len, instruction_difficulty), whose rows regularise the
            weights of length and difficulty with weight 0.1 each; None leaves the regulariser out, which moves
            published figures by 1-2 points, and the result says so.
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
    asked = features * np.r_[0, np.ones(features.shape[1] - 1)]  # as if both answers were equally long
    train, target, weight = features[seen], preference[seen], np.ones(seen.sum())
    extra = _gamed_rows(gamed, features.shape[1])
    few, separable = seen.sum() < FEW, _separable(train, target)
    if few or separable:
        strength, penalty = 1.0, "ridge"
        coefficients = _refit(_stack((train, target, weight), extra), strength, penalty)
    else:
        model = _fit_by_folds(*_stack((train, target, weight), extra))
        strength, penalty, coefficients = float(model.C_), "lasso", model.coef_[0]
    rng, rates = np.random.default_rng(0), []
    for _ in range(REFITS):
        picked = rng.integers(0, len(target), len(target))
        drawn = _refit(_stack((train[picked], target[picked], weight[picked]), extra), strength, penalty)
        rates.append(100 * expit(asked @ drawn).mean())
    predicted = expit(asked @ coefficients)
    names = ["length", *(["difficulty"] if difficulty is not None else []), "model"]
    reason = f"{seen.sum()} verdicts are few (under {FEW})" if few else "length separates wins from losses"
    return {
        "length_controlled_win_rate": 100 * predicted.mean(),
        "length_controlled_standard_error": float(np.std(rates, ddof=1)),
        "length_controlled_lower": float(np.quantile(rates, 0.025)),
        "length_controlled_upper": float(np.quantile(rates, 0.975)),
        "length_control": {
            "weights": dict(zip(names, map(float, coefficients), strict=True)),
            "C": strength,
            "estimator": f"ridge: {reason}" if penalty == "ridge" else "lasso, C by 5-fold cross-validation",
            "difficulty": difficulty is not None,
            "without_difficulty": None if difficulty is not None else NO_DIFFICULTY,
            "gamed_baseline_regulariser": gamed is not None,
            "alpaca_eval_standard_error": 100 * predicted.std(ddof=1) / math.sqrt(len(predicted)),
            "sklearn": sklearn.__version__,
        },
    }


def _gamed_rows(gamed: pd.DataFrame | None, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Features, targets, weights of alpaca_eval's two gamed baselines; they say nothing of the model's own weight."""
    if gamed is None:
        return None
    columns = [np.tanh(gamed["std_delta_len"]), np.zeros(len(gamed))]
    if width == 3:
        columns.insert(1, gamed["instruction_difficulty"])
    return np.column_stack(columns), gamed["preference"].to_numpy(float), np.full(len(gamed), GAMED_WEIGHT)


def _stack(own: tuple, extra: tuple | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return own if extra is None else tuple(np.concatenate([e, o]) for e, o in zip(extra, own, strict=True))


def _separable(features: np.ndarray, target: np.ndarray) -> bool:
    """Whether some weights part all wins from all losses: then a fit without ridge is infinite."""
    if not np.isin(target, (0, 1)).all():
        return False
    sides = -np.where(target == 1, 1.0, -1.0)[:, None] * features
    found = linprog(np.zeros(features.shape[1]), A_ub=sides, b_ub=-np.ones(len(target)), bounds=(None, None))
    return found.status == 0


def _soft_log_loss(y: np.ndarray, predicted: np.ndarray, p_label: np.ndarray, row_weight: np.ndarray) -> float:
    p = np.where(y == 1, p_label, 1 - p_label)  # both copies of a row carry the same target
    predicted = np.clip(predicted, 1e-15, 1 - 1e-15)
    return -np.mean(row_weight * (p * np.log(predicted) + (1 - p) * np.log(1 - predicted)))


def _fit_by_folds(features: np.ndarray, target: np.ndarray, weight: np.ndarray) -> LogisticRegressionCV:
    """A soft label p is the row twice: once as a win with weight p, once as a loss with weight 1 - p."""
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


def _refit(rows: tuple[np.ndarray, np.ndarray, np.ndarray], strength: float, penalty: str) -> np.ndarray:
    """(F,) weights at a given strength of lasso or ridge."""
    features, target, weight = rows
    ratio = {"lasso": 1.0, "ridge": 0.0}[penalty]
    model = LogisticRegression(C=strength, l1_ratio=ratio, solver="liblinear", fit_intercept=False, random_state=123)
    labels, sample_weight = np.repeat([1, 0], len(target)), np.r_[weight * target, weight * (1 - target)]
    if not (sample_weight[labels == 1].any() and sample_weight[labels == 0].any()):
        sample_weight = sample_weight + 1e-6  # a resample of wins alone
    return model.fit(np.vstack([features, features]), labels, sample_weight=sample_weight).coef_[0]


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

    A file of numbers alone is joined on the `index` of the annotations: by the order of rows, a file that was
    shuffled or filtered would be misaligned, and nobody would see it.

    Raises:
        ValueError: a question has no difficulty in the file, or neither side names the question.
    """
    table, key = read_difficulty(file)
    questions = votes["question"] if key == "instruction" else votes["index"]
    if key == "index" and questions.isna().any():
        raise ValueError(
            f"{file} gives difficulties by number, and the annotations have no `index`: their order need not be "
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
    """alpaca_eval's df_gamed: what its judge says of two baselines that were told to be long or short."""
    if file is None:
        return None
    rows = pd.DataFrame([row for _, row in read_rows(file)])
    needed = ["preference", "std_delta_len", "instruction_difficulty"]
    missing = [name for name in needed if name not in rows]
    if missing:
        raise ValueError(f"{file} (task.gamed) lacks {', '.join(missing)}; it must be alpaca_eval's df_gamed.csv")
    return rows[needed].astype(float).dropna()


def parts_far(raw: float, controlled: float) -> bool:
    """Whether a controlled rate is too far from the raw one to be believed: by 10 points and a quarter."""
    low, high = raw - max(raw / 4, 10), raw + max((100 - raw) / 4, 10)
    return not low <= controlled <= high


def model_win_rate(votes: pd.DataFrame, task: DictConfig) -> dict:
    """Every figure of one model against one baseline; what cannot be had is null, with the reason."""
    preference = votes["preference"].fillna(1 - points(votes["verdict"])).to_numpy(float)
    seen = ~np.isnan(preference)
    if not seen.any():
        reason = f"none of the {len(votes)} verdicts is a win or a tie"
        return {"win_rate": None, "standard_error": None, "reason": reason, "n_total": 0, "n_errors": len(votes),
                "length_controlled_win_rate": None, "minimum_detectable_effect": None, "warnings": []}  # fmt: skip
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
            f"the length-controlled rate {controlled:.1f} is far from the raw one {raw:.1f}: the model's "
            f"lengths lie where "
            "the regression has nothing to go by, or were chosen for it (a gamed model); do not rank by it"
        )
    same = votes["hash_b"].value_counts()
    if len(same) and same.iloc[0] >= 3 and same.iloc[0] / len(votes) > task.max_same_answer:
        warnings.append(
            f"{same.iloc[0]} of {len(votes)} answers are one and the same text; a constant text can win 77 % on "
            f"AlpacaEval 2"
        )
    return warnings


def orient(votes: pd.DataFrame, baseline: str | None) -> pd.DataFrame:
    """The votes with each pair written one way, whoever stood where: the baseline, or the first seen, is a."""
    if baseline is not None and not ((votes["model_a"] == baseline) | (votes["model_b"] == baseline)).any():
        names = ", ".join(sorted(set(votes["model_a"]) | set(votes["model_b"])))
        raise ValueError(f"task.baseline={baseline} is none of the models in the votes: {names}")
    first = {}
    for a, b in zip(votes["model_a"], votes["model_b"], strict=True):
        first.setdefault(frozenset((a, b)), a)
    turn = [
        b == baseline or (baseline not in (a, b) and first[frozenset((a, b))] != a)
        for a, b in zip(votes["model_a"], votes["model_b"], strict=True)
    ]
    return swapped(votes, pd.Series(turn, index=votes.index))


def run(cfg: DictConfig, out: Path) -> dict:
    """task=winrate: the win rate of model b, raw and length-controlled, beside the difference it could have shown."""
    task = cfg.task
    votes = read_votes(task.input, task.format)
    judges = sorted(votes["judge"].unique())
    if len(judges) > 1 and not votes["human"].all():
        raise ValueError(
            f"the files hold verdicts of {len(judges)} judges ({', '.join(judges[:5])}); give those of one"
        )
    if (votes["shown"].eq("b") & ~votes["human"]).any():
        votes = fold_orders(votes)
    votes = orient(votes, task.baseline)
    names = votes.groupby(["model_a", "model_b"], sort=False)
    results = {}
    for (baseline, model), part in names:
        result = model_win_rate(part.reset_index(drop=True), task)
        results.setdefault(model, {})[baseline] = {"model": model, "baseline": baseline} | result
    flat = [result for others in results.values() for result in others.values()]
    if all(result["win_rate"] is None for result in flat):
        raise ValueError(f"none of the {len(votes)} rows has a preference; is task.format the right one?")
    columns = ("win_rate", "lower", "upper", "length_controlled_win_rate", "length_controlled_standard_error",
               "minimum_detectable_effect", "n_total", "n_errors")  # fmt: skip
    print_table(
        "win rate in percent (detectable: distance from 50 that so many comparisons would show)",
        ("model", "against", "win rate", "lower", "upper", "length-controlled", "s.e.", "detectable", "n", "errors"),
        [(r["model"], r["baseline"], *(r.get(name) for name in columns)) for r in flat],
    )
    for r in flat:
        for warning in [*r["warnings"], *([r["reason"]] if r.get("reason") else [])]:
            print(f"warning: {r['model']} against {r['baseline']}: {warning}")
        for row in r.get("left_out", []):
            print(f"left out: {row}")
    rows = [(f"{r['model']} against {r['baseline']}", r["win_rate"], r["lower"], r["upper"]) for r in flat
            if r["win_rate"] is not None and r["lower"] is not None]  # fmt: skip
    plot_intervals(out / "win_rate.png", "win rate, percent", rows[:60], null=50)
    return flat[0] if len(flat) == 1 else {"models": results}
