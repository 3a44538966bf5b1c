"""Agreement of a judge with people, and of people with each other."""

import math
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import krippendorff
import numpy as np
import pandas as pd
from omegaconf import DictConfig
from scipy.stats import pearsonr, spearmanr
from statsmodels.stats.inter_rater import cohens_kappa

from evals.intervals import bootstrap_estimate, share_estimate
from evals.questions import add_categories
from evals.readers import read_votes
from evals.verdicts import PAIR, check_readable, fold_orders, points
from runtime.plots import plot_intervals
from runtime.report import interval_cell, print_table

OUTCOMES = ["a", "b", "tie"]


def split_judge(votes: pd.DataFrame, *, judge: str | None, humans: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(people's votes, the judge's votes): pairs are sorted, the judge's two orders are folded, errors are left out.

    Args:
        judge: its name, or None if the votes are of one judge only.
        humans: glob of the names that count as people (FastChat: expert_*).
    Raises:
        ValueError: no human vote, or the judge is missing or ambiguous.
    """
    check_readable(votes)
    votes = fold_orders(votes)
    votes = votes[votes["verdict"] != "error"]
    judge = only_judge(votes, judge)
    people = votes[votes["human"] & votes["judge"].map(lambda name: fnmatch(name, humans))]
    if not len(people):
        named = ", ".join(sorted(votes.loc[votes["human"], "judge"].unique())[:5])
        raise ValueError(f"no human vote matches task.humans={humans!r}; people in the votes: {named or 'none'}")
    return people, votes[~votes["human"] & (votes["judge"] == judge)]


def only_judge(votes: pd.DataFrame, name: str | None) -> str:
    """The name of the judge: `name`, or the only judge in the votes.

    Raises:
        ValueError: there is no judge, `name` is not among the judges, or there are several and no name is given.
    """
    judges = sorted(votes.loc[~votes["human"], "judge"].unique())
    if not judges:
        raise ValueError("no judge's verdict in the files, only people's votes; write task.input=[people, judge]")
    if name is None and len(judges) == 1:
        return judges[0]
    if name not in judges:
        raise ValueError(f"task.judge={name} must name one of the judges in the votes: {', '.join(judges)}")
    return name


def judge_pairs(people: pd.DataFrame, judge: pd.DataFrame) -> pd.DataFrame:
    """One row for each human vote on an item that the judge voted on: its verdict `x` and the judge's `y`."""
    judged = judge.drop_duplicates(PAIR)[[*PAIR, "verdict"]].rename(columns={"verdict": "y"})
    pairs = people.rename(columns={"verdict": "x"}).merge(judged, on=PAIR)
    return pairs[[*PAIR, "category", "x", "y"]]


def human_pairs(people: pd.DataFrame) -> pd.DataFrame:
    """One row for each pair of human votes on the same item, with verdicts `x` and `y`."""
    items = people[[*PAIR, "category", "verdict"]].assign(place=people.groupby(PAIR).cumcount())
    first, second = (items.rename(columns={"verdict": name, "place": f"place_{name}"}) for name in "xy")
    pairs = first.merge(second.drop(columns="category"), on=PAIR)
    return pairs.loc[pairs["place_x"] < pairs["place_y"], [*PAIR, "category", "x", "y"]].reset_index(drop=True)


def majority(people: pd.DataFrame) -> pd.DataFrame:
    """One row per item: the verdict with most votes. Two verdicts with equally many votes make a tie."""
    counts = people.groupby([*PAIR, "verdict"], sort=False).size().unstack(fill_value=0)
    counts = counts.reindex(columns=OUTCOMES, fill_value=0)
    top = counts.max(axis=1)
    verdict = counts.idxmax(axis=1).where(counts.eq(top, axis=0).sum(axis=1) == 1, "tie")
    items = people.drop_duplicates(PAIR).set_index(PAIR)
    return items.assign(verdict=verdict).reset_index()


def kappa(table: np.ndarray) -> float:
    """Cohen's kappa (Cohen 1960) of a (3, 3) table of votes. NaN if chance alone agrees always or never."""
    if not table.sum():
        return math.nan
    rows, columns = table.sum(1) / table.sum(), table.sum(0) / table.sum()
    return float(cohens_kappa(table, return_results=False)) if rows @ columns < 1 else math.nan


def vote_tables(pairs: pd.DataFrame, *, symmetric: bool) -> np.ndarray:
    """(questions, 3, 3) counts of the outcomes of x and y.

    symmetric: the voters are anonymous, so each pair of votes counts half in both orders.
    """
    questions = pd.factorize(pairs["question"])[0]
    x, y = (pairs[side].map(OUTCOMES.index).to_numpy(int) for side in "xy")
    tables = np.zeros((questions.max(initial=-1) + 1, 3, 3))
    np.add.at(tables, (questions, x, y), 1.0)
    return (tables + tables.transpose(0, 2, 1)) / 2 if symmetric else tables


def both_ways(table: np.ndarray) -> np.ndarray:
    """A (3, 3) table in which every pair is also counted with model a and model b exchanged.

    The result must not depend on which model is called a.
    """
    return table + table[np.ix_((1, 0, 2), (1, 0, 2))]


def agreement_of(pairs: pd.DataFrame, *, symmetric: bool, level: float, rounds: int) -> dict:
    """Agreement with and without ties, and kappa, each with its interval over questions.

    Every kind of tie is one class; without ties, a pair counts only if neither vote is a tie (FastChat's rule).
    """
    tables = vote_tables(pairs, symmetric=symmetric)
    without = pairs[(pairs["x"] != "tie") & (pairs["y"] != "tie")]
    estimates = {
        name: share_estimate(part["x"] == part["y"], part["question"], null=0.5, level=level)
        for name, part in (("agreement", pairs), ("agreement_no_ties", without))
    }
    estimates["kappa"] = bootstrap_estimate(
        lambda counts: kappa(both_ways(np.tensordot(counts, tables, 1))),
        len(pairs),
        len(tables),
        null=0.0,
        level=level,
        rounds=rounds,
    )
    result = {name: estimate["value"] for name, estimate in estimates.items()}
    result |= {f"{name}_interval": [estimate["lower"], estimate["upper"]] for name, estimate in estimates.items()}
    return result | {"n": len(pairs), "n_no_ties": len(without)}


def estimate(found: dict, name: str) -> dict:
    """A figure of `agreement_of` as {"value", "lower", "upper"}."""
    return dict(zip(("value", "lower", "upper"), (found[name], *found[f"{name}_interval"]), strict=True))


def by_group(pairs: pd.DataFrame, *, symmetric: bool, level: float, rounds: int) -> dict:
    """`agreement_of` all pairs, of each turn and of each category."""
    figures = partial(agreement_of, symmetric=symmetric, level=level, rounds=rounds)
    result = figures(pairs)
    for name, column in (("turns", "turn"), ("categories", "category")):
        result[name] = {str(key): figures(part) for key, part in pairs.groupby(column)}
    return result


def majority_agreement(people: pd.DataFrame, judge: pd.DataFrame) -> dict:
    """Agreement of the judge with the majority of the people, one row per item, with rank correlations."""
    items = judge_pairs(majority(people), judge)
    without = items[(items["x"] != "tie") & (items["y"] != "tie")]
    mean = (
        people.assign(x=points(people["verdict"])).groupby(PAIR)["x"].mean()
    )  # rank correlation uses the shares of votes
    x, y = mean.loc[pd.MultiIndex.from_frame(items[PAIR])].to_numpy(), points(items["y"]).to_numpy()
    varied = len(np.unique(x)) > 1 and len(np.unique(y)) > 1
    return {
        "agreement": float((items["x"] == items["y"]).mean()) if len(items) else None,
        "agreement_no_ties": float((without["x"] == without["y"]).mean()) if len(without) else None,
        "kappa": kappa(both_ways(vote_tables(items, symmetric=False).sum(0))) if len(items) else None,
        "kappa_no_ties": kappa(both_ways(vote_tables(without, symmetric=False).sum(0))) if len(without) else None,
        "spearman": float(spearmanr(np.r_[x, 1 - x], np.r_[y, 1 - y]).statistic) if varied else None,
        "pearson": float(pearsonr(np.r_[x, 1 - x], np.r_[y, 1 - y]).statistic) if varied else None,
        "as_written": {  # each pair in one order only, sorted by name, as in published figures
            "kappa": kappa(vote_tables(items, symmetric=False).sum(0)) if len(items) else None,
            "kappa_no_ties": kappa(vote_tables(without, symmetric=False).sum(0)) if len(without) else None,
            "spearman": float(spearmanr(x, y).statistic) if varied else None,
            "pearson": float(pearsonr(x, y).statistic) if varied else None,
        },
        "n": len(items),
        "n_no_ties": len(without),
    }


def alpha(votes: pd.DataFrame, level: str, *, as_written: bool = False) -> float | None:
    """Krippendorff's alpha (nominal or ordinal) of the voters over the items. A voter's last vote on an item counts.

    Each item counts with its models in both orders, unless `as_written`.
    """
    table = votes.assign(points=points(votes["verdict"])).pivot_table(
        index="judge", columns=PAIR, values="points", aggfunc="last", sort=False
    )
    if table.notna().sum().max() < 2 or np.unique(table.to_numpy()[table.notna()]).size < 2:
        return None
    values = table.to_numpy(float)
    values = values if as_written else np.hstack([values, 1 - values])
    return float(krippendorff.alpha(values, level_of_measurement=level))


def run(cfg: DictConfig, out: Path) -> dict:
    """task=agreement: agreement of the judge with people, by turn and category, and of people with each other."""
    task = cfg.task
    votes = add_categories(read_votes(task.input, task.format), task.questions)
    humans = task.humans or ("expert_*" if task.format == "mtbench" else "*")
    people, judge = split_judge(votes, judge=task.judge, humans=humans)
    settings = {"level": task.level, "rounds": task.rounds}
    everyone, _ = split_judge(votes, judge=task.judge, humans="*")
    pairs = judge_pairs(people, judge)
    if not len(pairs):
        raise ValueError("people and judge voted on no item in common: (question, turn, models) must be the same")
    result = by_group(pairs, symmetric=False, **settings)
    result["human_human"] = by_group(human_pairs(people), symmetric=True, **settings)
    result["majority"] = majority_agreement(everyone, judge)
    result["human_alpha"] = {kind: alpha(everyone, kind) for kind in ("nominal", "ordinal")}
    name = judge["judge"].iloc[0]
    own = votes["judge"] == name
    result["errors"] = int((votes[own]["verdict"] == "error").sum())  # errors of other judges do not count
    result["human_errors"] = int((votes[votes["human"]]["verdict"] == "error").sum())
    groups = {"all": result, **{f"turn {k}": v for k, v in result["turns"].items()}, **result["categories"]}
    print_table(
        f"{name} against people ({result['errors']} of its verdicts are unreadable)",
        ("", "agreement", "no ties", "kappa", "n"),
        [
            (group, *(interval_cell(estimate(g, key)) for key in ("agreement", "agreement_no_ties", "kappa")), g["n"])
            for group, g in [*groups.items(), ("people among themselves", result["human_human"])]
        ],
    )
    ceiling = result["human_human"]["categories"]
    rows = [(name, g["agreement"], *g["agreement_interval"]) for name, g in groups.items()]
    rows += [(f"{name}, people", g["agreement"], *g["agreement_interval"]) for name, g in ceiling.items()]
    plot_intervals(out / "agreement.png", "agreement with people (ties count)", rows, null=None)
    return result
