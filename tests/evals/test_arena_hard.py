"""Arena-Hard: five-way verdicts in both orders, baselines by category, style taken out."""

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evals.benchmarks.arena_hard import FEATURES, controlled, games_of, score, style_gaps
from evals.questions import load_questions
from evals.readers import read_votes
from tests.published_votes import SCRIPT, write_lines

QUESTIONS = Path(__file__).parents[3] / "shared" / "reference" / "arena_hard" / "question_v2.jsonl.gz"
POINTS = {"A>>B": [1] * 3, "A>B": [1], "A=B": [0.5], "B>A": [0], "B>>A": [0] * 3, "A<<B": [0] * 3, "B<A": [1]}


def judgments(seed=0, n=60):
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        category, baseline = (("coding", "base-1"), ("creative_writing", "base-2"))[i % 2]
        games = [{"score": str(rng.choice([*POINTS, "none"]))} for _ in range(2)]
        games = [None if game["score"] == "none" else game for game in games]
        rows.append(
            {
                "uid": f"u{i}",
                "category": category,
                "judge": "gpt-4.1",
                "model": "m",
                "baseline": baseline,
                "games": games,
            }
        )
    return rows


def test_the_score_is_the_mean_of_points_with_strong_verdicts_three_times(tmp_path, run_script):
    rows, words = judgments(), ("task=arena_hard", "task.baselines={coding:base-1,creative_writing:base-2}")
    file = write_lines(tmp_path / "m.jsonl", rows)
    assert run_script(SCRIPT, *words, f"task.input=[{file}]", f"hydra.run.dir={tmp_path}/out") == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    for category in ("coding", "creative_writing"):
        points = []
        for row in rows:
            if row["category"] == category and None not in row["games"]:
                points += POINTS[row["games"][1]["score"]] + [1 - p for p in POINTS[row["games"][0]["score"]]]
        figure = result["categories"][category]["models"]["m"]
        assert figure["value"] == pytest.approx(100 * np.mean(points)) and figure["lower"] < figure["value"]
    assert result["errors"] == sum(None in row["games"] for row in rows)
    wrong = ("task=arena_hard", "task.baselines={default:nobody}", f"task.input=[{file}]")
    assert run_script(SCRIPT, *wrong, f"hydra.run.dir={tmp_path}/wrong") == 2


def test_what_style_explains_is_taken_out(tmp_path):
    rng, rows, style = np.random.default_rng(1), [], {}
    for i in range(300):
        lengths = {"m": int(rng.integers(300, 900)), "base": int(rng.integers(100, 600))}
        for model, length in lengths.items():
            style[model, f"u{i}"] = {"tokens": length, "headers": 0, "lists": 0, "bold": int(rng.integers(0, 5))}
        longer = 1 / (1 + np.exp(-6 * (lengths["m"] - lengths["base"]) / sum(lengths.values())))
        wins = [rng.random() < longer for _ in range(2)]  # the judge likes length and nothing else
        games = [{"score": "B>A" if wins[0] else "A>B"}, {"score": "A>B" if wins[1] else "B>A"}]
        rows.append({"uid": f"u{i}", "category": "coding", "model": "m", "baseline": "base", "games": games})
    votes = read_votes([write_lines(tmp_path / "m.jsonl", rows)], "arena_hard")
    games, _ = games_of(votes, {"default": "base"})
    assert score(games, 0.9)["value"] > 70
    found = controlled(games, style, level=0.9, rounds=30)
    # z-scores are about the mean gap: what is left is the score at the average difference, as published
    assert found["estimator"] == "maximum likelihood" and found["weights"]["tokens"] > 0.5
    assert abs(found["weights"]["bold"]) < 0.3
    few = controlled(games[:20], style, level=0.9, rounds=5)
    assert few["estimator"].startswith("ridge: 20 battles are few")


def test_a_strong_verdict_is_three_battles_for_the_style_too():
    rng = np.random.default_rng(2)
    games = pd.DataFrame({"question": [f"u{i}" for i in range(40)], "model": "m", "baseline": "base"})
    games = games.assign(won=rng.choice([0.0, 0.5, 1.0], 40), weight=rng.choice([1.0, 3.0], 40))
    style = {
        (model, f"u{i}"): dict(zip(FEATURES, map(int, rng.integers(1, 99, 4)), strict=True))
        for model in ("m", "base")
        for i in range(40)
    }
    repeated = games.loc[games.index.repeat(games["weight"].astype(int))].assign(weight=1.0)
    once, thrice = (style_gaps(rows, style) for rows in (games, repeated))
    assert thrice == pytest.approx(np.repeat(once, games["weight"].astype(int), axis=0))


def test_the_official_questions_are_read_and_categories_have_their_prompts_and_baselines(tmp_path):
    if not QUESTIONS.exists():
        pytest.skip(f"the official questions are not at {QUESTIONS}")
    from omegaconf import OmegaConf

    from evals.judge_items import choose_template, make_items
    from evals.prompts import load_templates

    with gzip.open(QUESTIONS, "rt", encoding="utf-8") as file:
        kinds = {}
        for line in file:
            row = json.loads(line)
            kinds.setdefault(row["category"], row)
    questions = load_questions(str(QUESTIONS))
    assert len(questions) == 750
    picked = [q for q in questions if q["question_id"] in {str(row["uid"]) for row in kinds.values()}]
    answers = {m: {q["question_id"]: ["x"] for q in picked} for m in ("m", "o3", "gemini")}
    task = OmegaConf.create(
        {
            "mode": "pairwise",
            "models": ["m", "o3", "gemini"],
            "turns": 1,
            "both_orders": True,
            "seed": 0,
            "baseline": {"default": "o3", "creative_writing": "gemini"},
        }
    )
    items, templates = make_items(picked, answers, {}, task), load_templates("arena_hard", "pairwise")
    for item in items:
        creative = item.question["category"] == "creative_writing"
        assert item.models[0] == ("gemini" if creative else "o3")
        assert ("creative" in choose_template(item, templates).name) == creative
