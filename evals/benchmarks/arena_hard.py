"""task=arena_hard: scores against each category's baseline, plain and without style (Li et al. 2024, arXiv:2406.11939).

Every pair is judged in both orders with five verdicts. A strong verdict (A>>B) counts three times. The score of a model
is the weighted share of points against the baseline. An item with an unreadable game is left out. Style control is a
logistic regression of the points on the model and on differences of style:

    logit P(model wins) = rating(model) + weights * z,   z: length (m - b) / (m + b), and headers, lists and bold
    text per token (m - b) / (m + b + 1), each z-scored over all battles;   score = sigmoid(rating)
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from data.files import read_rows
from evals.answers import NAMES, load_answers, style_features
from evals.intervals import percent, share_estimate, unknown
from evals.readers import read_votes
from evals.verdicts import points, sort_pairs
from runtime.plots import plot_intervals
from runtime.report import interval_cell, print_table

FEATURES = ("tokens", "headers", "lists", "bold")
METADATA = {"tokens": "token_len", "headers": "header_count", "lists": "list_count", "bold": "bold_count"}
RIDGE_BELOW = 50  # style control uses ridge if a category has fewer battles


def games_of(votes: pd.DataFrame, baselines: dict[str, str]) -> tuple[pd.DataFrame, int]:
    """(one row per game: question, category, model, points of the model, weight; the number of items without verdict).

    Args:
        baselines: {category: model}. The key `default` is for all other categories.
    Raises:
        ValueError: a battle without the baseline of its category.
    """
    votes = sort_pairs(votes)
    votes = votes.assign(category=votes["category"].fillna("all"))
    base = votes["category"].map(lambda name: baselines.get(name, baselines.get("default")))
    known = (votes["model_a"] == base) | (votes["model_b"] == base)
    if not known.all():
        row = votes[~known].iloc[0]
        raise ValueError(
            f"{row['model_a']} against {row['model_b']} in category {row['category']}: neither is its baseline; give "
            "task.baselines={default: MODEL}, or one baseline for each category"
        )
    item = [votes[name] for name in ("question", "turn", "model_a", "model_b")]
    readable = (votes["verdict"] != "error").groupby(item).transform("all")
    dropped = votes[~readable].drop_duplicates(["question", "turn", "model_a", "model_b"])
    votes, base = votes[readable], base[readable]
    won = points(votes["verdict"]).where(votes["model_a"] != base, 1 - points(votes["verdict"]))
    model = votes["model_a"].where(votes["model_a"] != base, votes["model_b"])
    about = votes[["question", "category", "weight"]]
    return about.assign(model=model, baseline=base, won=won).reset_index(drop=True), len(dropped)


def score(games: pd.DataFrame, level: float) -> dict:
    """The weighted share of points of one model in percent, with its interval clustered by question."""
    weight = games["weight"].to_numpy(float)
    value = float(np.average(games["won"], weights=weight))
    repeated = games.loc[games.index.repeat(games["weight"].astype(int))]
    estimate = share_estimate(repeated["won"], repeated["question"], null=0.5, level=level)
    if estimate["value"] is None:
        return unknown(estimate["reason"], n=len(games)) | {"value": 100 * value}
    return percent(estimate) | {"n": len(games)}


def style_of(files: Sequence[str]) -> dict[tuple[str, str], dict[str, float]]:
    """{(model, question): style}: the counts in `metadata` of the rows, or else counted here."""
    found = {
        (model, question): style_features(turns)
        for model, questions in load_answers(files).items()
        for question, turns in questions.items()
    }
    for file in files:
        for _, row in read_rows(file):
            metadata, number = row.get("metadata"), row.get("uid", row.get("question_id"))
            if isinstance(metadata, dict) and number is not None and set(METADATA.values()) <= set(metadata):
                model = str(next((row[name] for name in NAMES if row.get(name)), Path(file).absolute().parent.name))
                counts = {name: metadata[key] for name, key in METADATA.items()}
                found[model, str(number)] = {
                    name: sum(value.values()) if isinstance(value, dict) else value for name, value in counts.items()
                }
    return found


def style_gaps(games: pd.DataFrame, style: dict) -> np.ndarray:
    """(n, 4) z-scored differences of style, model minus baseline.

    Raises:
        ValueError: an answer is not in task.answers.
    """
    sides = []
    for side in ("model", "baseline"):
        keys = list(zip(games[side], games["question"], strict=True))
        missing = [key for key in keys if key not in style]
        if missing:
            raise ValueError(f"style control: task.answers has no answer of {missing[0][0]} to {missing[0][1]}")
        counts = np.array([[style[key][name] for name in FEATURES] for key in keys], float)
        sides.append(np.column_stack([counts[:, 0], counts[:, 1:] / (counts[:, :1] + 1)]))
    model, base = sides
    total = model + base
    total[:, 0] = np.where(total[:, 0] > 0, total[:, 0], 1)
    total[:, 1:] += 1
    gaps = (model - base) / total
    counted = np.repeat(gaps, games["weight"].astype(int), axis=0)  # a strong verdict counts as three battles here too
    std = counted.std(axis=0, ddof=1) if len(counted) > 1 else np.zeros(4)
    return (gaps - counted.mean(axis=0)) / np.where(std > 0, std, 1)


def controlled(games: pd.DataFrame, style: dict, *, level: float, rounds: int) -> dict:
    """{"estimator", "weights", "models": {model: score without style, in percent, lower, upper, n}} of one category."""
    models, numbers = np.unique(games["model"], return_inverse=True)
    features = np.column_stack([np.eye(len(models))[numbers], style_gaps(games, style)])
    won, weight = games["won"].to_numpy(float), games["weight"].to_numpy(float)
    few = len(games) < RIDGE_BELOW
    one_sided = any(np.unique(won[numbers == i]).size < 2 for i in range(len(models)))
    strength = 1.0 if few or one_sided else np.inf
    fit = _fit(features, won, weight, strength)
    questions, inverse = np.unique(games["question"], return_inverse=True)
    rng, draws = np.random.default_rng(0), []
    for _ in range(rounds):
        counts = np.bincount(rng.integers(0, len(questions), len(questions)), minlength=len(questions))[inverse]
        drawn = _fit(features, won, weight * counts, strength)
        draws.append(100 * expit(drawn[: len(models)]))
    lower, upper = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    reason = f"{len(games)} battles are few" if few else "a model won or lost all its battles"
    return {
        "estimator": "maximum likelihood" if strength == np.inf else f"ridge: {reason}",
        "weights": dict(zip(FEATURES, map(float, fit[len(models) :]), strict=True)),
        "models": {
            str(model): {
                "value": float(100 * expit(fit[i])),
                "lower": float(lower[i]),
                "upper": float(upper[i]),
                "n": int((numbers == i).sum()),
            }
            for i, model in enumerate(models)
        },
    }


def _fit(features: np.ndarray, won: np.ndarray, weight: np.ndarray, strength: float) -> np.ndarray:
    labels, sample_weight = np.repeat([1, 0], len(won)), np.r_[weight * won, weight * (1 - won)]
    if not (sample_weight[labels == 1].any() and sample_weight[labels == 0].any()):
        sample_weight = sample_weight + 1e-6
    model = LogisticRegression(C=strength, solver="lbfgs", fit_intercept=False, max_iter=200, tol=1e-6)
    return model.fit(np.vstack([features, features]), labels, sample_weight=sample_weight).coef_[0]


def run(cfg: DictConfig, out: Path) -> dict:
    """task=arena_hard: result.json with one table per category, and arena_hard.png."""
    task = cfg.task
    votes = read_votes(task.input, task.format)
    games, dropped = games_of(votes[~votes["human"]], dict(task.baselines))
    style = style_of(task.answers) if task.style_control else None
    if task.style_control and not task.answers:
        raise ValueError("task.style_control=true needs the answers: task.answers=[FILES], with those of the baseline")
    results, rows = {}, []
    for category, part in games.groupby("category", sort=True):
        table = {model: score(own, task.level) for model, own in part.groupby("model", sort=False)}
        results[category] = {"baseline": part["baseline"].iloc[0], "models": table}
        if style is not None:
            found = controlled(part, style, level=task.level, rounds=task.rounds)
            results[category]["style_controlled"] = found
        for model, row in sorted(table.items(), key=lambda pair: -pair[1]["value"]):
            own = results[category].get("style_controlled", {}).get("models", {}).get(model, {})
            rows.append(
                (f"{category}: {model}", row["value"], row["lower"], row["upper"], interval_cell(own or None), row["n"])
            )
    print_table(
        f"Arena-Hard, percent ({dropped} items without a verdict)",
        ("", "score", "lower", "upper", "style controlled", "games"),
        rows,
    )
    plot_intervals(out / "arena_hard.png", "score, percent", [r[:4] for r in rows if r[2] is not None][:60], null=50)
    return {"categories": results, "errors": dropped, "level": task.level}
