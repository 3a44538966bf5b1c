"""Ratings of models from their battles: online Elo and Bradley-Terry, with intervals and ranks."""

from pathlib import Path

import numpy as np
import pandas as pd
from evalica import Winner, bradley_terry, elo
from omegaconf import DictConfig, OmegaConf
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.stats import norm, t

from evals.readers import read_votes
from evals.style import add_style, rate_style
from evals.verdicts import scored
from runtime.plots import plot_intervals
from runtime.report import print_table

BASE, SCALE, MEAN = 10.0, 400.0, 1000.0
MOST_LEFT_OUT = 500  # with up to this many questions, `clustered` errors leave out each question in turn
WINNER = np.array([Winner.Y, Winner.Draw, Winner.X])  # b won, tie, a won


def battles_of(votes: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    """(n, 3) int battles [model a, model b, outcome 0 | 1 | 2 = b | tie | a] of `scored` votes, and the models' names.

    Models are numbered in the order of their first occurrence on side a, then on side b.
    """
    numbers, models = pd.factorize(pd.concat([votes["model_a"], votes["model_b"]]))
    outcomes = votes["verdict"].map({"b": 0, "tie": 1, "a": 2}).to_numpy(int)
    battles = np.column_stack([numbers[: len(votes)], numbers[len(votes) :], outcomes])
    itself = battles[:, 0] == battles[:, 1]
    if itself.any():
        raise ValueError(
            f"{models[battles[itself, 0][0]]!r} is on both sides of a battle; give the two checkpoints different names"
        )
    if len(models) < 2:
        raise ValueError(f"ratings need battles between two models or more, found {list(models)}")
    return battles, list(models)


def online_elo(battles: np.ndarray, num_models: int, *, k: float) -> np.ndarray:
    """(M,) Elo ratings after the battles in file order: start 1000, base 10, scale 400; a tie is half a point."""
    winners = WINNER[battles[:, 2]].tolist()
    index = pd.Index(range(num_models))
    ratings = elo(battles[:, 0], battles[:, 1], winners, index=index, initial=MEAN, base=BASE, scale=SCALE, k=k)
    return ratings.scores[index].to_numpy()


def fit_bradley_terry(unique: np.ndarray, counts: np.ndarray, num_models: int) -> np.ndarray:
    """(M,) Bradley-Terry ratings with mean 1000. A tie is half a win for each (Bradley & Terry 1952).

        log odds that a beats b = ln 10 * (rating_a - rating_b) / 400

    `unique` are the distinct rows of `battles_of`, `counts` the number of times each occurred (0 allowed).
    """
    seen = counts > 0
    rows, index = unique[seen], pd.Index(range(num_models))
    winners = WINNER[rows[:, 2]].tolist()
    fit = bradley_terry(
        rows[:, 0], rows[:, 1], winners, index=index, weights=counts[seen].astype(float), tolerance=1e-12, limit=100_000
    )
    ratings = SCALE * np.log10(fit.scores[index].to_numpy())
    return ratings - ratings.mean() + MEAN


def unbeaten_groups(unique: np.ndarray, counts: np.ndarray, num_models: int) -> np.ndarray | None:
    """(M,) group numbers if some group of models never lost or tied against another. None if ratings are finite."""
    seen = counts > 0
    a, b, outcome = unique[seen].T
    winners = np.concatenate([a[outcome >= 1], b[outcome <= 1]])
    losers = np.concatenate([b[outcome >= 1], a[outcome <= 1]])
    wins = coo_matrix((np.ones(len(winners)), (winners, losers)), shape=(num_models, num_models))
    number, groups = connected_components(wins, directed=True, connection="strong")
    return groups if number > 1 else None


def bootstrap_bradley_terry(unique, counts, num_models: int, *, rounds: int) -> np.ndarray:
    """(R, M) ratings of multinomial resamples of the unique outcomes. Rounds without finite ratings are left out."""
    draws = np.random.default_rng(0).multinomial(int(counts.sum()), counts / counts.sum(), size=rounds)  # (rounds, U)
    finite = [draw for draw in draws if unbeaten_groups(unique, draw, num_models) is None]
    return np.array([fit_bradley_terry(unique, draw, num_models) for draw in finite]).reshape(-1, num_models)


def sandwich_bradley_terry(
    battles: np.ndarray, weights: np.ndarray, ratings: np.ndarray, clusters: np.ndarray
) -> np.ndarray:
    """(M,) robust standard errors of Bradley-Terry ratings, clustered (White 1980; Liang & Zeger 1986).

    cov = H^+ (sum over clusters of s s^T) H^+,   s the cluster's score, H the information; mean rating fixed
    """
    bread, scores, _, slope = _sandwich_parts(battles, weights, ratings, clusters)
    cov = bread @ (scores.T @ scores).toarray() @ bread
    return np.sqrt(np.diag(cov)) / slope


def jackknife_bradley_terry(
    battles: np.ndarray, weights: np.ndarray, ratings: np.ndarray, clusters: np.ndarray
) -> np.ndarray:
    """(M,) standard errors from leaving out each question (one Newton step each): Bell & McCaffrey's CR3.

    cov = (G - 1) / G * sum over the G clusters of d d^T,   d = (H - H_g)^+ s_g

    With few questions a sandwich error is too small, because the fit follows each question. This one is not.
    """
    bread, scores, curvatures, slope = _sandwich_parts(battles, weights, ratings, clusters)
    groups, num_models = scores.shape
    information = np.linalg.pinv(bread)
    steps = np.zeros((groups, num_models))
    for g in range(groups):
        steps[g] = np.linalg.pinv(information - curvatures(g)) @ scores[[g]].toarray()[0]
    return np.sqrt((groups - 1) / groups * (steps**2).sum(0)) / slope


def _sandwich_parts(battles, weights, ratings, clusters):
    """H^+, the (G, M) scores of the clusters, a function for the information of one cluster, and log odds per point."""
    a, b, outcome = battles.T
    num_models, slope = len(ratings), np.log(BASE) / SCALE
    p = 1 / (1 + np.exp(-slope * (ratings[a] - ratings[b])))  # (n,)
    residual = weights * (outcome / 2 - p)
    groups, inverse = np.unique(clusters, return_inverse=True)
    shape = (len(groups), num_models)
    scores = coo_matrix((np.r_[residual, -residual], (np.r_[inverse, inverse], np.r_[a, b])), shape=shape).tocsr()
    curvature = weights * p * (1 - p)

    def laplacian(rows) -> np.ndarray:
        index = np.r_[a[rows], b[rows]], np.r_[b[rows], a[rows]]
        off = coo_matrix((np.tile(curvature[rows], 2), index), shape=(num_models,) * 2).toarray()
        return np.diag(off.sum(1)) - off

    order = np.argsort(inverse, kind="stable")
    starts = np.r_[np.searchsorted(inverse[order], np.arange(len(groups))), len(order)]
    bread = np.linalg.pinv(laplacian(slice(None)))  # the Laplacian's null space is the free mean
    return bread, scores, lambda g: laplacian(order[starts[g] : starts[g + 1]]), slope


def ranks(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """(M,) 1 + the number of models whose whole interval is above that of the model."""
    return 1 + (lower[None, :] > upper[:, None]).sum(1)


def check_finite(unique: np.ndarray, counts: np.ndarray, models: list[str]) -> None:
    """Bradley-Terry ratings exist only if every model can be reached from every other by wins and ties (Ford 1957)."""
    groups = unbeaten_groups(unique, counts, len(models))
    if groups is not None:
        group = min(np.unique(groups), key=lambda g: (groups == g).sum())
        named = [model for model, g in zip(models, groups, strict=True) if g == group]
        raise ValueError(
            f"Bradley-Terry ratings are not finite: {', '.join(named)} only ever won or only ever lost against the "
            "others, or never met them; use task.method=elo, or add battles that connect them"
        )


def rate(
    votes: pd.DataFrame, *, method: str, interval: str, level: float, rounds: int, k: float, anchor: dict | None
) -> dict:
    """Ratings, intervals and ranks of every model.

    Args:
        votes: the table of `evals.readers`.
        method: elo (online, file order) or bradley_terry.
        interval: bootstrap (over battles), sandwich (Bradley-Terry only) or clustered (a sandwich by question).
        level: probability that the interval covers.
        anchor: {model: its rating}, instead of a mean of 1000.
    Raises:
        ValueError: unknown names, fewer than two models, or ratings that are not finite.
    """
    if method not in ("elo", "bradley_terry") or interval not in ("bootstrap", "sandwich", "clustered"):
        known = "task.method=elo | bradley_terry and task.interval=bootstrap | sandwich | clustered"
        raise ValueError(f"need {known}, got {method=}, {interval=}")
    if method == "elo":
        interval = "bootstrap"  # the only interval of online Elo
    votes = scored(votes)
    battles, models = battles_of(votes)
    fit = _rate_elo if method == "elo" else _rate_bradley_terry
    ratings, lower, upper, extra = fit(votes, battles, models, interval, (1 - level) / 2, rounds, k)
    shift = _anchor_shift(anchor, models, ratings)
    rated = {
        models[i]: {
            "rating": float(ratings[i] + shift),
            "lower": float(lower[i] + shift),
            "upper": float(upper[i] + shift),
            "rank": int(ranks(lower, upper)[i]),
            "n": int((battles[:, :2] == i).sum()),
        }
        for i in np.argsort(-ratings, kind="stable")
    }
    ties = int((battles[:, 2] == 1).sum())
    return {"method": method, "interval": interval, "n": len(battles), "n_ties": ties, **extra, "ratings": rated}


def _rate_elo(votes, battles, models, interval, tail, rounds, k):
    rng = np.random.default_rng(0)
    draws = [online_elo(battles[rng.integers(0, len(battles), len(battles))], len(models), k=k) for _ in range(rounds)]
    lower, upper = np.quantile(draws, [tail, 1 - tail], axis=0)
    return online_elo(battles, len(models), k=k), lower, upper, {}


def _rate_bradley_terry(votes, battles, models, interval, tail, rounds, k):
    weights = votes["weight"].to_numpy()
    codes, inverse = np.unique(battles @ [3 * len(models), 3, 1], return_inverse=True)
    unique = np.column_stack([codes // 3 // len(models), codes // 3 % len(models), codes % 3])
    counts = np.bincount(inverse, weights)
    check_finite(unique, counts, models)
    ratings = fit_bradley_terry(unique, counts, len(models))
    if interval != "bootstrap":
        questions = votes["question"].to_numpy()
        groups = len(np.unique(questions))
        few = interval == "clustered" and 1 < groups <= MOST_LEFT_OUT
        clusters = questions if interval == "clustered" else np.arange(len(votes))
        errors = (jackknife_bradley_terry if few else sandwich_bradley_terry)(battles, weights, ratings, clusters)
        half = (t.ppf(1 - tail, groups - 1) if few else norm.ppf(1 - tail)) * errors
        return ratings, ratings - half, ratings + half, {"questions": groups}
    draws = bootstrap_bradley_terry(unique, counts, len(models), rounds=rounds)
    if not len(draws):
        raise ValueError(f"none of {rounds} resamples has finite ratings: too few battles; use task.interval=sandwich")
    lower, upper = np.quantile(draws, [tail, 1 - tail], axis=0)
    return ratings, lower, upper, {"unbounded_rounds": rounds - len(draws)}


def _anchor_shift(anchor: dict | None, models: list[str], ratings: np.ndarray) -> float:
    if not anchor:
        return 0.0
    (model, rating), *rest = anchor.items()
    if rest or model not in models:
        raise ValueError(f"task.anchor={dict(anchor)} must name one model of {', '.join(models)} and its rating")
    return rating - float(ratings[models.index(model)])


def one_source(votes: pd.DataFrame, judge: str | None) -> pd.DataFrame:
    """The votes of people, of one judge, or of all of them (judge=all).

    Args:
        judge: a judge's name, `people`, `all`, or None if there is only one source.
    Raises:
        ValueError: the votes are of several sources, and `judge` does not choose.
    """
    judges = sorted(votes.loc[~votes["human"], "judge"].unique())
    people = bool(votes["human"].any())
    if judge == "all" or (judge is None and len(judges) + people <= 1):
        return votes
    if judge is None:
        sources = ", ".join([*judges[:5], *(["people"] if people else [])])
        raise ValueError(f"the files have votes of {sources}; choose with task.judge=NAME | people | all")
    chosen = votes[votes["human"] if judge == "people" else ~votes["human"] & (votes["judge"] == judge)]
    if not len(chosen):
        raise ValueError(f"no vote of task.judge={judge}; the files have {', '.join(judges) or 'people only'}")
    return chosen


def run(cfg: DictConfig, out: Path) -> dict:
    """task=ratings: a rating, an interval and a rank for every model."""
    task = cfg.task
    votes = one_source(read_votes(task.input, task.format), task.judge)
    anchor = OmegaConf.to_container(task.anchor) if task.anchor else None
    settings = {name: task[name] for name in ("method", "interval", "level", "rounds", "k")}
    result = rate(votes, **settings, anchor=anchor)
    if task.style_control:
        result |= rate_style(add_style(votes, task.input, task.answers), level=task.level, rounds=task.rounds)
    if task.method == "bradley_terry":
        decided = votes[votes["verdict"].isin(["a", "b"])]
        try:
            result["without_ties"] = rate(decided, **settings, anchor=anchor)["ratings"]
        except ValueError as error:
            result["without_ties"] = {"reason": str(error)}
    result["errors"] = int((votes["verdict"] == "error").sum())
    rows = [(name, row["rating"], row["lower"], row["upper"]) for name, row in result["ratings"].items()]
    print_table(
        f"{task.method} of {result['n']} battles ({result['n_ties']} ties, {result['errors']} unreadable)",
        ("model", "rating", "lower", "upper", "rank", "battles"),
        [(*row, result["ratings"][row[0]]["rank"], result["ratings"][row[0]]["n"]) for row in rows],
    )
    if "reason" not in result.get("without_ties", {"reason": ""}) and result["n_ties"]:
        keys = ("rating", "lower", "upper", "rank", "n")
        table = [(name, *(row[key] for key in keys)) for name, row in result["without_ties"].items()]
        print_table("without ties", ("model", "rating", "lower", "upper", "rank", "battles"), table)
    for name, row in result.get("style", {}).items():
        print(f"style: {name} {row['weight']:+.3f} ({row['lower']:+.3f} to {row['upper']:+.3f}) log odds per s.d.")
    plot_intervals(out / "ratings.png", f"{task.method} rating", rows[:60], null=None)
    return result
