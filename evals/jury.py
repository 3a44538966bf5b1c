"""task=jury: several judges on the same pairs: their agreement, their majority, and ratings from all their votes."""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from evals.agreement import agreement_of, judge_pairs, majority
from evals.intervals import percent, share_estimate
from evals.ratings import rate
from evals.readers import read_votes
from evals.verdicts import fold_orders, points
from runtime.report import interval_cell, print_table


def judge_matrix(votes: pd.DataFrame, *, level: float, rounds: int) -> list[dict]:
    """Agreement and kappa, with intervals and n, of every two judges on the items that both decided."""
    rows = []
    for first, second in combinations(votes["judge"].unique(), 2):
        pairs = judge_pairs(votes[votes["judge"] == first], votes[votes["judge"] == second])
        if len(pairs):
            found = agreement_of(pairs, symmetric=True, level=level, rounds=rounds)
            rows.append({"judges": [first, second], **found})
    return rows


def by_judge(votes: pd.DataFrame, settings: dict) -> dict:
    """{judge: {model: rating, lower, upper, n}}, or a reason where ratings are not finite."""
    matrix = {}
    for judge, own in votes.groupby("judge", sort=False):
        try:
            matrix[judge] = rate(own, **settings)["ratings"]
        except ValueError as error:
            matrix[judge] = {"reason": str(error)}
    return matrix


def share_matrix(votes: pd.DataFrame, baseline: str | None, *, level: float) -> dict:
    """{judge: {model: percent of points, lower, upper, n}}. A tie is half a point.

    Args:
        baseline: only battles against it count. If None, all battles count, which is fair only if all
            models met all others.
    """
    matrix: dict[str, dict] = {}
    for judge, own in votes.groupby("judge", sort=False):
        for model in sorted(set(own["model_a"]) | set(own["model_b"])):
            sides = [own[own[f"model_{side}"] == model] for side in "ab"]
            won = pd.concat([points(sides[0]["verdict"]), 1 - points(sides[1]["verdict"])])
            met = pd.concat([sides[0]["model_b"], sides[1]["model_a"]])
            questions = pd.concat([side["question"] for side in sides])
            kept = met == baseline if baseline is not None else met.notna()
            if kept.any():
                estimate = percent(share_estimate(won[kept], questions[kept], null=0.5, level=level))
                figure = {key: estimate.get(key) for key in ("value", "lower", "upper", "n", "reason")}
                matrix.setdefault(judge, {})[model] = figure
    return matrix


def spent(files: Sequence[str]) -> dict:
    """Cost, seconds and requests of the verdicts, from the result.json beside each file."""
    results = [Path(file).parent / "result.json" for file in files]
    usages = [json.loads(path.read_text(encoding="utf-8")).get("usage") or {} for path in results if path.is_file()]
    total = {name: sum(usage.get(name, 0) for usage in usages) for name in ("cost", "seconds", "asked", "from_cache")}
    return total | {"runs": len(usages)}


def run(cfg: DictConfig, out: Path) -> dict:
    """task=jury: agreement between judges, the majority's ratings, and Bradley-Terry over all judges' votes."""
    task = cfg.task
    votes = fold_orders(read_votes(task.input, task.format))
    votes = votes[~votes["human"]]
    errors = votes[votes["verdict"] == "error"].groupby("judge").size().to_dict()
    known = votes[votes["verdict"] != "error"]
    judges = list(known["judge"].unique())
    if task.baseline is not None and not (known[["model_a", "model_b"]] == task.baseline).any(axis=None):
        names = ", ".join(sorted(set(known["model_a"]) | set(known["model_b"])))
        raise ValueError(f"task.baseline={task.baseline} is not among the models in the verdicts: {names}")
    if len(judges) < 2:
        raise ValueError(
            f"a jury needs verdicts of two judges or more, the files have those of {', '.join(judges) or 'none'}"
        )
    settings = {"method": "bradley_terry", "interval": "clustered", "level": task.level, "rounds": 0, "k": 4.0}
    settings["anchor"] = None
    decided = majority(known).assign(judge="majority", shown=None)
    result = {
        "judges": judges,
        "errors": {judge: int(errors.get(judge, 0)) for judge in judges},
        "agreement": judge_matrix(known, level=task.level, rounds=task.rounds),
        "majority": rate(decided, **settings)["ratings"],
        "all_judges": rate(known.assign(shown=None), **settings)["ratings"],
        "by_judge": by_judge(known, settings),
        "shares": share_matrix(known, task.baseline, level=task.level),
        "ties_of_the_majority": float((decided["verdict"] == "tie").mean()),
        "n": len(decided),
        "spent": spent(task.input),
    }
    rows = [
        (
            " and ".join(row["judges"]),
            row["agreement"],
            *row["agreement_interval"],
            row["kappa"],
            *row["kappa_interval"],
            row["n"],
        )
        for row in result["agreement"]
    ]
    print_table("agreement between judges", ("", "agreement", "lower", "upper", "kappa", "lower", "upper", "n"), rows)
    models = sorted({model for own in result["shares"].values() for model in own})
    rows = [(judge, *(interval_cell(own.get(model)) for model in models)) for judge, own in result["shares"].items()]
    against = task.baseline or "all others"
    print_table(f"percent of points against {against}, by judge", ("judge", *models), rows)
    cost = result["spent"]
    if cost["runs"]:
        print(
            f"the verdicts took {cost['asked']} requests ({cost['from_cache']} answers from the cache), "
            f"{cost['cost']:.4f} in currency units and {cost['seconds'] / 60:.1f} minutes"
        )
    for name in ("majority", "all_judges"):
        rows = [(model, row["rating"], row["lower"], row["upper"], row["n"]) for model, row in result[name].items()]
        print_table(f"ratings by {name.replace('_', ' ')}", ("model", "rating", "lower", "upper", "n"), rows)
    return result
