"""Agreement of annotators: Krippendorff's alpha, Fleiss' and Cohen's kappa from libraries, with intervals.

Intervals are percentiles over resampled items, because the votes on one item are dependent. The gate uses the lower end
of alpha's interval. Each annotator is tested for two faults: votes at chance level, and random sides on items where the
others vote for a tie.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path

import krippendorff
import numpy as np
from scipy.stats import binomtest
from statsmodels.stats.inter_rater import cohens_kappa, fleiss_kappa
from statsmodels.stats.proportion import proportion_confint

from data.checks.agreement_page import show_agreement
from data.checks.votes import VoteLayout, Votes, once, parse_vote
from data.records import BadRows, read_records
from runtime.config import check_choice, check_number, check_whole

LEVELS = ("nominal", "ordinal", "interval")
SHOWN = 20  # disputed items on the page


def check_agreement(
    files: Sequence[str], directory: Path, *, level: str, unacceptable: Sequence[str], max_unacceptable: float,
    threshold: float, tie_labels: Sequence[str], resamples: int,
    max_pairs: int, min_shared: int, seed: int, on_bad_row: str,
) -> dict:  # fmt: skip
    """result.json, agreement.png and report.html; `passed` is whether alpha's lower end reaches the threshold.

    Args:
        level: nominal (labels differ or not), ordinal (numbers in an order) or interval (their distances count).
        unacceptable: labels that mean that neither answer is good enough. If their share is above `max_unacceptable`,
            the answers are too weak to be compared.
        tie_labels: labels that mean that neither side is better.
        max_pairs: number of pairs of annotators for Cohen's kappa: those with the most common
            items, `min_shared` or more.
    """
    check_whole(1, check__resamples=resamples, check__min_shared=min_shared)
    check_whole(0, check__max_pairs=max_pairs)
    check_choice("check.level", level, LEVELS)
    check_number(0, check__max_unacceptable=max_unacceptable)
    bad_rows = BadRows(on_bad_row)
    found = [vote for file in files for vote in read_records(file, parse_vote, bad_rows, VoteLayout())]
    votes = Votes(once(found, bad_rows), level)
    result = measure(
        votes, tie_labels=tie_labels, resamples=resamples, max_pairs=max_pairs, min_shared=min_shared, seed=seed
    )
    result["unacceptable"] = _unacceptable(votes, unacceptable, max_unacceptable)
    passed = bool(result["krippendorff_alpha"]["lower"] >= threshold)
    result |= {"threshold": threshold, "passed": passed, "skipped_rows": bad_rows.skipped}
    show_agreement(directory, result)
    return result


def measure(
    votes: Votes, *, tie_labels: Sequence[str], resamples: int, max_pairs: int, min_shared: int, seed: int
) -> dict:
    """Every figure of the check. Raises ValueError where agreement is undefined."""
    counts = votes.counts()
    shared = counts[counts.sum(1) >= 2]
    if not len(shared):
        raise ValueError(f"no item has two votes ({len(votes.items)} items, {len(votes.annotators)} annotators)")
    if (shared.sum(0) > 0).sum() < 2:
        only = votes.names[int(shared.sum(0).argmax())]
        raise ValueError(
            f"every vote on an item with two or more votes is {only!r}: agreement on one label is undefined"
        )
    random = np.random.default_rng(seed)
    # 100,000 votes take seconds; small files get all resamples
    resamples = int(np.clip(5e6 / len(shared), 200, resamples))

    alpha = partial(alpha_of, level=votes.level, values=votes.values)
    ties = np.isin(votes.names, [str(label) for label in tie_labels])
    result = {
        "items": len(votes.items),
        "votes": len(votes.rows),
        "annotators": len(votes.annotators),
        "labels": dict(zip(votes.names, counts.sum(0).tolist(), strict=True)),
        "resamples": resamples,
        "level": votes.level,
        "krippendorff_alpha": interval(alpha, shared, resamples, random),
        "krippendorff_alpha_without_ties": _without_ties(votes, ties, resamples, random),
        "fleiss_kappa": fleiss(counts, resamples, random),
    }
    result["cohen_kappa"], result["pairs_left_out"] = _pairs(votes, max_pairs, min_shared, resamples, random)
    result["categories"] = _by_category(votes, counts, resamples, random)
    result["per_annotator"] = _by_annotator(votes, counts, ties, resamples, random)
    result["most_disputed"] = _most_disputed(votes, counts)
    return result


def alpha_of(counts: np.ndarray, level: str = "nominal", values: Sequence[float] | None = None) -> float:
    """Krippendorff's alpha of (items, labels) counts. NaN if it is undefined. `values`: the labels as numbers."""
    counts = counts[counts.sum(1) >= 2]
    if (counts.sum(0) > 0).sum() < 2:
        return float("nan")
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement=level, value_domain=values))


def _unacceptable(votes: Votes, labels: Sequence[str], most: float) -> dict:
    """The share of votes that accept neither answer, with its Wilson interval and a verdict on the answers."""
    bad = np.isin(votes.names, [str(label) for label in labels])[votes.rows[:, 2]]
    lower, upper = proportion_confint(int(bad.sum()), len(bad), method="wilson")
    verdict = "answers too weak to compare" if lower > most else "unclear" if upper > most else "ok"
    found = {"value": float(bad.mean()), "lower": float(lower), "upper": float(upper), "n": len(bad)}
    return found | {"labels": [str(label) for label in labels], "most": most, "verdict": verdict}


def kappa_of(table: np.ndarray) -> float:
    """Cohen's kappa of a (labels, labels) table. NaN if both use only the same label."""
    if (table.sum(0) + table.sum(1) > 0).sum() < 2:
        return float("nan")
    return float(cohens_kappa(table, return_results=False))


def fleiss(counts: np.ndarray, resamples: int, random: np.random.Generator) -> dict:
    """Fleiss' kappa. It needs equally many votes per item, so it uses items with the most common number >= 2."""
    sizes = Counter(counts.sum(1)[counts.sum(1) >= 2].tolist())
    votes_each = max(sizes, key=lambda size: (sizes[size], size))
    of_size = counts[counts.sum(1) == votes_each]
    return interval(_fleiss_of, of_size, resamples, random) | {"votes_per_item": int(votes_each)}


def _fleiss_of(counts: np.ndarray) -> float:
    """Fleiss' kappa of (items, labels) counts. NaN if all votes have the same label."""
    return float(fleiss_kappa(counts)) if (counts.sum(0) > 0).sum() > 1 else float("nan")


def interval(statistic: Callable, rows: np.ndarray, resamples: int, random: np.random.Generator) -> dict:
    """The statistic and its 95 % percentile interval over resampled rows."""
    drawn = (statistic(rows[random.integers(0, len(rows), len(rows))]) for _ in range(resamples))
    return _estimate(statistic(rows), drawn, len(rows))


def _estimate(value: float, drawn, n: int) -> dict:
    found = np.array([one for one in drawn if np.isfinite(one)])
    lower, upper = np.percentile(found, [2.5, 97.5]) if len(found) and np.isfinite(value) else (np.nan, np.nan)
    return {"value": value, "lower": float(lower), "upper": float(upper), "n": int(n)}


def _table_kappa(x: np.ndarray, y: np.ndarray, labels: int, resamples: int, random: np.random.Generator) -> dict:
    """Cohen's kappa of two columns of codes. Resampling items is equivalent to resampling the table's cells."""
    table = np.bincount(x * labels + y, minlength=labels * labels)
    drawn = (random.multinomial(len(x), table / len(x)).reshape(labels, labels) for _ in range(resamples))
    return _estimate(kappa_of(table.reshape(labels, labels)), map(kappa_of, drawn), len(x))


def _pairs(votes: Votes, max_pairs: int, min_shared: int, resamples: int, random) -> tuple[dict, int]:
    by_item = defaultdict(list)
    for item, annotator, label in votes.rows.tolist():
        by_item[item].append((annotator, label))
    common = defaultdict(list)
    for labels_of in by_item.values():
        for (a, x), (b, y) in combinations(sorted(labels_of), 2):
            common[a, b].append((x, y))
    ranked = sorted(common, key=lambda pair: (-len(common[pair]), pair))
    chosen = [pair for pair in ranked if len(common[pair]) >= min_shared][:max_pairs]
    kappas = {}
    for a, b in chosen:
        x, y = np.array(common[a, b]).T
        name = f"{votes.annotators[a]}|{votes.annotators[b]}"
        kappas[name] = _table_kappa(x, y, len(votes.names), resamples, random)
    return kappas, len(common) - len(chosen)


def _without_ties(votes: Votes, ties: np.ndarray, resamples: int, random) -> dict | None:
    """Alpha of the votes without ties: the agreement among votes that state a difference."""
    if not ties.any():
        return None
    counts = votes.counts(~ties[votes.rows[:, 2]])
    counts = counts[counts.sum(1) >= 2]
    alpha = partial(alpha_of, level=votes.level, values=votes.values)
    return interval(alpha, counts, resamples, random) if len(counts) else None


def _by_category(votes: Votes, counts: np.ndarray, resamples: int, random) -> dict:
    names = np.array([votes.categories.get(item, "") for item in votes.items])
    found = {}
    for name in sorted(set(names.tolist()) - {""}):
        rows = counts[(names == name) & (counts.sum(1) >= 2)]
        if len(rows):
            found[name] = interval(partial(alpha_of, level=votes.level, values=votes.values), rows, resamples, random)
    return found


def _by_annotator(votes: Votes, counts: np.ndarray, ties: np.ndarray, resamples: int, random) -> dict:
    """Agreement of each annotator with the majority of the others, and their votes where the others see a tie."""
    others = counts[votes.rows[:, 0]]  # (N, labels) votes on the row's item
    others[np.arange(len(others)), votes.rows[:, 2]] -= 1  # without the row's own vote
    ranked = np.sort(others, axis=1)
    decided = ranked[:, -1] > (ranked[:, -2] if ranked.shape[1] > 1 else 0)  # there is one majority label
    majority = others.argmax(1)
    side = ~ties[votes.rows[:, 2]]
    tied = decided & ties[majority]
    found = {}
    for a, name in enumerate(votes.annotators):
        own = votes.rows[:, 1] == a
        rows = own & decided
        facts: dict = {"votes": int(own.sum()), "ties": float((~side[own]).mean()), "kappa_with_others": None}
        if rows.any():
            facts["kappa_with_others"] = _table_kappa(
                votes.rows[rows, 2], majority[rows], len(votes.names), min(resamples, 500), random
            )
        facts["tie_breaking"] = _tie_breaking(votes, own & tied, ~own & tied, side, len(votes.annotators))
        facts["verdict"] = _verdict(facts)
        found[name] = facts
    return found


def _most_disputed(votes: Votes, counts: np.ndarray) -> list[dict]:
    """The items with the largest mean distance between two votes, of equal ones those with more votes.

    The distance of two labels is 0 or 1 (nominal), the difference of their places (ordinal) or of their numbers.
    """
    places = np.arange(len(votes.names)) if votes.level == "ordinal" else np.array(votes.values or [])
    gaps = 1.0 - np.eye(len(votes.names)) if votes.level == "nominal" else np.abs(places[:, None] - places)
    n = counts.sum(1)
    mean = ((counts @ gaps) * counts).sum(1) / np.maximum(n * (n - 1), 1)  # over ordered pairs of votes
    order = np.lexsort((-n, -mean))[:SHOWN]
    found = []
    for item in order[mean[order] > 0].tolist():
        item_votes = [(votes.annotators[a], votes.names[label]) for i, a, label in votes.rows[votes.rows[:, 0] == item]]
        name = votes.items[item]
        found.append(
            {
                "item": name,
                "category": votes.categories.get(name),
                "prompt": votes.prompts.get(name),
                "where": votes.where[name],
                "disagreement": float(mean[item]),
                "votes": dict(item_votes),
            }
        )
    return found


def _tie_breaking(votes: Votes, own: np.ndarray, theirs: np.ndarray, side: np.ndarray, annotators: int) -> dict | None:
    """Whether an annotator chooses a side more often than the others, on items whose majority is a tie."""
    n = int(own.sum())
    if n < 10 or not theirs.any():
        return None
    # an annotator with ties in half of these items does not break ties
    usual = min(max(float(side[theirs].mean()), 0.5), 0.99)
    taken = votes.rows[own & side, 2]
    p = binomtest(len(taken), n, usual, alternative="greater").pvalue
    facts = {"items": n, "side_share": len(taken) / n, "side_share_of_others": float(side[theirs].mean()), "p_value": p}
    facts["breaks_ties"] = bool(p * annotators < 0.01)  # Bonferroni, because every annotator is tested
    if facts["breaks_ties"]:
        first = int((taken == taken.min()).sum())
        facts["p_value_coin"] = binomtest(first, len(taken)).pvalue  # against 50:50
    return facts


def _verdict(facts: dict) -> str:
    kappa, breaking = facts["kappa_with_others"], facts["tie_breaking"]
    if kappa is None or kappa["lower"] is None or not np.isfinite(kappa["lower"]):
        return "too few shared items"
    if kappa["lower"] <= 0:
        return "votes at chance" if kappa["upper"] < 0.4 else "too few shared items"
    if breaking and breaking["breaks_ties"]:
        return "breaks ties at random" if breaking["p_value_coin"] > 0.05 else "breaks ties to one side"
    return "ok"
