"""The choice of the next pair of models: the one with the most uncertain win rate."""

import math
import random
from itertools import combinations

from statsmodels.stats.proportion import proportion_confint

from arena.store import Store

TALLY = """
SELECT b.model_a, b.model_b, count(*) AS battles, count(v.battle) AS votes,
       total(CASE v.verdict WHEN 'a' THEN 1.0 WHEN 'tie' THEN 0.5 WHEN 'both_bad' THEN 0.5 ELSE 0.0 END) AS wins_a
FROM battles b LEFT JOIN votes v ON v.battle = b.id GROUP BY b.model_a, b.model_b
"""


def tally(store: Store, models: list[str]) -> dict[tuple[str, str], dict[str, float]]:
    """For each pair (first < second): battles, votes, wins of the first (a tie is half), votes with the first left."""
    pairs = {pair: {"battles": 0, "votes": 0, "wins": 0.0, "left": 0} for pair in combinations(sorted(models), 2)}
    for row in store.read(TALLY):
        pair = tuple(sorted((row["model_a"], row["model_b"])))
        if pair in pairs:
            straight = row["model_a"] == pair[0]
            pairs[pair]["battles"] += row["battles"]
            pairs[pair]["votes"] += row["votes"]
            pairs[pair]["wins"] += row["wins_a"] if straight else row["votes"] - row["wins_a"]
            pairs[pair]["left"] += row["votes"] if straight else 0
    return pairs


def width(votes: float, wins: float) -> float:
    """The width of the Wilson interval of a win rate, which is 1 without votes."""
    if not votes:
        return 1.0
    low, high = proportion_confint(wins, votes, method="wilson")
    return high - low


def choose_pair(store: Store, models: list[str], rng: random.Random) -> tuple[str, str]:
    """(left, right): the pair whose win rate has the widest interval, in random order.

    A battle without a vote counts as half a vote, so that simultaneous visitors do not all get the same pair.
    """
    pairs = tally(store, models)
    uncertain = {}
    for pair, row in pairs.items():
        expected = row["votes"] + 0.5 * (row["battles"] - row["votes"])
        share = row["wins"] / row["votes"] if row["votes"] else 0.5
        uncertain[pair] = width(expected, share * expected)
    widest = max(uncertain.values())
    sides = list(rng.choice([pair for pair, value in uncertain.items() if math.isclose(value, widest)]))
    rng.shuffle(sides)
    return sides[0], sides[1]
