"""Reward model benchmarks, perplexity and the KL frontier."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from evals.benchmarks.reward_accuracy import SECTIONS, accuracy_table, read_pairs
from evals.kl_frontier import frontier, gold_fit
from evals.perplexity import conversation_losses, perplexity
from model.build import new_policy
from tests.published_votes import SCRIPT, write_lines
from tests.tiny_models import random_ids, tiny_config


def test_sections_are_weighted_by_their_examples_and_math_counts_984():
    subsets = ["math-prm", "math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"]
    scores = np.array([[1, 0], [0, 1], *[[1, 0]] * 6], float)
    result = accuracy_table(subsets, scores)
    assert result["sections"]["Reasoning"]["accuracy"] == pytest.approx((984 * 0.5 + 6 * 164) / (984 + 6 * 164))
    assert result["subsets"]["math-prm"]["n"] == 2 and result["score"] is None
    assert (
        SECTIONS["Safety"]["xstest-should-respond"] == 250
        and sum(SECTIONS["Chat"].values()) == 358
        and sum(SECTIONS["Chat Hard"].values()) == 456
    )
    assert sum(SECTIONS["Safety"].values()) == 740 and sum(len(s) for s in SECTIONS.values()) == 23


def test_the_score_is_the_mean_of_the_four_sections_and_equal_scores_are_half_right():
    subsets = [subset for counts in SECTIONS.values() for subset in counts]
    scores = np.array([[1.0, 0.0] if s in SECTIONS["Chat"] else [0.0, 0.0] for s in subsets])
    assert accuracy_table(subsets, scores)["score"] == pytest.approx((1 + 3 * 0.5) / 4)


def test_rows_of_three_kinds_are_read(tmp_path):
    rows = [
        {"prompt": "q", "chosen": "good", "rejected": "bad", "subset": "donotanswer"},
        {"input": "q", "output_1": "bad", "output_2": "good", "label": 2},
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
    ]
    pairs = read_pairs(write_lines(tmp_path / "pairs.jsonl", rows))
    assert [pair["sides"] for pair in pairs] == [("good", "bad")] * 3
    assert [pair["subset"] for pair in pairs] == ["donotanswer", "pairs", "pairs"]


def test_the_script_takes_scores_from_the_file(tmp_path, run_script, capsys):
    rows = [{"subset": "donotanswer", "chosen_score": i, "rejected_score": 1} for i in (0, 2, 2)]
    file = write_lines(tmp_path / "scores.jsonl", rows)
    assert run_script(SCRIPT, "task=rm_accuracy", f"task.input=[{file}]", f"hydra.run.dir={tmp_path}/out") == 0
    result = json.loads(Path(tmp_path / "out/result.json").read_text())
    assert (
        result["subsets"]["donotanswer"]["accuracy"] == pytest.approx(2 / 3)
        and 0.2 < result["subsets"]["donotanswer"]["lower"] < 0.3
    )
    pairs = write_lines(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    assert run_script(SCRIPT, "task=rm_accuracy", f"task.input=[{pairs}]", f"hydra.run.dir={tmp_path}/other") == 2
    assert "judge=reward_model" in capsys.readouterr().err


def test_perplexity_does_not_depend_on_the_batch_and_is_the_exponential_of_the_mean():
    policy = new_policy(tiny_config(), seed=0).eval()
    lengths = (5, 9, 14)
    examples = [
        {"input_ids": random_ids(n, seed=n), "completion_mask": [False] * 3 + [True] * (n - 3), "where": f"f:{n:02}"}
        for n in lengths
    ]
    one, three = (conversation_losses(policy, examples, pad_id=0, batch_size=size) for size in (1, 3))
    assert one == pytest.approx(three, rel=1e-5) and one[:, 1].tolist() == [2, 6, 11]
    result = perplexity(one)
    assert result["perplexity"] == pytest.approx(math.exp(one[:, 0].sum() / 19))
    assert result["loss_lower"] < result["loss"] < result["loss_upper"] and result["tokens"] == 19


def test_the_frontier_is_what_no_point_beats():
    points = [{"kl": k, "score": s} for k, s in ((0, 0), (1, 2), (2, 1), (3, 3), (3, 2.5), (4, 3))]
    assert [(p["kl"], p["score"]) for p in frontier(points)] == [(0, 0), (1, 2), (3, 3)]


def test_the_peak_of_a_gold_score_is_found():
    d = np.linspace(0.2, 6, 40)
    points = [{"kl": x**2, "gold": 0.3 + x * (1.5 - 0.8 * math.log(x))} for x in d]
    fit = gold_fit(points)
    assert (fit["alpha"], fit["beta"], fit["start"]) == pytest.approx((1.5, 0.8, 0.3))
    assert fit["peak_kl"] == pytest.approx(math.exp(2 * (1.5 / 0.8 - 1)))
    assert gold_fit([{"kl": 1.0, "gold": None}]) is None


def test_the_script_draws_the_frontier_of_runs(tmp_path, run_script, capsys):
    run = tmp_path / "ppo"
    run.mkdir()
    rows = [{"step": i, "objective/kl": i / 10, "objective/score": math.sqrt(i)} for i in range(1, 6)]
    write_lines(run / "metrics.jsonl", [{"step": 0, "eval/loss": 1.0}, *rows])
    assert run_script(SCRIPT, "task=kl_frontier", f"task.input=[{run}]", f"hydra.run.dir={tmp_path}/out") == 0
    result = json.loads(Path(tmp_path / "out/result.json").read_text())
    assert len(result["frontier"]) == 5 and (tmp_path / "out/kl_frontier.png").exists()
    assert run_script(SCRIPT, "task=kl_frontier", f"task.input=[{tmp_path}]", f"hydra.run.dir={tmp_path}/other") == 2
    assert "metrics.jsonl" in capsys.readouterr().err


def test_seeds_of_a_training_are_one_curve_of_the_frontier(tmp_path, run_script, capsys):
    for seed, more in enumerate((0.0, 0.1, 0.2)):
        (tmp_path / f"ppo_{seed}").mkdir()
        rows = [{"step": i, "objective/kl": i + more, "objective/score": 2 * i + more} for i in (1, 2)]
        write_lines(tmp_path / f"ppo_{seed}" / "metrics.jsonl", rows)
    words = [
        "task=kl_frontier",
        f"task.input=[{','.join(f'{tmp_path}/ppo_{i}' for i in range(3))}]",
        "task.seeds=[ppo]",
    ]
    assert run_script(SCRIPT, *words, f"hydra.run.dir={tmp_path}/out") == 0
    result = json.loads(Path(tmp_path / "out/result.json").read_text())
    first, last = result["frontier"]
    assert [point["run"] for point in (first, last)] == ["ppo", "ppo"] and first["seeds"] == 3
    assert (first["kl"], last["score"]) == pytest.approx((1.1, 4.1))
    half = 4.3027 * 0.1 / 3**0.5  # t with two degrees of freedom
    assert (first["kl_upper"], last["score_lower"]) == pytest.approx((1.1 + half, 4.1 - half), abs=1e-4)
    write_lines(tmp_path / "ppo_2" / "metrics.jsonl", rows[:1])
    capsys.readouterr()
    assert run_script(SCRIPT, *words, f"hydra.run.dir={tmp_path}/other") == 2
    assert "needs the same steps" in capsys.readouterr().err
