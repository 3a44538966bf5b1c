"""Paired differences of two models on the same questions. They are more precise than two separate intervals."""

from collections.abc import Mapping
from itertools import combinations

import pandas as pd

from evals.intervals import clustered_error, holm, mean_estimate
from runtime.report import print_table


def paired_differences(values: Mapping[str, pd.DataFrame], *, max_difference: float, level: float = 0.95) -> list[dict]:
    """Per pair of models: mean difference on questions that both answered, interval by question, Holm's p value.

    Args:
        values: {model: rows (question, turn, value)}; several rows of a model on one question and turn are averaged.
        max_difference: the largest difference that two values can have.
    """
    means = {model: rows.groupby(["question", "turn"])["value"].mean().dropna() for model, rows in values.items()}
    rows = []
    for first, second in combinations(means, 2):
        gap = (means[first] - means[second]).dropna()
        questions = gap.index.get_level_values("question")
        estimate = mean_estimate(gap, questions, null=0.0, level=level, max_deviation=max_difference)
        error = clustered_error(gap.to_numpy(), questions)[0] if len(gap) else None
        rows.append({"models": [first, second], **estimate, "standard_error": error})
    holm(rows, alpha=1 - level)
    return rows


def print_differences(rows: list[dict], order: list[str]) -> None:
    """Print the difference between each model and the next one in `order`. result.json has all pairs."""
    near = {frozenset(pair) for pair in zip(order, order[1:], strict=False)}
    shown = [row for row in rows if frozenset(row["models"]) in near]
    print_table(
        "paired differences on the same questions, each model and the next one",
        ("", "difference", "lower", "upper", "p (Holm)", "n"),
        [
            (" minus ".join(row["models"]), *(row.get(key) for key in ("value", "lower", "upper", "p_adjusted", "n")))
            for row in shown
        ],
    )
