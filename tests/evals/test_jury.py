"""Several judges: what they agree on, and what their majority says."""

import json

import numpy as np
import pytest

from tests.published_votes import SCRIPT, write_lines

QUALITY = {"x": 1.0, "y": 0.0, "z": -1.0}


def verdicts(judge, sharpness, seed, questions=60):
    rng, rows = np.random.default_rng(seed), []
    for q in range(questions):
        for a, b in (("x", "y"), ("x", "z"), ("y", "z")):
            p = 1 / (1 + np.exp(-sharpness * (QUALITY[a] - QUALITY[b])))
            for shown in "ab":
                verdict = "a" if rng.random() < p else "b"
                rows.append(
                    {
                        "question": f"q{q}",
                        "model_a": a,
                        "model_b": b,
                        "verdict": verdict,
                        "judge": judge,
                        "shown": shown,
                    }
                )
    return rows


def test_a_jury_agrees_is_counted_and_rates(tmp_path, run_script, capsys):
    rows = verdicts("one", 2, 0) + verdicts("two", 2, 1) + verdicts("coin", 0, 2)
    words = ("task=jury", f"task.input=[{write_lines(tmp_path / 'v.jsonl', rows)}]", "task.rounds=20")
    assert run_script(SCRIPT, *words, f"hydra.run.dir={tmp_path}/out") == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    kappas = {tuple(row["judges"]): row["kappa"] for row in result["agreement"]}
    assert kappas["one", "two"] > 0.25 > abs(kappas["one", "coin"]) and len(kappas) == 3 and result["n"] == 180
    ratings = [result["majority"][model]["rating"] for model in "xyz"]
    assert ratings == sorted(ratings, reverse=True) and set(result["by_judge"]) == {"one", "two", "coin"}
    spread = {
        name: result["by_judge"][name]["x"]["rating"] - result["by_judge"][name]["z"]["rating"]
        for name in kappas_of(kappas)
    }
    assert spread["coin"] == pytest.approx(0, abs=100) and spread["one"] > 200
    shares = result["shares"]
    assert shares["one"]["x"]["value"] > 60 > shares["coin"]["x"]["value"] and shares["coin"]["x"]["lower"] < 50
    assert sum(row["value"] for row in shares["one"].values()) == pytest.approx(150)  # a point is given once
    assert run_script(SCRIPT, *words, "task.baseline=y", f"hydra.run.dir={tmp_path}/y") == 0
    against = json.loads((tmp_path / "y/result.json").read_text())["shares"]
    assert set(against["one"]) == {"x", "z"} and against["one"]["x"]["n"] == 60
    assert run_script(SCRIPT, *words, "task.baseline=nobody", f"hydra.run.dir={tmp_path}/nobody") == 2
    alone = write_lines(tmp_path / "one.jsonl", verdicts("one", 2, 0, questions=3))
    assert run_script(SCRIPT, "task=jury", f"task.input=[{alone}]", f"hydra.run.dir={tmp_path}/bad") == 2
    assert "two judges or more" in capsys.readouterr().err


def kappas_of(kappas):
    return {name for pair in kappas for name in pair}
