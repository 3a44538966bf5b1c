"""Style control: what is bought by length or formatting alone is taken out of the ratings."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

from evals.answers import style_features
from evals.style import fit_style, rate_style, style_differences
from tests.published_votes import SCRIPT, battles, write_lines

PLAIN, RICH = "Paris.", "# Answer\n\n- **Paris** is the capital\n- It lies on the Seine\n\n1. See the Louvre\n"


def test_style_counts_markdown_and_not_what_stands_in_code():
    assert style_features([RICH]) | {"tokens": 0} == {"tokens": 0, "headers": 1, "lists": 3, "bold": 1}
    assert style_features(["```\n# no header\n- no item\n```"])["headers"] == 0
    assert style_features(["**both** and __both__\n```\n__init__ ** x ** y\n```"])["bold"] == 2
    assert style_features([PLAIN]) == {"tokens": 2, "headers": 0, "lists": 0, "bold": 0}


def simulated(n=3000, seed=0):
    """x and y are equally good; the judge pays for style, and y writes more of it."""
    rng = np.random.default_rng(seed)
    a, b = rng.permuted(np.tile([0, 1], (n, 1)), axis=1).T
    style = np.column_stack([rng.normal(0, 1, n) + (a - b), *rng.normal(0, 1, (3, n))])
    won = (rng.random(n) < 1 / (1 + np.exp(-1.2 * style[:, 0]))).astype(float)
    return a, b, won, style


def test_ratings_with_style_taken_out_are_equal_where_only_style_differs():
    a, b, won, style = simulated()
    plain = fit_style(a, b, won, np.zeros_like(style), 2)
    controlled = fit_style(a, b, won, style, 2)
    assert abs(plain[1] - plain[0]) > 100 > 20 > abs(controlled[1] - controlled[0])
    assert controlled[2] == pytest.approx(1.2, abs=0.15) and np.abs(controlled[3:]).max() < 0.15


def test_the_fit_is_the_minimum_of_the_penalised_likelihood():
    a, b, won, style = simulated(200)
    won[::5] = 0.5

    def loss(w):
        z = np.log(10) * (w[a] - w[b]) + style @ w[2:]
        return np.sum(np.logaddexp(0, z) - won * z) + 0.25 * w @ w

    best = minimize(loss, np.zeros(6), tol=1e-12).x
    assert fit_style(a, b, won, style, 2) == pytest.approx(np.r_[400 * best[:2] + 1000, best[2:]], abs=0.01)


def test_battles_that_share_a_question_are_drawn_together():
    """Ten voters who say the same of a question are one, so that the interval must not shrink with them."""
    rng = np.random.default_rng(0)
    verdicts = rng.choice(["a", "b"], 60, p=[0.6, 0.4])
    columns = {f"{name}_{s}": rng.integers(0, 50, 60) for name in ("tokens", "headers", "lists", "bold") for s in "ab"}
    once = battles(*[("x", "y", verdict) for verdict in verdicts]).assign(**columns)
    widths = {}
    for name, votes in (("once", once), ("ten", pd.concat([once] * 10, ignore_index=True))):
        found = rate_style(votes, level=0.95, rounds=200)
        widths[name] = found["style_controlled"]["x"]["upper"] - found["style_controlled"]["x"]["lower"]
        assert found["style_controlled"]["x"]["n"] == len(votes) == found["style"]["bold"]["n"]
    assert widths["ten"] > 0.8 * widths["once"]


def test_style_differences_are_relative_and_standardised():
    votes = battles(*[("x", "y", "a")] * 3)
    values = {
        f"{name}_{s}": v for name in ("headers", "lists", "bold") for s, v in (("a", [0, 0, 0]), ("b", [0, 0, 0]))
    }
    z = style_differences(votes.assign(tokens_a=[10, 20, 30], tokens_b=[30, 20, 10], **values))
    assert z[:, 0] == pytest.approx([-1.2247449, 0, 1.2247449]) and not z[:, 1:].any()


def test_the_script_reads_style_from_arena_battles(tmp_path, run_script):
    a, b, won, style = simulated(300)
    rows = []
    for i in range(300):
        meta = {f"{key}_{s}": {"h1": 1} for key in ("header_count", "list_count", "bold_count") for s in "ab"}
        tokens = {"sum_assistant_a_tokens": 100 + int(40 * style[i, 0]) + 60, "sum_assistant_b_tokens": 160}
        winner = "model_a" if won[i] else "model_b"
        rows.append({"model_a": "xy"[a[i]], "model_b": "xy"[b[i]], "winner": winner, "conv_metadata": meta | tokens})
    file = write_lines(tmp_path / "battles.jsonl", [*rows, rows[0] | {"winner": "?"}])
    words = [f"task.input=[{file}]", "task.style_control=true", "task.rounds=5", f"hydra.run.dir={tmp_path}/out"]
    assert run_script(SCRIPT, "task=ratings", *words) == 0
    result = json.loads(Path(tmp_path / "out/result.json").read_text())
    gaps = [r["y"]["rating"] - r["x"]["rating"] for r in (result["ratings"], result["style_controlled"])]
    assert gaps[0] > 100 and abs(gaps[1]) < 60 and result["style"]["tokens"]["lower"] > 0


def test_style_control_without_texts_is_refused(tmp_path, run_script, capsys):
    rows = [{"model_a": "x", "model_b": "y", "winner": w} for w in ("model_a", "model_b")]
    file = write_lines(tmp_path / "battles.jsonl", rows)
    assert (
        run_script(
            SCRIPT, "task=ratings", f"task.input=[{file}]", "task.style_control=true", f"hydra.run.dir={tmp_path}/o"
        )
        == 2
    )
    assert "conv_metadata" in capsys.readouterr().err
