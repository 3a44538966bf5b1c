"""A judge's bias: its weight on a feature beyond people's preferences and its own sharpness.

People and judge see the same quality gap u of an item (a pair of answers) with features x. The judge may add to it:

    u = b x + tau * z,   z ~ N(0, 1)                   z: the part of the quality that the features do not explain
    logit P(a person names a) = u
    logit P(the judge names a) = k u + gain * c + order * s

b has a rating of each model and people's weight of the feature c. k is the judge's sharpness. s is +1 if a was shown
first and -1 if b was. A judge with people's preferences has gain 0 for any sharpness k, because k multiplies all of u.
Because of tau, the noise of single votes is not mistaken for a difference in preferences. The fit is by maximum
likelihood (z by Gauss-Hermite quadrature) with weak priors. Errors are clustered by question.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logsumexp

from evals.intervals import estimate_of, unknown
from evals.verdicts import PAIR, points

NODES = 15
PRIOR = {"tau": (0.0, 1.0), "k": (0.0, 1.0), "gain": (0.0, 3.0), "order": (0.0, 3.0), "b": (0.0, 10.0)}  # mean, s.d.
FEWEST = 10  # questions; with fewer, a clustered error is too small too often
SIDES = np.array([1.0, -1.0, 0.0])  # a shown first, b shown first, unknown


@dataclass
class Items:
    """N items: features (N, P), the judge's extra feature (N,), votes for a and for b, and the question of each."""

    x: np.ndarray
    c: np.ndarray
    people: np.ndarray  # (N, 2) votes for a, for b
    judge: np.ndarray  # (N, 3, 2) by the side shown first
    questions: np.ndarray  # (N,) numbers
    models: list[str]
    pairs: np.ndarray  # (N, 2) numbers of the models

    @property
    def num_questions(self) -> int:
        return len(np.unique(self.questions))


def collect(people: pd.DataFrame, judge: pd.DataFrame, feature: pd.Series) -> Items:
    """The items that people and judge both voted on.

    Args:
        people, judge: votes without errors, pairs sorted. The judge's are in each order, or folded (two votes in one).
        feature: c by item (index PAIR). It is also one of x.
    """
    counts = {}
    for name, votes in (("people", people), ("judge", judge)):
        won = points(votes["verdict"]).to_numpy()
        double = np.where(votes["shown"].eq("both") & ~votes["human"], 2.0, 1.0)  # a folded vote counts as two
        side = votes["shown"].map({"a": 0, "b": 1}).fillna(2).astype(int) if name == "judge" else 2
        rows = votes[PAIR].assign(side=side, a=won * double, b=(1 - won) * double)
        counts[name] = rows.groupby([*PAIR, "side"])[["a", "b"]].sum()
    shared = counts["people"].droplevel("side").index.intersection(counts["judge"].droplevel("side").index.unique())
    shared = shared.intersection(feature.dropna().index)
    by_side = [
        counts["judge"].xs(s, level="side").reindex(shared, fill_value=0).to_numpy()
        if s in counts["judge"].index.get_level_values("side")
        else np.zeros((len(shared), 2))
        for s in range(3)
    ]
    table = shared.to_frame(index=False)
    models = sorted(set(table["model_a"]) | set(table["model_b"]))
    numbers = {model: i for i, model in enumerate(models)}
    pairs = np.column_stack([table["model_a"].map(numbers), table["model_b"].map(numbers)]).reshape(-1, 2)
    dummies = np.zeros((len(table), len(models)))
    rows = np.arange(len(table))
    np.add.at(dummies, (rows, pairs[:, 0]), 1.0)
    np.add.at(dummies, (rows, pairs[:, 1]), -1.0)
    c = feature.reindex(shared).to_numpy(float)
    return Items(
        x=np.column_stack([dummies[:, 1:], c]) if len(models) > 1 else c[:, None],
        c=c,
        people=counts["people"].droplevel("side").reindex(shared).to_numpy(),
        judge=np.stack(by_side, axis=1),
        questions=pd.factorize(table["question"])[0],
        models=models,
        pairs=pairs,
    )


class Fit:
    """The maximum of the likelihood and what follows from it. Parameters: b (P), log tau, log k, gain, order."""

    def __init__(self, items: Items):
        self.items, width = items, items.x.shape[1]
        asked = items.judge.any((0, 2))
        self.judge, self.sides = items.judge[:, asked], SIDES[asked]  # only the orders in which the judge was asked
        nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
        self.nodes, self.log_weights = nodes, np.log(weights / weights.sum())
        names = ["b"] * width + ["tau", "k", "gain", "order"]
        self.mean, self.prior_std = np.array([PRIOR[name] for name in names]).T
        start = np.zeros(width + 4)
        found = minimize(self._loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 300})
        self.values = found.x
        self.cov = self._sandwich()

    def terms(self, values: np.ndarray, sides: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """u (N, Q) and the judge's logit (N, S, Q) at every node, for S sides shown first."""
        *b, log_tau, log_k, gain, order = values
        u = (self.items.x @ np.array(b))[:, None] + math.exp(log_tau) * self.nodes
        v = math.exp(log_k) * u[:, None, :] + gain * self.items.c[:, None, None] + order * sides[:, None]
        return u, v

    def scores(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) log-likelihood of each item and its (N, P + 4) gradient."""
        items, (u, v) = self.items, self.terms(values, self.sides)
        wins, votes = items.people[:, :1], items.people.sum(1, keepdims=True)
        own_wins, own_votes = self.judge[..., :1], self.judge.sum(-1, keepdims=True)
        log_p, log_q = log_expit(u), log_expit(v)  # log(1 - p) is log p - u
        judged = own_votes * log_q - (own_votes - own_wins) * v  # (N, S, Q)
        joint = votes * log_p - (votes - wins) * u + judged.sum(1) + self.log_weights
        total = logsumexp(joint, axis=1)
        posterior = np.exp(joint - total[:, None])  # (N, Q)
        du = wins - votes * np.exp(log_p)
        dv = own_wins - own_votes * np.exp(log_q)  # (N, S, Q)
        k, both = math.exp(values[-3]), dv.sum(1)
        along = posterior * (du + k * both)  # d joint / d u
        gradient = np.column_stack(
            [
                along.sum(1)[:, None] * items.x,
                math.exp(values[-4]) * along @ self.nodes,
                k * (posterior * both * u).sum(1),
                (posterior * both).sum(1) * items.c,
                (posterior * (dv * self.sides[:, None]).sum(1)).sum(1),
            ]
        )
        return total, gradient

    def _loss(self, values: np.ndarray) -> tuple[float, np.ndarray]:
        total, gradient = self.scores(values)
        away = (values - self.mean) / self.prior_std
        return -total.sum() + 0.5 * away @ away, -gradient.sum(0) + away / self.prior_std

    def _sandwich(self) -> np.ndarray:
        """Covariance of the parameters, clustered by question (Liang & Zeger 1986)."""
        size, step = len(self.values), 1e-4
        bread = np.column_stack(
            [
                (self._loss(self.values + step * unit)[1] - self._loss(self.values - step * unit)[1]) / (2 * step)
                for unit in np.eye(size)
            ]
        )
        inverse = np.linalg.pinv((bread + bread.T) / 2)
        _, gradient = self.scores(self.values)
        sums = np.zeros((self.items.questions.max() + 1, size))
        np.add.at(sums, self.items.questions, gradient)
        groups = len(sums)
        return inverse @ (groups / (groups - 1) * sums.T @ sums) @ inverse

    @property
    def sharpness(self) -> float:
        """k, which is 1 for a judge that is as sharp as a person."""
        return math.exp(self.values[-3])

    def added_share(self, values: np.ndarray) -> float:
        """How much more often the judge names the side of c than with people's preferences, at the same k."""
        pointed = self.items.c != 0
        values = np.array(values)
        without = values.copy()
        without[-2] = 0.0
        weights = np.exp(self.log_weights)
        with_gain, plain = (expit(self.terms(v, SIDES[2:])[1][pointed, 0]) @ weights for v in (values, without))
        return float(np.mean(np.sign(self.items.c[pointed]) * (with_gain - plain)))

    def share_error(self) -> float:
        """Standard error of `added_share`, by the delta method."""
        step = 1e-4
        slope = np.array(
            [
                (self.added_share(self.values + step * unit) - self.added_share(self.values - step * unit)) / (2 * step)
                for unit in np.eye(len(self.values))
            ]
        )
        return math.sqrt(max(slope @ self.cov @ slope, 0.0))

    def gain_points(self) -> tuple[float, float]:
        """(gain / k, its standard error), in logits on people's scale."""
        k, gain = self.sharpness, self.values[-2]
        slope = np.zeros(len(self.values))
        slope[-2], slope[-3] = 1 / k, -gain / k
        return gain / k, math.sqrt(slope @ self.cov @ slope)

    def model_spread(self, family: np.ndarray) -> tuple[float, int]:
        """(variance, over models outside of the family, of what the judge adds to each; the number of these models).

        A judge may like single models better than people do, so the family's gain must exceed this variance. It uses
        one Newton step from the fit for each model, and subtracts the part that sampling explains.
        """
        items, (u, v) = self.items, self.terms(self.values, self.sides)
        joint = self.scores(self.values)[0]
        judged = self.judge[..., :1] * log_expit(v) + self.judge[..., 1:] * log_expit(-v)
        people = items.people[:, :1] * log_expit(u) + items.people[:, 1:] * log_expit(-u)
        posterior = np.exp(people + judged.sum(1) + self.log_weights - joint[:, None])
        p, n = expit(v), self.judge.sum(-1, keepdims=True)
        residual = (posterior[:, None] * (self.judge[..., :1] - n * p)).sum((1, 2))
        curvature = (posterior[:, None] * n * p * (1 - p)).sum((1, 2))
        added, noise = [], []
        for model in np.flatnonzero(~family):
            sign = (items.pairs[:, 0] == model).astype(float) - (items.pairs[:, 1] == model)
            information = (curvature * sign**2).sum()
            if information > 0:
                sums = np.bincount(items.questions, residual * sign)
                added.append((residual * sign).sum() / information)
                noise.append((sums**2).sum() / information**2)
        if len(added) < 2:
            return 0.0, len(added)
        extra = (np.sum(np.square(added)) - np.sum(noise)) / (len(added) - 1)
        return max(extra, 0.0) / self.sharpness**2, len(added)


def added_share(people: pd.DataFrame, judge: pd.DataFrame, feature: pd.Series, *, level: float) -> dict:
    """The bias for a feature in share points, with interval and p value. 0 is a judge with people's preferences."""
    items = collect(people, judge, feature)
    pointed = items.c != 0
    groups = len(np.unique(items.questions[pointed]))
    if groups < FEWEST:
        return unknown(
            f"{groups} questions with votes of both people and judge; {FEWEST} are needed", n=int(pointed.sum())
        )
    fit = Fit(items)
    n = int(items.judge[pointed].sum())
    estimate = estimate_of(
        fit.added_share(fit.values), fit.share_error(), n, groups, null=0.0, level=level, degrees=groups - 1
    )
    sign, own = np.sign(items.c[pointed]), items.judge[pointed].sum(1)
    larger = np.where(sign > 0, own[:, 0], own[:, 1]).sum() / own.sum()
    votes = items.people[pointed]
    by_people = np.where(sign > 0, votes[:, 0], votes[:, 1]) / votes.sum(1)
    return estimate | {
        "judge": float(larger),
        "people": float(np.average(by_people, weights=own.sum(1))),
        "people_at_its_sharpness": float(larger - estimate["value"]) if estimate["value"] is not None else None,
        "sharpness": fit.sharpness,
    }


def family_gain(people: pd.DataFrame, judge: pd.DataFrame, family: dict[str, bool], *, level: float) -> dict:
    """Rating points (400 / ln 10 per logit) that a judge adds to its own family beyond people's votes, at its k."""
    known = pd.concat([people[PAIR], judge[PAIR]]).drop_duplicates()
    difference = known["model_a"].map(family).astype(float) - known["model_b"].map(family).astype(float)
    items = collect(people, judge, pd.Series(difference.to_numpy(), pd.MultiIndex.from_frame(known)))
    own = np.array([family[model] for model in items.models], bool)
    if not own.any() or (~own).sum() < 2:
        named = [model for model, member in zip(items.models, own, strict=True) if member]
        return unknown(
            f"it needs a model of the judge's family and two others with human votes; family: {named or 'none'}"
        )
    groups = items.num_questions
    if groups < FEWEST:
        return unknown(f"{groups} questions with votes of both people and judge; {FEWEST} are needed", n=len(items.c))
    items.x = items.x[:, :-1]  # the ratings of the models already contain the family's
    fit = Fit(items)
    value, error = fit.gain_points()
    model_variance, others = fit.model_spread(own)
    between = model_variance * (1 / own.sum() + 1 / others)
    variance = error**2 + between
    degrees = variance**2 / (error**4 / (groups - 1) + between**2 / max(others - 1, 1))
    scale = 400 / math.log(10)
    estimate = estimate_of(
        scale * value,
        scale * math.sqrt(variance),
        int(items.judge.sum()),
        groups,
        null=0.0,
        level=level,
        degrees=max(degrees, 1.0),
    )
    return estimate | {
        "family": [model for model, member in zip(items.models, own, strict=True) if member],
        "sharpness": fit.sharpness,
        "sampling_error": scale * error,
        "model_spread": scale * math.sqrt(model_variance),
    }
