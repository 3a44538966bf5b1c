"""task=jury: several judges on the same pairs: how they agree, their majority, and ratings by all of them together."""

from itertools import combinations
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from evals.agreement import agreement_of, judge_pairs, majority
from evals.ratings import rate
from evals.readers import read_votes
from evals.verdicts import fold_orders
from runtime.report import print_table


def judge_matrix(votes: pd.DataFrame, *, level: float, rounds: int) -> list[dict]:
    """Each two judges on the items that both decided: agreement and kappa with intervals, and n."""
    rows = []
    for first, second in combinations(votes["judge"].unique(), 2):
        pairs = judge_pairs(votes[votes["judge"] == first], votes[votes["judge"] == second])
        if len(pairs):
            found = agreement_of(pairs, symmetric=True, level=level, rounds=rounds)
            rows.append({"judges": [first, second], **found})
    return rows


def by_judge(votes: pd.DataFrame, settings: dict) -> dict:
    """{judge: {model: rating, lower, upper, n}}: the judge x model matrix; a reason where ratings are not finite."""
    matrix = {}
    for judge, own in votes.groupby("judge", sort=False):
        try:
            matrix[judge] = rate(own, **settings)["ratings"]
        except ValueError as error:
            matrix[judge] = {"reason": str(error)}
    return matrix


def run(cfg: DictConfig, out: Path) -> dict:
    """task=jury: agreement between judges, the majority's ratings, and Bradley-Terry over all judges' votes."""
    task = cfg.task
    votes = fold_orders(read_votes(task.input, task.format))
    votes = votes[~votes["human"]]
    errors = votes[votes["verdict"] == "error"].groupby("judge").size().to_dict()
    known = votes[votes["verdict"] != "error"]
    judges = list(known["judge"].unique())
    if len(judges) < 2:
        raise ValueError(
            f"a jury needs verdicts of two judges or more, the files hold those of {', '.join(judges) or 'none'}"
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
        "ties_of_the_majority": float((decided["verdict"] == "tie").mean()),
        "n": len(decided),
    }
    rows = [(" and ".join(row["judges"]), row["agreement"], *row["agreement_interval"], row["kappa"], row["n"])
            for row in result["agreement"]]  # fmt: skip
    print_table("judges among themselves", ("", "agreement", "lower", "upper", "kappa", "n"), rows)
    for name in ("majority", "all_judges"):
        rows = [(model, row["rating"], row["lower"], row["upper"], row["n"]) for model, row in result[name].items()]
        print_table(f"ratings by {name.replace('_', ' ')}", ("model", "rating", "lower", "upper", "n"), rows)
    return result
