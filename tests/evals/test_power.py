"""Sample sizes that hold what they promise, and intervals that may be looked at after every vote."""

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from evals.power import comparisons_for, confidence_sequence, exact_power, seeds_for, with_clusters
from tests.published_votes import SCRIPT, write_lines


@pytest.mark.parametrize("win_rate, ties", [(0.65, 0.0), (0.65, 0.2), (0.6, 0.0)])
def test_the_promised_power_is_the_simulated_one(win_rate, ties):
    n = comparisons_for(win_rate, ties, alpha=0.05, power=0.8)
    assert exact_power(n, win_rate, ties, alpha=0.05) >= 0.8
    rng, named = np.random.default_rng(0), 0
    for _ in range(600):
        decided = rng.binomial(n, 1 - ties)
        wins = rng.binomial(decided, (win_rate - ties / 2) / (1 - ties))
        named += binomtest(wins, decided).pvalue <= 0.05
    assert named / 600 == pytest.approx(0.8, abs=0.05)


def test_known_sizes():
    assert comparisons_for(0.6, 0.0, alpha=0.05, power=0.8) == pytest.approx(205, abs=8)  # 194 by the normal test
    assert exact_power(100, 0.5, 0.0, alpha=0.05) == pytest.approx(0.035, abs=0.001)  # the exact test's own level
    assert with_clusters(200, 1, 0.3) == 200 and with_clusters(200, 4, 1.0) == 200 and with_clusters(200, 4, 0.0) == 50
    assert seeds_for(0.1, 0.05, alpha=0.05, power=0.8) == 5


def test_a_confidence_sequence_holds_at_every_stop_and_an_interval_does_not():
    rng, missed, fixed = np.random.default_rng(0), 0, 0
    for _ in range(80):
        values = (rng.random(150) < 0.5).astype(float)
        lower, upper = confidence_sequence(values, alpha=0.05)
        missed += bool(((lower > 0.5) | (upper < 0.5)).any())
        n = np.arange(1, 151)
        mean = np.cumsum(values) / n
        fixed += bool((np.abs(mean - 0.5) > 1.96 * 0.5 / np.sqrt(n))[9:].any())
    assert missed / 80 <= 0.05 < 0.2 < fixed / 80
    lower, upper = confidence_sequence((rng.random(400) < 0.7).astype(float), alpha=0.05)
    assert lower[-1] > 0.5 and lower[-1] < 0.7 < upper[-1] and (np.diff(lower) >= 0).all()
    assert confidence_sequence(np.full(50, 0.5), alpha=0.05)[0][-1] < 0.5


def test_the_command_plans_and_follows_running_votes(tmp_path, run_script, capsys):
    rows = [{"question": f"q{i}", "model_a": "x", "model_b": "y", "verdict": "b", "judge": "j"} for i in range(30)]
    words = (
        "task=power",
        "task.win_rate=0.7",
        "task.per_question=2",
        "task.seed_spread=0.1",
        f"task.input=[{write_lines(tmp_path / 'v.jsonl', rows)}]",
        f"hydra.run.dir={tmp_path}/out",
    )
    assert run_script(SCRIPT, *words) == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["questions"] < result["comparisons"] < 60 and result["seeds"] >= 4
    running = result["running"]["x against y"]
    assert running["value"] == 0 and running["upper"] < 0.5 and 5 < running["decided_at"] < 15
    write_lines(tmp_path / "v.jsonl", [*rows, rows[0] | {"judge": "k", "verdict": "a"}])  # two judges are no sequence
    assert run_script(SCRIPT, *words[:-1], f"hydra.run.dir={tmp_path}/two") == 2
    assert "verdicts of j, k; give the files of one judge" in capsys.readouterr().err
    assert run_script(SCRIPT, "task=power", "task.win_rate=0.4", f"hydra.run.dir={tmp_path}/bad") == 2
    assert "win_rate" in capsys.readouterr().err
