"""AlpacaEval's win rates: published values, and how ties, missing verdicts and lengths are read."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evals import length_control
from evals.lc_weights import predicted_rates, read_weights
from evals.length_control import length_controlled
from evals.winrate import comparisons_needed, detectable_effect, win_rate
from tests.published_votes import SCRIPT, alpaca_rows, annotations, difficulties, given, published, write_lines

FIGURES = ("win_rate", "standard_error", "discrete_win_rate", "n_wins", "n_wins_base", "n_draws", "n_total")
POWER = {"alpha": 0.05, "power": 0.8}


@pytest.fixture
def few_refits(monkeypatch):
    """For tests of anything but the interval, which takes most of the time."""
    monkeypatch.setattr(length_control, "REFITS", 2)


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
def test_length_controlled_fits_are_alpaca_evals_without_its_gamed_baseline(model, few_refits):
    rows, expected = alpaca_rows(2), given("lc_fit_no_gamed_regulariser")[model]
    rows = rows[rows["model"] == model]
    lengths = rows["len_1"].to_numpy(), rows["len_2"].to_numpy()
    difficulty = np.array(difficulties())[rows["index"]]
    for name, known in (("length_controlled_noreg", difficulty), ("length_controlled_minimal", None)):
        result = length_controlled(preference_of(rows), *lengths, known)
        assert result["length_controlled_win_rate"] == pytest.approx(expected[name]["lc_sklearn191"], abs=0.5)
        assert result["length_control"]["C"] == pytest.approx(expected[name]["C191"])


def test_length_controlled_rates_from_published_weights(tmp_path, run_script, capsys):
    names = ("ae2_lc_glm_weights.csv", "instruction_difficulty_recovered.csv.gz")
    weights, difficulty = published(*(f"alpaca_eval/{name}" for name in names))
    words = ("task=lc_weights", f"task.weights={weights}", f"task.difficulty={difficulty}")
    assert run_script(SCRIPT, *words, f"hydra.run.dir={tmp_path}/all") == 0
    models = json.loads((tmp_path / "all/result.json").read_text())["models"]
    for model, expected in given("lc_from_published_weights").items():
        found = models[model]["length_controlled_win_rate"], models[model]["alpaca_eval_standard_error"]
        assert found == pytest.approx((expected["lc"], expected["se"]), abs=1e-6), model
    known, difficulty = read_weights(weights), np.array(difficulties())
    for pair, expected in given("lc_predict_winrate_pairs").items():
        model, against = pair.split(">")
        assert 100 * predicted_rates(known[model], known[against], difficulty).mean() == pytest.approx(
            expected, abs=1e-6
        )
    assert run_script(SCRIPT, *words, f"task.baseline={against}", f"hydra.run.dir={tmp_path}/pair") == 0
    models = json.loads((tmp_path / "pair/result.json").read_text())["models"]
    assert models[model]["length_controlled_win_rate"] == pytest.approx(expected, abs=1e-6)
    assert models[against]["length_controlled_win_rate"] == 50
    assert run_script(SCRIPT, *words, "task.baseline=nobody", f"hydra.run.dir={tmp_path}/bad") == 2
    assert "task.baseline=nobody is not in" in capsys.readouterr().err


def test_weights_of_our_own_fits_give_the_rates_that_they_gave(tmp_path, run_script, few_refits):
    difficulty = tmp_path / "difficulty.json"
    difficulty.write_text(json.dumps({f"instruction {i}": d for i, d in enumerate(difficulties())}))
    rows = annotations("phi-2") + annotations("alpaca-7b_verbose")
    words = (f"task.input=[{write_lines(tmp_path / 'a.jsonl', rows)}]", "task.format=alpaca_eval")
    run = f"hydra.run.dir={tmp_path}/fits"
    assert run_script(SCRIPT, "task=winrate", *words, f"task.difficulty={difficulty}", run) == 0
    fits = json.loads((tmp_path / "fits/result.json").read_text())["models"]
    words = ("task=lc_weights", f"task.weights={tmp_path}/fits/result.json", f"task.difficulty={difficulty}")
    assert run_script(SCRIPT, *words, f"hydra.run.dir={tmp_path}/rates") == 0
    rates = json.loads((tmp_path / "rates/result.json").read_text())["models"]
    for model, own in fits.items():
        expected = own["baseline"]["length_controlled_win_rate"]
        # the file's rows are the instructions that the model answered: all of them but a few
        assert rates[model]["length_controlled_win_rate"] == pytest.approx(expected, abs=0.05)


def test_two_models_against_one_baseline_differ_by_the_published_paired_difference(
    tmp_path, run_script, few_refits, capsys
):
    rows = annotations("alpaca-7b_verbose") + annotations("alpaca-7b_concise")
    words = ("task=winrate", f"task.input=[{write_lines(tmp_path / 'a.jsonl', rows)}]", "task.format=alpaca_eval")
    assert run_script(SCRIPT, *words, f"hydra.run.dir={tmp_path}/out") == 0
    (paired,) = json.loads((tmp_path / "out/result.json").read_text())["paired"]["baseline"]
    expected = given("ae2_paired")["alpaca-7b verbose-concise"]
    assert paired["models"] == ["alpaca-7b_verbose", "alpaca-7b_concise"]
    assert (paired["value"], paired["standard_error"]) == pytest.approx((expected["mean_diff_pp"], expected["se_pp"]))
    assert paired["lower"] < 0 < paired["upper"] and not paired["significant"]  # t is 1.49
    assert "paired differences on the same questions" in capsys.readouterr().out


def gamed_rows(seed, n=400):
    """alpaca_eval's df_gamed in its layout: long answers of a gamed baseline lose, whatever the difficulty."""
    rng = np.random.default_rng(seed)
    gap, difficulty = rng.normal(size=n), rng.normal(size=n)
    won = rng.random(n) < 1 / (1 + np.exp(-4 * np.tanh(gap)))
    return [
        {"preference": float(w), "std_delta_len": g, "instruction_difficulty": d}
        for w, g, d in zip(won, gap, difficulty, strict=True)
    ]


def test_gamed_baselines_pull_the_weight_of_length_to_theirs_and_are_named(tmp_path, run_script, few_refits, capsys):
    rng, rows = np.random.default_rng(0), []
    for i in range(200):
        long, short = int(rng.integers(400, 900)), int(rng.integers(50, 400))
        rows.append(
            {
                "instruction": f"i{i}",
                "generator_1": "base",
                "generator_2": "new",
                "preference": float(1 + (rng.random() < 0.5)),
                "output_1": "x" * short,
                "output_2": "y" * long,
            }
        )
    words = ("task=winrate", f"task.input=[{write_lines(tmp_path / 'a.jsonl', rows)}]", "task.format=alpaca_eval")
    found = {}
    for name, extra in (("without", []), ("with", [f"task.gamed={write_lines(tmp_path / 'g.jsonl', gamed_rows(1))}"])):
        assert run_script(SCRIPT, *words, *extra, f"hydra.run.dir={tmp_path}/{name}") == 0
        found[name] = json.loads((tmp_path / name / "result.json").read_text())
    without, pulled = (found[name]["length_control"] for name in ("without", "with"))
    assert (without["gamed_baseline_regulariser"], pulled["gamed_baseline_regulariser"]) == (False, True)
    assert pulled["weights"]["length"] > without["weights"]["length"] + 0.3
    assert found["with"]["win_rate"] == found["without"]["win_rate"]
    bad = write_lines(tmp_path / "bad.jsonl", [{"preference": 1.0}])
    assert run_script(SCRIPT, *words, f"task.gamed={bad}", f"hydra.run.dir={tmp_path}/bad") == 2
    assert "lacks std_delta_len, instruction_difficulty" in capsys.readouterr().err


def test_a_controlled_rate_far_from_the_raw_one_and_a_constant_answer_are_warned_of(
    tmp_path, run_script, few_refits, capsys
):
    rng, rows = np.random.default_rng(0), []
    for i in range(300):  # the model wins only because it is longer
        gap = int(rng.integers(-200, 900))
        won = rng.random() < 1 / (1 + np.exp(-gap / 80))
        rows.append(
            {
                "instruction": f"i{i}",
                "generator_1": "base",
                "generator_2": "long",
                "preference": 1.0 + won,
                "output_1": "x" * 1000,
                "output_2": f"{i:04d}" + "y" * (996 + gap),
            }
        )
    constant = [row | {"generator_2": "constant", "output_2": "one and the same text"} for row in rows]
    file = write_lines(tmp_path / "a.jsonl", rows + constant)
    assert (
        run_script(
            SCRIPT, "task=winrate", f"task.input=[{file}]", "task.format=alpaca_eval", f"hydra.run.dir={tmp_path}/out"
        )
        == 0
    )
    models = json.loads((tmp_path / "out/result.json").read_text())["models"]
    (far,) = models["long"]["base"]["warnings"]
    assert "is far from the raw one" in far and models["constant"]["base"]["distinct_answers"] == 1
    assert any("300 of 300 answers are the same text" in w for w in models["constant"]["base"]["warnings"])
    assert "warning: long against base" in " ".join(capsys.readouterr().out.split())


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


def scored(run_script, tmp_path, rows, *words):
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    asked = f"task.input=[{tmp_path}/annotations.json]", "task.format=alpaca_eval", f"hydra.run.dir={tmp_path}/out"
    code = run_script(SCRIPT, "task=winrate", *asked, "overwrite=true", *words)
    return code, json.loads(Path(tmp_path / "out/result.json").read_text()) if code == 0 else None


def test_the_script_gives_alpaca_evals_figures(tmp_path, run_script):
    code, result = scored(run_script, tmp_path, annotations("alpaca-7b"))
    expected = given("ae2_win_rate")["alpaca-7b"]
    assert code == 0 and {n: result[n] for n in FIGURES} == pytest.approx({n: expected[n] for n in FIGURES}, abs=1e-9)
    minimal = given("lc_fit_no_gamed_regulariser")["alpaca-7b"]["length_controlled_minimal"]["lc_sklearn191"]
    assert result["length_controlled_win_rate"] == pytest.approx(minimal, abs=0.5)
    assert result["minimum_detectable_effect"] == pytest.approx(4.93, abs=0.01)


def test_difficulty_is_joined_on_the_instruction_whatever_the_order_of_rows(tmp_path, run_script):
    rows, difficulty = annotations("alpaca-7b"), difficulties()
    table = {f"instruction {i}": value for i, value in enumerate(difficulty)}
    (tmp_path / "difficulty.json").write_text(json.dumps(table))
    results = [
        scored(run_script, tmp_path, part, f"task.difficulty={tmp_path}/difficulty.json")[1]
        for part in (rows, rows[::-1])
    ]
    expected = given("lc_fit_no_gamed_regulariser")["alpaca-7b"]["length_controlled_noreg"]["lc_sklearn191"]
    assert [r["length_controlled_win_rate"] for r in results] == pytest.approx([expected] * 2, abs=0.5)
    assert results[0]["length_control"]["difficulty_joined_on"] == "instruction"


def test_difficulties_by_number_need_the_number_in_the_rows_whatever_their_order(tmp_path, run_script, capsys):
    lines = [f"{i},{value}" for i, value in enumerate(difficulties())]
    (tmp_path / "difficulty.csv").write_text("\n".join(["index,instruction_difficulty", *lines]))
    words, rows = f"task.difficulty={tmp_path}/difficulty.csv", annotations("alpaca-7b")
    assert scored(run_script, tmp_path, rows, words)[0] == 2  # by the order of rows a shuffled file would be misaligned
    assert "no `index`" in capsys.readouterr().err
    numbered = [row | {"index": i} for i, row in enumerate(rows)]
    expected = given("lc_fit_no_gamed_regulariser")["alpaca-7b"]["length_controlled_noreg"]["lc_sklearn191"]
    for part in (numbered, sorted(numbered, key=lambda row: str(row["index"]))):
        _, result = scored(run_script, tmp_path, part, words)
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


def test_ties_are_coded_0_or_one_and_a_half_and_garbage_is_counted(tmp_path, run_script):
    _, result = scored(run_script, tmp_path, hand_made([0, 1.5, 1, 2, 2.0, None, "garbage", -1, 3, float("nan")]))
    assert {n: result[n] for n in ("n_draws", "n_wins", "n_wins_base", "n_total", "n_errors")} == {
        "n_draws": 2,
        "n_wins": 2,
        "n_wins_base": 1,
        "n_total": 5,
        "n_errors": 5,
    }
    assert result["win_rate"] == 60 and result["model"] == "m.1"


def test_answers_of_one_length_leave_the_controlled_rate_unknown_with_a_reason(tmp_path, run_script):
    code, result = scored(run_script, tmp_path, hand_made([1, 2] * 10, lengths=lambda i: (5, 5)))
    assert code == 0 and result["length_controlled_win_rate"] is None
    assert "lengths that differ" in result["length_control"]["reason"]


def test_a_model_that_always_wins_leaves_nothing_to_fit(tmp_path, run_script):
    code, result = scored(run_script, tmp_path, hand_made([2] * 20, lengths=lambda i: (5, 5 + i)))
    assert code == 0 and result["win_rate"] == 100 and result["length_controlled_win_rate"] is None
    assert "verdicts or more that differ" in result["length_control"]["reason"]


def test_a_question_without_difficulty_is_refused(tmp_path, run_script, capsys):
    (tmp_path / "difficulty.json").write_text('{"0": 0.5}')
    code, _ = scored(run_script, tmp_path, hand_made([1, 2] * 10), f"task.difficulty={tmp_path}/difficulty.json")
    assert code == 2 and "no difficulty" in capsys.readouterr().err
