"""Do the audit's intervals hold what they promise? Simulated studies with planted biases, and with a fair judge.

    python bench/coverage.py [studies] [questions] > table

Each study has its own questions, answers, people and judge. People see the quality of an answer, which grows with its
length; the judge sees the same, is sharper or not, and has the planted bias. A row of the table: the share of 95 %
intervals that hold the truth (the average over studies for figures whose truth is a function of the sample), and how
often the audit names anything. Run on one core: about 1 s a study.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))

from omegaconf import OmegaConf  # noqa: E402

from evals import biases  # noqa: E402
from evals.audit import audit  # noqa: E402
from evals.ratings import rate  # noqa: E402
from evals.verdicts import votes_table  # noqa: E402

CONF = Path(__file__).parents[1] / "conf"
MODELS = {"vicuna-a": 0.3, "llama-a": 0.0, "claude-a": 0.8, "oasst-a": 0.5, "dolly-a": -0.3}
LENGTH_TASTE = 0.8  # people's log odds for the longer answer


def study(
    seed: int, *, questions: int, people: int, sharpness: float, order=0.0, length=0.0, family=0.0, models=MODELS
) -> pd.DataFrame:
    """Votes of people and of one judge ("gpt-4") on all pairs of all questions; biases in the judge's log odds."""
    rng, names, rows = np.random.default_rng(seed), list(models), []
    for q in range(questions):
        lengths = {name: int(rng.integers(100, 2000)) for name in names}
        quality = {name: models[name] + rng.normal(0, 0.7) for name in names}
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                longer = float(np.sign(lengths[a] - lengths[b])) * (abs(lengths[a] - lengths[b]) > 30)
                gap = quality[a] - quality[b] + LENGTH_TASTE * longer
                pair = {"question": f"q{q}", "category": ("writing", "math")[q % 2], "model_a": a, "model_b": b}
                pair |= {"length_a": lengths[a], "length_b": lengths[b], "hash_a": f"{q}{a}", "hash_b": f"{q}{b}"}
                for person in range(people):
                    won = rng.random() < 1 / (1 + np.exp(-gap))
                    rows.append(pair | {"judge": f"p{person}", "human": True, "verdict": "a" if won else "b"})
                own = (a.startswith("vicuna")) - (b.startswith("vicuna"))
                for shown, side in (("a", 1), ("b", -1)):
                    logit = sharpness * gap + length * longer + family * own + order * side
                    verdict = "a" if rng.random() < 1 / (1 + np.exp(-logit)) else "b"
                    rows.append(pair | {"judge": "gpt-4", "shown": shown, "verdict": verdict})
    return votes_table(rows)


def settings() -> OmegaConf:
    """conf/task/audit.yaml, as a run would have it."""
    task = OmegaConf.load(CONF / "task" / "audit.yaml")
    task.families = OmegaConf.load(CONF / "evaluate.yaml").families
    task.input, task.format, task.rounds = [], "verdicts", 100
    return task


def figures_of(votes: pd.DataFrame) -> dict[str, dict]:
    """The length and family figures of a study at 95 %, each alone."""
    people, judge = votes[votes["human"]], votes[~votes["human"]]
    family = {name: name.startswith("vicuna") for name in MODELS}
    return {
        "position": biases.position(judge, level=0.95),
        "length": biases.preference_for_more(people, judge, "length", min_gap=30, level=0.95),
        "self_preference": biases.self_preference(people, judge, family, level=0.95),
    }


PLANS = {
    "fair, as sharp as people": {"sharpness": 1.0},
    "fair, three times as sharp": {"sharpness": 3.0},
    "likes the first, half a logit": {"sharpness": 1.0, "order": 0.5},
    "likes the longer, half a logit": {"sharpness": 1.0, "length": 0.5},
    "likes its family, half a logit": {"sharpness": 1.0, "family": 0.5},
}


def coverage(plan: dict, *, studies: int, questions: int, people: int) -> dict:
    """{figure: share of intervals that hold the truth, share named}, over studies that differ in their seed.

    The truth of position and length is what the figure comes to on many questions; that of the family is planted.
    """
    large = figures_of(study(10_000, questions=1500, people=people, **plan))
    truth = {name: figure["value"] for name, figure in large.items()}
    truth["self_preference"] = plan.get("family", 0.0) / plan["sharpness"] * 400 / np.log(10)
    if "order" not in plan:
        truth["position"] = 0.5
    if "length" not in plan:
        truth["length"] = 0.0
    held, named = {name: [] for name in truth}, {name: [] for name in truth}
    for seed in range(studies):
        for name, figure in figures_of(study(seed, questions=questions, people=people, **plan)).items():
            if figure["value"] is not None:
                held[name].append(figure["lower"] <= truth[name] <= figure["upper"])
                named[name].append(figure["p_value"] < 0.05)
    return {
        name: {"truth": float(truth[name]), "held": float(np.mean(held[name])), "named": float(np.mean(named[name]))}
        for name in truth
    }


def false_alarms(*, studies: int, questions: int, people: int, sharpness: float) -> float:
    """The share of audits of a fair judge that name anything."""
    task, named = settings(), 0
    for seed in range(studies):
        votes = study(seed, questions=questions, people=people, sharpness=sharpness)
        named += bool(audit(votes, {}, task)["named"])
    return named / studies


def bradley_terry(*, studies: int, questions: int, interval: str) -> float:
    """Coverage of a model's rating, questions shared by all pairs."""
    held = []
    large = study(10_000, questions=3000, people=1, sharpness=1.0)
    chosen = {"method": "bradley_terry", "level": 0.95, "rounds": 100, "k": 4.0, "anchor": None}
    truth = rate(large[large["human"]], interval="sandwich", **chosen)["ratings"]
    for seed in range(studies):
        votes = study(seed, questions=questions, people=1, sharpness=1.0)
        rated = rate(votes[votes["human"]], interval=interval, **chosen)["ratings"]
        held += [row["lower"] <= truth[name]["rating"] <= row["upper"] for name, row in rated.items()]
    return float(np.mean(held))


if __name__ == "__main__":
    studies, questions = (int(word) for word in (sys.argv[1:] + ["200", "60"][len(sys.argv) - 1 :])[:2])
    for name, plan in PLANS.items():
        print(name, json.dumps(coverage(plan, studies=studies, questions=questions, people=2)), flush=True)
    for sharpness in (1.0, 3.0):
        alarms = false_alarms(studies=studies, questions=questions, people=2, sharpness=sharpness)
        print(f"false alarms of the whole audit, sharpness {sharpness}: {alarms:.3f}", flush=True)
    for size in (20, questions):
        for interval in ("bootstrap", "clustered"):
            held = bradley_terry(studies=studies, questions=size, interval=interval)
            print(f"Bradley-Terry, {size} questions, {interval}: {held:.3f}", flush=True)
