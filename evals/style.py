"""Bradley-Terry ratings with style control, for the length, headers, lists and bold text of the answers."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, hstack, vstack
from sklearn.linear_model import LogisticRegression

from data.files import read_rows
from evals.answers import load_answers, style_features
from evals.verdicts import points, scored

FEATURES = ("tokens", "headers", "lists", "bold")
METADATA = {
    "tokens": "sum_assistant_{}_tokens",
    "headers": "header_count_{}",
    "lists": "list_count_{}",
    "bold": "bold_count_{}",
}
RIDGE = 0.5


def add_style(votes: pd.DataFrame, files: Sequence[str], answers: Sequence[str] | None) -> pd.DataFrame:
    """The scored votes with tokens_a, headers_a, ... of both answers: from `answers`, or the battles' conv_metadata.

    Raises:
        ValueError: an answer's style is not known.
    """
    if answers:
        found = {
            (model, question): style_features(turns)
            for model, questions in load_answers(answers).items()
            for question, turns in questions.items()
        }
        votes = scored(votes)
        sides = [[found.get(key) for key in zip(votes[f"model_{s}"], votes["question"], strict=True)] for s in "ab"]
    else:
        rows = [row.get("conv_metadata") for file in files for _, row in read_rows(file)]
        known = votes["verdict"] != "error"  # one row per vote, because arena battles are never folded
        sides = [[_metadata(row, side) for row, kept in zip(rows, known, strict=True) if kept] for side in "ab"]
        votes = scored(votes)
    unknown = sum(row is None for side in sides for row in side)
    if unknown:
        raise ValueError(
            f"style control: the style of {unknown} answers is not known; give task.answers=[FILES], or battles with "
            "conv_metadata (sum_assistant_a_tokens, header_count_a, list_count_a, bold_count_a and b's)"
        )
    values = {
        f"{name}_{s}": [row[name] for row in side] for s, side in zip("ab", sides, strict=True) for name in FEATURES
    }
    return votes.assign(**values)


def _metadata(row: Mapping | None, side: str) -> dict[str, float] | None:
    if not isinstance(row, Mapping):
        return None
    values = {name: row.get(key.format(side)) for name, key in METADATA.items()}
    return (
        None
        if None in values.values()
        else {name: sum(value.values()) if isinstance(value, Mapping) else value for name, value in values.items()}
    )


def style_differences(votes: pd.DataFrame) -> np.ndarray:
    """(n, 4) how much more of each feature a has, relative to both together, z-scored over the battles."""
    gaps = []
    for name in FEATURES:
        a, b = votes[f"{name}_a"].to_numpy(float), votes[f"{name}_b"].to_numpy(float)
        gaps.append((a - b) / (a + b + 1))  # + 1, because both may be 0
    gaps = np.column_stack(gaps)
    std = gaps.std(axis=0)
    return (gaps - gaps.mean(axis=0)) / np.where(std > 0, std, 1)


def fit_style(
    a: np.ndarray, b: np.ndarray, won: np.ndarray, style: np.ndarray, num_models: int, counts: np.ndarray | float = 1.0
) -> np.ndarray:
    """(M + 4,) ratings (mean 1000) and style weights, in log odds per standard deviation.

    log odds that a wins = ln 10 * (x_a - x_b) + weights * style,   loss + 0.25 * |(x, weights)|^2,
    rating = 400 * x + 1000     (Chatbot Arena's style control: ridge 0.5 on everything)

    `counts` is the number of times that each battle counts.
    """
    n, rows = len(won), np.arange(len(won))
    one = np.full(n, np.log(10.0))
    models = csr_matrix((np.r_[one, -one], (np.r_[rows, rows], np.r_[a, b])), shape=(n, num_models))
    features = hstack([models, csr_matrix(style)]).tocsr()
    model = LogisticRegression(C=1 / RIDGE, fit_intercept=False, tol=1e-8, max_iter=1000)
    model.fit(vstack([features, features]), np.repeat([1, 0], n), sample_weight=np.r_[counts * won, counts * (1 - won)])
    weights = model.coef_[0]
    ratings = 400 * weights[:num_models]
    return np.r_[ratings - ratings.mean() + 1000, weights[num_models:]]


def rate_style(votes: pd.DataFrame, *, level: float, rounds: int) -> dict:
    """{"style_controlled": {model: rating, lower, upper}, "style": {feature: weight, lower, upper}} of scored votes.

    Intervals are percentiles over resampled questions, with all battles of a question together.
    """
    numbers, models = pd.factorize(pd.concat([votes["model_a"], votes["model_b"]]))
    a, b = np.split(numbers, 2)
    won, style = points(votes["verdict"]).to_numpy(float), style_differences(votes)
    values = fit_style(a, b, won, style, len(models))
    questions = pd.factorize(votes["question"])[0]
    groups = questions.max() + 1
    times = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), size=rounds)  # (rounds, G)
    draws = [fit_style(a, b, won, style, len(models), drawn[questions]) for drawn in times]
    lower, upper = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    rows = [
        dict(zip(("rating", "lower", "upper"), map(float, row), strict=True))
        for row in zip(values, lower, upper, strict=True)
    ]
    weights = [{"weight" if name == "rating" else name: value for name, value in row.items()} for row in rows]
    order = np.argsort(-values[: len(models)], kind="stable")
    return {
        "style_controlled": {models[i]: rows[i] | {"n": int((a == i).sum() + (b == i).sum())} for i in order},
        "style": {name: row | {"n": len(won)} for name, row in zip(FEATURES, weights[len(models) :], strict=True)},
    }
