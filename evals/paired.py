"""Two models on the same questions: their difference question by question, which is surer than two intervals."""

from collections.abc import Mapping
from itertools import combinations

import pandas as pd

from evals.intervals import clustered_error, holm, mean_estimate
from runtime.report import print_table


def paired_differences(values: Mapping[str, pd.DataFrame], *, spread: float, level: float = 0.95) -> list[dict]:
    """Each two models: mean difference over what both answered, its interval by question, and Holm's p value.

    Args:
        values: {model: rows (question, turn, value)}; several rows of a model on one question and turn are averaged.
        spread: the largest difference that two values can have.
    """
    means = {model: rows.groupby(["question", "turn"])["value"].mean().dropna() for model, rows in values.items()}
    rows = []
    for first, second in combinations(means, 2):
        gap = (means[first] - means[second]).dropna()
        questions = gap.index.get_level_values("question")
        estimate = mean_estimate(gap, questions, null=0.0, level=level, spread=spread)
        error = clustered_error(gap.to_numpy(), questions)[0] if len(gap) else None
        rows.append({"models": [first, second], **estimate, "standard_error": error})
    holm(rows, alpha=1 - level)
    return rows


def print_differences(rows: list[dict], order: list[str]) -> None:
    """Each model against the one that follows it in `order`; result.json has all pairs."""
    near = {frozenset(pair) for pair in zip(order, order[1:], strict=False)}
    shown = [row for row in rows if frozenset(row["models"]) in near]
    print_table(
        "paired differences on the same questions, each model and the next one",
        ("", "difference", "lower", "upper", "p (Holm)", "n"),
        [(" minus ".join(row["models"]), *(row.get(key) for key in ("value", "lower", "upper", "p_adjusted", "n")))
         for row in shown],
    )  # fmt: skip
