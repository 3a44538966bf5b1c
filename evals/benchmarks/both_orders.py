"""task=both_orders: accuracy of judges in both orders if the better answer is known: LLMBar and JudgeBench.

    acc_ab, acc_ba   share of right verdicts in each order
    acc_avg          mean of the two
    acc_both         share of questions with right verdicts in both orders   (LLMBar: Zeng et al. 2023,
                     arXiv:2310.07641)
    judgebench       share of questions with more right than wrong verdicts of the two, so right at least once and never
                     wrong   (Tan et al. 2024, arXiv:2410.12784)

Ties and unreadable verdicts are neither right nor wrong. They lower every accuracy.
"""

from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from evals.biases import position
from evals.intervals import share_estimate
from evals.readers import read_votes
from runtime.plots import plot_intervals
from runtime.report import interval_cell, print_table

# The groups in which JudgeBench reports
SOURCES = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")
ACCURACIES = ("acc_ab", "acc_ba", "acc_avg", "acc_both", "judgebench")


def order_accuracy(votes: pd.DataFrame, *, level: float = 0.95) -> dict:
    """Accuracies of one judge on one set of questions, each with its interval. `order` is the position bias.

    Args:
        votes: the votes of the judge in both orders, and the labels (human).
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
    """The source of a JudgeBench category, which begins with the source's name. LLMBar's subsets are not changed."""
    return next((source for source in SOURCES if str(category).startswith(source)), str(category))


def run(cfg: DictConfig, out: Path) -> dict:
    """task=both_orders: the accuracies of every judge on all questions and on each subset."""
    task = cfg.task
    votes = read_votes(task.input, task.format)
    votes["category"] = votes["category"].map(group_of)
    labels, judged = votes[votes["human"]], votes[~votes["human"]]
    results: dict[str, dict] = {}
    for judge, own in judged.groupby("judge", sort=False):
        orders = own.groupby("question")["shown"].nunique()
        if (orders < 2).any():
            raise ValueError(
                f"{judge} judged only one order of {(orders < 2).sum()} of {len(orders)} questions, so its "
                "accuracy in both orders is unknown; judge them in both orders"
            )
        groups = {"all": own, **dict(list(own.groupby("category", sort=False)))}
        results[judge] = {
            name: order_accuracy(pd.concat([labels[labels["question"].isin(part["question"])], part]), level=task.level)
            for name, part in groups.items()
        }
    figures = (*ACCURACIES, "agreement_rate", "order")
    rows = [
        (f"{judge}: {name}", *(interval_cell(row[key]) for key in figures), row["n"], row["errors"])
        for judge, groups in results.items()
        for name, row in groups.items()
    ]
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
    shown = [
        (f"{judge}: {name}", *(row["acc_avg"][key] for key in ("value", "lower", "upper")))
        for judge, groups in results.items()
        for name, row in groups.items()
    ]
    plot_intervals(out / "both_orders.png", "share right, mean of both orders", shown[:60], null=0.5)
    return {"judges": results}
