"""The biases of a judge. Each function returns one figure with an interval clustered by question."""

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from evals.agreement import agreement_of, human_pairs, judge_pairs
from evals.intervals import mean_estimate, share_estimate, unknown
from evals.taste import added_share, family_gain
from evals.verdicts import PAIR, decisive, fold_orders, points, sort_pairs


def position(votes: pd.DataFrame, *, level: float) -> dict:
    """Share of the judge's decisive votes that go to the answer shown first; 0.5 without bias.

    Only items that were asked in both orders count, because there the quality of the answers cancels out. `flips` has
    the effect of the swap: `changed` is the share of items whose verdict changed, with its interval.
    """
    folded = votes[votes["shown"] == "both"]
    votes = sort_pairs(votes)
    votes = votes[votes["shown"].isin(["a", "b"])].drop_duplicates([*PAIR, "judge", "shown"])
    items = votes.pivot(index=[*PAIR, "judge"], columns="shown", values="verdict")
    items = items.reindex(columns=["a", "b"]).dropna()
    readable = items[(items != "error").all(axis=1)]
    if not len(readable):
        return unknown(
            "no item has readable votes in both orders, one per row, so order and quality are confounded"
        ) | {"inconsistent": float(folded["text"].eq("tie (inconsistent)").mean()) if len(folded) else None}
    both = pd.MultiIndex.from_frame(votes[[*PAIR, "judge"]]).isin(readable.index)
    named = decisive(votes[both])
    estimate = share_estimate(named["verdict"] == named["shown"], named["question"], null=0.5, level=level)
    a, b = readable["a"], readable["b"]  # verdicts with a shown first, and with b shown first
    estimate["flips"] = {
        "to_first": int(((a == "a") & (b == "b")).sum()),
        "to_second": int(((a == "b") & (b == "a")).sum()),
        "consistent": float((a == b).mean()),
        "changed": share_estimate(a != b, a.index.get_level_values("question"), null=0.5, level=level),
        "items": len(readable),
        "items_with_errors": len(items) - len(readable),
    }
    return estimate


def position_by_category(votes: pd.DataFrame, *, level: float) -> dict[str, dict]:
    """{category: `position` of its items}. Their intervals hold simultaneously."""
    groups = dict(list(votes.groupby("category")))
    shared = 1 - (1 - level) / max(len(groups), 1)
    return {str(category): position(part, level=shared) for category, part in groups.items()}


def left_share(people: pd.DataFrame, votes: pd.DataFrame, *, level: float) -> dict:
    """Share of the answer shown first in the judge's decisive votes, minus that in people's votes on the same pairs.

    Only items that were asked in one order count. Without people's votes the comparison is with one half, which is only
    meaningful if the order was random. `compared_with` says which comparison was made.
    """
    votes = sort_pairs(votes)
    votes = votes[votes["shown"].isin(["a", "b"])]
    items = [*PAIR, "judge"]
    alone = decisive(
        votes[votes.groupby(items, dropna=False)["shown"].transform("nunique") == 1].drop_duplicates(items)
    )
    if not len(alone):
        return unknown("no item was asked in one order only")
    first = (alone["verdict"] == alone["shown"]).astype(float)
    figure = {"judge": float(first.mean()), "n_judge": len(alone)}
    decided = decisive(sort_pairs(people))
    won = decided.assign(won=points(decided["verdict"])).groupby(PAIR)["won"].mean()
    by_people = won.reindex(pd.MultiIndex.from_frame(alone[PAIR])).to_numpy()
    by_people = np.where(alone["shown"] == "a", by_people, 1 - by_people)
    known = ~np.isnan(by_people)
    if not known.any():
        gap, questions, against = first - 0.5, alone["question"], "one half"
    else:
        gap, questions, against = (first - by_people)[known], alone["question"][known], "people on the same pairs"
        figure["people"] = float(by_people[known].mean())
    return mean_estimate(gap, questions, null=0.0, level=level, max_deviation=1.0) | figure | {"compared_with": against}


def preference_for_more(
    people: pd.DataFrame, judge: pd.DataFrame, feature: str, *, min_gap: float, level: float
) -> dict:
    """How much more often the judge chooses the answer with more of a feature than people's preferences predict.

    Only items whose answers differ by more than `min_gap` count. The prediction uses the judge's own sharpness
    (`evals.taste`), so a judge that is more decisive than a person is not called biased. Without human votes on
    these pairs the comparison is with one half, which mixes bias and quality. `compared_with` says which one was made.

    Args:
        judge: its votes, in both orders or folded.
    """
    if not len(judge):
        return unknown("the judge gave no readable verdict")
    a, b = f"{feature}_a", f"{feature}_b"
    if a not in judge or not (judge[a].notna() & judge[b].notna()).any():
        return unknown(f"the {feature} of the answers is not in the votes; give task.answers")
    known = judge[judge[a].notna() & judge[b].notna()].drop_duplicates(PAIR)
    gap = (known[a] - known[b]).to_numpy(float)
    sign = pd.Series(np.where(np.abs(gap) > min_gap, np.sign(gap), 0.0), pd.MultiIndex.from_frame(known[PAIR]))
    if len(people) and pd.MultiIndex.from_frame(people[PAIR]).isin(sign[sign != 0].index).any():
        return added_share(people, judge, sign, level=level) | {"compared_with": "people on the same pairs"}
    judged = decisive(fold_orders(judge))
    judged = judged[(judged[a] - judged[b]).abs() > min_gap].drop_duplicates(PAIR)
    picked = (judged["verdict"] == np.where(judged[a] > judged[b], "a", "b")).astype(float)
    estimate = mean_estimate(picked - 0.5, judged["question"], null=0.0, level=level, max_deviation=1.0)
    return estimate | {"judge": float(picked.mean()) if len(picked) else None, "compared_with": "one half"}


def self_preference(people: pd.DataFrame, judge: pd.DataFrame, family: dict[str, bool], *, level: float) -> dict:
    """Rating points that the judge adds to its own family, beyond people's votes and its sharpness.

    The interval includes sampling error, and the variance of what the judge adds to single models (`evals.taste`).
    """
    return family_gain(people, judge, family, level=level)


def agreement(people: pd.DataFrame, judge: pd.DataFrame, *, level: float, rounds: int) -> dict:
    """Share of human votes that the judge agrees with, with kappa and the agreement of people with each other."""
    pairs = judge_pairs(people, judge)
    if not len(pairs):
        return unknown("people and judge voted on no item in common")
    hits = (pairs["x"] == pairs["y"]).to_numpy(float)
    estimate = share_estimate(hits, pairs["question"], null=0.5, level=level)
    figures = agreement_of(pairs, symmetric=False, level=level, rounds=rounds)
    estimate |= {name: figures[name] for name in ("agreement_no_ties", "kappa", "kappa_interval")}
    ceiling = human_pairs(people)
    if len(ceiling):
        estimate["people"] = agreement_of(ceiling, symmetric=True, level=level, rounds=rounds)
    return estimate


def agreement_by_category(people: pd.DataFrame, judge: pd.DataFrame, *, level: float, rounds: int) -> dict:
    """Agreement, rank correlation and human ceiling of each category. Their intervals hold simultaneously."""
    pairs, ceiling = judge_pairs(people, judge), human_pairs(people)
    groups = dict(list(pairs.groupby("category")))
    if not groups:
        return {}
    shared = 1 - (1 - level) / len(groups)
    table = {}
    for category, part in groups.items():
        row = agreement_of(part, symmetric=False, level=shared, rounds=rounds)
        items = part.assign(x=points(part["x"]), y=points(part["y"])).groupby(PAIR)[["x", "y"]].mean()
        varied = items["x"].nunique() > 1 and items["y"].nunique() > 1
        row["spearman"] = float(spearmanr(items["x"], items["y"]).statistic) if varied else None
        own = ceiling[ceiling["category"] == category]
        row["people"] = agreement_of(own, symmetric=True, level=shared, rounds=rounds) if len(own) else None
        table[str(category)] = row
    return table


def low_entropy_gap(people: pd.DataFrame, judge: pd.DataFrame, categories: list[str], *, level: float) -> dict:
    """Agreement on categories with a right answer, minus agreement on all others."""
    pairs = judge_pairs(people, judge)
    pairs = pairs[pairs["category"].notna()]
    factual = pairs["category"].isin(categories).to_numpy()
    if not factual.any() or factual.all():
        return unknown(f"the votes need questions inside and outside of the categories {', '.join(categories)}")
    hits = (pairs["x"] == pairs["y"]).to_numpy(float)
    # The difference of two means is written as one mean, so that its interval can be clustered.
    scale = np.where(factual, 1 / factual.mean(), -1 / (~factual).mean())
    centred = hits - np.where(factual, hits[factual].mean(), hits[~factual].mean())
    gap = hits[factual].mean() - hits[~factual].mean()
    return mean_estimate(gap + scale * centred, pairs["question"], null=0.0, level=level, max_deviation=1.0)


def degenerate(votes: pd.DataFrame, *, level: float) -> dict:
    """The largest share of questions to which a model gives the same answer."""
    sides = [
        votes[["question", "turn", f"model_{s}", f"hash_{s}"]].set_axis(["question", "turn", "model", "hash"], axis=1)
        for s in "ab"
    ]
    answers = pd.concat(sides).dropna().drop_duplicates(["question", "turn", "model"])
    if not len(answers):
        return unknown("the texts of the answers are not in the votes; give task.answers")
    table, worst = {}, None
    for model, own in answers.groupby("model"):
        common = own["hash"].value_counts()
        estimate = share_estimate(own["hash"] == common.index[0], own["question"], null=0.5, level=level)
        count = int(common.iloc[0])
        table[model] = {"share": count / len(own), "answers": len(own), "distinct": len(common)}
        if len(own) > 1 and (worst is None or count > worst[0]):
            worst = count, model, estimate
    if worst is None:
        return unknown("every model has one answer only") | {"models": table}
    count, model, estimate = worst
    return estimate | {"model": model, "same_answers": count, "models": table}


def unreadable(votes: pd.DataFrame, *, level: float) -> dict:
    """Share of the judge's verdicts that cannot be read. They count neither as ties nor as losses."""
    return share_estimate(votes["verdict"] == "error", votes["question"], null=0.5, level=level)
