"""AlpacaEval's win rates: published values, and how ties, missing verdicts and lengths are read."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evals.winrate import comparisons_needed, detectable_effect, length_controlled, predicted_win_rate, win_rate
from tests.published_votes import DOOR, alpaca_rows, annotations, difficulties, given, published

FIGURES = ("win_rate", "standard_error", "discrete_win_rate", "n_wins", "n_wins_base", "n_draws", "n_total")
POWER = {"alpha": 0.05, "power": 0.8}


def preference_of(rows: pd.DataFrame) -> np.ndarray:
    return np.where(rows["preference"] == 0, 0.5, rows["preference"] - 1)


@pytest.mark.parametrize("version", [1, 2])
def test_win_rates_of_every_model_are_alpaca_evals(version):
    rows = alpaca_rows(version)
    for model, expected in given(f"ae{version}_win_rate").items():
        result = win_rate(preference_of(rows[rows["model"] == model]))
        assert {name: result[name] for name in FIGURES} == pytest.approx({n: expected[n] for n in FIGURES}, abs=1e-9), (
            model
        )


@pytest.mark.parametrize(
    "model", ["alpaca-7b", "alpaca-7b_concise", "gpt-3.5-turbo-1106", "claude-2.1_concise", "phi-2"]
)
def test_length_controlled_fits_are_alpaca_evals_without_its_gamed_baseline(model):
    rows, expected = alpaca_rows(2), given("lc_fit_no_gamed_regulariser")[model]
    rows = rows[rows["model"] == model]
    lengths = rows["len_1"].to_numpy(), rows["len_2"].to_numpy()
    difficulty = np.array(difficulties())[rows["index"]]
    for name, known in (("length_controlled_noreg", difficulty), ("length_controlled_minimal", None)):
        result = length_controlled(preference_of(rows), *lengths, known)
        assert result["length_controlled_win_rate"] == pytest.approx(expected[name]["lc_sklearn191"], abs=0.5)
        assert result["length_control"]["C"] == pytest.approx(expected[name]["C191"])


def test_length_controlled_rates_from_published_weights():
    (file,) = published("alpaca_eval/ae2_lc_glm_weights.csv")
    weights = pd.read_csv(file, index_col=0).set_axis(["length", "difficulty", "model"], axis=1).T.to_dict()
    baseline, difficulty = {"difficulty": 0.0, "model": 0.0}, np.array(difficulties())
    for model, expected in given("lc_from_published_weights").items():
        assert predicted_win_rate(weights[model], baseline, difficulty) == pytest.approx(expected["lc"], abs=1e-6), (
            model
        )
    for pair, expected in given("lc_predict_winrate_pairs").items():
        a, b = pair.split(">")
        assert predicted_win_rate(weights[a], weights[b], difficulty) == pytest.approx(expected, abs=1e-6)


def test_verbose_and_concise_alpaca_differ_by_the_published_paired_difference():
    rows = alpaca_rows(2)
    sides = [rows[rows["model"] == f"alpaca-7b_{kind}"].set_index("index") for kind in ("verbose", "concise")]
    verbose, concise = (pd.Series(preference_of(side), side.index) for side in sides)
    gap, expected = 100 * verbose.sub(concise), given("ae2_paired")["alpaca-7b verbose-concise"]
    assert (gap.mean(), gap.sem()) == pytest.approx((expected["mean_diff_pp"], expected["se_pp"]))
    assert len(verbose.index.union(concise.index)) == expected["n"]  # the longer of the two files


def test_comparisons_needed_are_the_published_ones():
    for rate, key in ((0.55, "0.55"), (0.60, "0.6")):
        (expected,) = [row["arcsine"] for name, row in given("power").items() if name.startswith(f"win_rate {key} ")]
        assert comparisons_needed(rate, **POWER) == expected


def test_the_detectable_effect_is_the_inverse_of_the_comparisons_needed():
    assert 100 * detectable_effect(783, **POWER) == pytest.approx(5, abs=0.01)
    for n in (20, 194, 805, 100_000):
        effect = detectable_effect(n, **POWER)
        assert (
            comparisons_needed(0.5 + effect * 1.0001, **POWER) <= n <= comparisons_needed(0.5 + effect * 0.999, **POWER)
        )
    assert detectable_effect(1, **POWER) == 0.5


def test_a_missing_verdict_is_neither_a_tie_nor_a_loss():
    assert win_rate(np.array([1.0, 1.0, 0.5, np.nan]))["win_rate"] == pytest.approx(250 / 3)
    assert win_rate(np.array([1.0, np.nan]))["n_errors"] == 1


def test_length_control_takes_out_what_length_explains():
    rng = np.random.default_rng(3)
    lengths = rng.integers(100, 2000, (2, 805))
    by_length = 1 / (1 + np.exp(-2 * np.tanh((lengths[1] - lengths[0]) / (lengths[0] - lengths[1]).std(ddof=1))))
    longer = lengths + np.array([[0], [600]])  # the model writes 600 characters more, and the judge likes just that
    lifted = 1 / (1 + np.exp(-2 * np.tanh((longer[1] - longer[0]) / (longer[0] - longer[1]).std(ddof=1))))
    assert 100 * by_length.mean() == pytest.approx(50, abs=3) and 100 * lifted.mean() > 65
    assert length_controlled(lifted, *longer, None)["length_controlled_win_rate"] == pytest.approx(50, abs=2)


def run_door(door, tmp_path, rows, *words):
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    asked = f"task.input=[{tmp_path}/annotations.json]", "task.format=alpaca_eval", f"hydra.run.dir={tmp_path}/out"
    code = door(DOOR, "task=winrate", *asked, "overwrite=true", *words)
    return code, json.loads(Path(tmp_path / "out/result.json").read_text()) if code == 0 else None


def test_the_door_gives_alpaca_evals_figures(tmp_path, door):
    code, result = run_door(door, tmp_path, annotations("alpaca-7b"))
    expected = given("ae2_win_rate")["alpaca-7b"]
    assert code == 0 and {n: result[n] for n in FIGURES} == pytest.approx({n: expected[n] for n in FIGURES}, abs=1e-9)
    minimal = given("lc_fit_no_gamed_regulariser")["alpaca-7b"]["length_controlled_minimal"]["lc_sklearn191"]
    assert result["length_controlled_win_rate"] == pytest.approx(minimal, abs=0.5)
    assert result["minimum_detectable_effect"] == pytest.approx(4.93, abs=0.01)


def test_difficulty_is_joined_on_the_instruction_whatever_the_order_of_rows(tmp_path, door):
    rows, difficulty = annotations("alpaca-7b"), difficulties()
    table = {f"instruction {i}": value for i, value in enumerate(difficulty)}
    (tmp_path / "difficulty.json").write_text(json.dumps(table))
    results = [
        run_door(door, tmp_path, part, f"task.difficulty={tmp_path}/difficulty.json")[1] for part in (rows, rows[::-1])
    ]
    expected = given("lc_fit_no_gamed_regulariser")["alpaca-7b"]["length_controlled_noreg"]["lc_sklearn191"]
    assert [r["length_controlled_win_rate"] for r in results] == pytest.approx([expected] * 2, abs=0.5)
    assert results[0]["length_control"]["difficulty_joined_on"] == "instruction"


def test_difficulties_by_number_need_the_number_in_the_rows_whatever_their_order(tmp_path, door, capsys):
    lines = [f"{i},{value}" for i, value in enumerate(difficulties())]
    (tmp_path / "difficulty.csv").write_text("\n".join(["index,instruction_difficulty", *lines]))
    words, rows = f"task.difficulty={tmp_path}/difficulty.csv", annotations("alpaca-7b")
    assert run_door(door, tmp_path, rows, words)[0] == 2  # by the order of rows a shuffled file would be misaligned
    assert "no `index`" in capsys.readouterr().err
    numbered = [row | {"index": i} for i, row in enumerate(rows)]
    expected = given("lc_fit_no_gamed_regulariser")["alpaca-7b"]["length_controlled_noreg"]["lc_sklearn191"]
    for part in (numbered, sorted(numbered, key=lambda row: str(row["index"]))):
        _, result = run_door(door, tmp_path, part, words)
        assert result["length_controlled_win_rate"] == pytest.approx(expected, abs=0.5)
        assert result["length_control"]["difficulty_joined_on"] == "index"


def hand_made(preferences, lengths=lambda i: (10 + i, 30 - i)):
    texts = [("x" * lengths(i)[0], "y" * lengths(i)[1]) for i in range(len(preferences))]
    return [
        {
            "instruction": str(i),
            "generator_1": "base",
            "generator_2": "m.1",
            "preference": p,
            "output_1": a,
            "output_2": b,
        }
        for i, (p, (a, b)) in enumerate(zip(preferences, texts, strict=True))
    ]


def test_ties_are_coded_0_or_one_and_a_half_and_garbage_is_counted(tmp_path, door):
    _, result = run_door(door, tmp_path, hand_made([0, 1.5, 1, 2, 2.0, None, "garbage", -1, 3, float("nan")]))
    assert {n: result[n] for n in ("n_draws", "n_wins", "n_wins_base", "n_total", "n_errors")} == {
        "n_draws": 2, "n_wins": 2, "n_wins_base": 1, "n_total": 5, "n_errors": 5,
    }  # fmt: skip
    assert result["win_rate"] == 60 and result["model"] == "m.1"


def test_answers_of_one_length_leave_the_controlled_rate_unknown_with_a_reason(tmp_path, door):
    code, result = run_door(door, tmp_path, hand_made([1, 2] * 10, lengths=lambda i: (5, 5)))
    assert code == 0 and result["length_controlled_win_rate"] is None
    assert "lengths that differ" in result["length_control"]["reason"]


def test_a_model_that_always_wins_leaves_nothing_to_fit(tmp_path, door):
    code, result = run_door(door, tmp_path, hand_made([2] * 20, lengths=lambda i: (5, 5 + i)))
    assert code == 0 and result["win_rate"] == 100 and result["length_controlled_win_rate"] is None
    assert "verdicts or more that differ" in result["length_control"]["reason"]


def test_a_question_without_difficulty_is_refused(tmp_path, door, capsys):
    (tmp_path / "difficulty.json").write_text('{"0": 0.5}')
    code, _ = run_door(door, tmp_path, hand_made([1, 2] * 10), f"task.difficulty={tmp_path}/difficulty.json")
    assert code == 2 and "no difficulty" in capsys.readouterr().err
