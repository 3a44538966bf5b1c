"""task=both_orders: judges where the better answer is known and both orders were asked: LLMBar and JudgeBench.

    acc_ab, acc_ba   right in either order;   acc_avg, acc_both   their mean, and right in both   (Zeng et al. 2023,
                     arXiv:2310.07641, LLMBar)
    judgebench       right at least once and never wrong: of the two verdicts more are right than wrong   (Tan et al.
                     2024, arXiv:2410.12784)

A tie and a verdict that cannot be read are neither right nor wrong, so they count against every accuracy.
"""

from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from evals.biases import position
from evals.intervals import share_estimate
from evals.readers import read_votes
from runtime.plots import plot_intervals
from runtime.report import interval_cell, print_table

SOURCES = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")  # JudgeBench reports by these
ACCURACIES = ("acc_ab", "acc_ba", "acc_avg", "acc_both", "judgebench")


def order_accuracy(votes: pd.DataFrame, *, level: float = 0.95) -> dict:
    """Accuracies of one judge on one set of questions, each with its interval; `order` is its position bias.

    Args:
        votes: of the judge in both orders, and of the label (human).
    """
    label = votes[votes["human"]].drop_duplicates("question").set_index("question")["verdict"]
    judge = votes[~votes["human"]].pivot(index="question", columns="shown", values="verdict")
    judge = judge.reindex(columns=["a", "b"]).dropna()
    label = label.loc[judge.index]
    right, wrong = judge.eq(label, axis=0), judge.eq(label.map({"a": "b", "b": "a"}), axis=0)
    hits = {
        "acc_ab": right["a"],
        "acc_ba": right["b"],
        "acc_avg": right.mean(axis=1),
        "acc_both": right.all(axis=1),
        "judgebench": right.sum(axis=1) > wrong.sum(axis=1),
        "agreement_rate": judge["a"] == judge["b"],
    }
    keys = ("value", "lower", "upper", "n", "reason")
    figures = {
        name: {key: estimate.get(key) for key in keys}
        for name, own in hits.items()
        for estimate in [share_estimate(own.astype(float), judge.index, null=0.5, level=level)]
    }
    order = position(votes[~votes["human"]], level=level)
    errors = int((judge == "error").any(axis=1).sum())
    return {"n": len(judge), "errors": errors, **figures, "order": order}


def group_of(category: str) -> str:
    """JudgeBench's sources by what they begin with; LLMBar's subsets as they are."""
    return next((source for source in SOURCES if str(category).startswith(source)), str(category))


def run(cfg: DictConfig, out: Path) -> dict:
    """task=both_orders: every judge on everything and by subset."""
    task = cfg.task
    votes = read_votes(task.input, task.format)
    votes["category"] = votes["category"].map(group_of)
    labels, judged = votes[votes["human"]], votes[~votes["human"]]
    results: dict[str, dict] = {}
    for judge, own in judged.groupby("judge", sort=False):
        asked = own.groupby("question")["shown"].nunique()
        if (asked < 2).any():
            raise ValueError(
                f"{judge} was asked in one order only on {(asked < 2).sum()} of {len(asked)} questions, so its "
                "accuracy in both orders is not known; ask it in both"
            )
        groups = {"all": own, **dict(list(own.groupby("category", sort=False)))}
        results[judge] = {
            name: order_accuracy(pd.concat([labels[labels["question"].isin(part["question"])], part]), level=task.level)
            for name, part in groups.items()
        }
    figures = (*ACCURACIES, "agreement_rate", "order")
    rows = [(f"{judge}: {name}", *(interval_cell(row[key]) for key in figures), row["n"], row["errors"])
            for judge, groups in results.items() for name, row in groups.items()]  # fmt: skip
    head = (
        "",
        "first order",
        "second",
        "mean",
        "both",
        "JudgeBench's",
        "orders agree",
        "first share",
        "n",
        "no verdict",
    )
    print_table("share of right verdicts", head, rows)
    shown = [(f"{judge}: {name}", *(row["acc_avg"][key] for key in ("value", "lower", "upper")))
             for judge, groups in results.items() for name, row in groups.items()]  # fmt: skip
    plot_intervals(out / "both_orders.png", "share right, mean of both orders", shown[:60], null=0.5)
    return {"judges": results}
