"""Figures of evaluations that a one-line fault would move, as values: weights, ties, repeated votes, touching ranks."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from evals import perplexity, rm_accuracy
from evals.agreement import alpha, human_pairs, judge_pairs, vote_tables
from evals.ratings import ranks, sandwich_bradley_terry
from evals.winrate import length_controlled
from generation.preferences import _pairs

COLUMNS = ["question", "turn", "model_a", "model_b", "category", "judge", "verdict"]


def votes(*rows):
    """(question, judge, verdict) of one pair of models."""
    return pd.DataFrame([(q, 1, "a", "b", "all", judge, verdict) for q, judge, verdict in rows], columns=COLUMNS)


def test_equal_scores_are_half_right_and_a_label_of_a_half_is_of_neither_class():
    assert rm_accuracy.accuracy_report(np.array([2.0, 1.0, 1.0, 0.0]), np.ones(4))["accuracy"] == 0.5
    scores, labels = np.array([3.0, 0.0, 2.0, 9.0, 1.0]), np.array([1.0, 0.0, 1.0, 0.5, 0.0])
    assert rm_accuracy.auc_report(scores, labels)["auc"] == 1.0
    assert rm_accuracy.auc_report(np.array([3.0, 4.0, 2.0, 0.0, 1.0]), labels)["auc"] == 0.5


def test_the_interval_of_a_loss_is_the_ratio_estimators():
    """Cochran 1977, section 2.11, by hand: residuals 1, -1, 0 of three conversations, 8 tokens."""
    figures = perplexity.perplexity(np.array([[3.0, 2.0], [1.0, 2.0], [4.0, 4.0]]))
    assert figures["loss"] == 1.0
    assert figures["loss_upper"] - 1 == pytest.approx(1.96 * math.sqrt(3 / 2 * 2) / 8)


def test_a_battle_of_weight_3_has_the_robust_error_of_three_that_are_one_battle():
    rng = np.random.default_rng(0)
    battles = np.array([(a, b, rng.integers(0, 3)) for a, b in itertools.combinations(range(4), 2) for _ in range(6)])
    weights, ratings = rng.integers(1, 4, len(battles)), np.array([1100.0, 1000.0, 950.0, 950.0])
    weighted = sandwich_bradley_terry(battles, weights.astype(float), ratings, np.arange(len(battles)))
    copies = np.repeat(np.arange(len(battles)), weights)
    repeated = sandwich_bradley_terry(battles[copies], np.ones(len(copies)), ratings, copies)
    assert weighted == pytest.approx(repeated, rel=1e-9)
    assert np.abs(weighted - sandwich_bradley_terry(battles, np.ones(len(battles)), ratings, np.arange(36))).max() > 0.1


def test_an_interval_that_touches_is_not_surely_better():
    lower, upper = np.array([10.0, 5.0, 0.0]), np.array([20.0, 10.0, 4.9])
    assert ranks(lower, upper).tolist() == [1, 1, 3]


@pytest.mark.parametrize("level", ["nominal", "ordinal"])
def test_a_voters_last_vote_on_an_item_counts(level):
    first = [("q1", "x", "a"), ("q2", "x", "b"), ("q1", "y", "a"), ("q2", "y", "b"), ("q3", "y", "a")]
    assert alpha(votes(("q2", "x", "a"), *first), level) == pytest.approx(1.0)
    assert alpha(votes(*first, ("q2", "x", "a")), level) < 0.9


def test_a_judges_first_verdict_on_an_item_is_the_one_that_people_are_set_against():
    people, judge = votes(("q1", "p", "a")), votes(("q1", "j", "a"), ("q1", "j", "b"))
    assert judge_pairs(people, judge)[["x", "y"]].to_numpy().tolist() == [["a", "a"]]


def test_between_people_the_order_of_a_file_says_nothing():
    rows = [
        ("q1", "p", "a"),
        ("q1", "r", "b"),
        ("q2", "p", "a"),
        ("q2", "r", "tie"),
        ("q3", "p", "b"),
        ("q3", "r", "b"),
    ]
    forth, back = (human_pairs(votes(*order)) for order in (rows, rows[::-1]))
    one, other = (vote_tables(pairs, symmetric=True).sum(0) for pairs in (forth, back))
    assert np.array_equal(one, other) and np.array_equal(one, one.T)
    assert not np.array_equal(*(vote_tables(pairs, symmetric=False).sum(0) for pairs in (forth, back)))


def test_the_published_error_of_a_controlled_rate_is_the_spread_over_the_root_of_n():
    rng = np.random.default_rng(0)
    preference, lengths, difficulty = rng.random(20), rng.integers(10, 900, (2, 20)), rng.normal(size=20)
    told = length_controlled(preference, *lengths, difficulty)["length_control"]
    predicted = expit(told["weights"]["difficulty"] * difficulty + told["weights"]["model"])
    expected = 100 * predicted.std(ddof=1) / math.sqrt(20)
    assert told["alpaca_eval_standard_error"] == pytest.approx(expected, rel=1e-9) and expected > 0


def test_equal_scores_are_no_pair_even_where_no_margin_is_asked_for():
    from generation.preferences import _pair_fault

    entries = [{"text": t, "score": s, "aspects": {}, "reward": s} for t, s in (("x", 1.0), ("y", 1.0), ("z", 0.5))]
    faults = [_pair_fault(*pair, 0.0) for pair in _pairs(entries, "all")]
    assert faults == ["tie", None, None]
