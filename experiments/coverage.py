"""Coverage of the intervals: simulated studies with planted biases, and with a fair judge.

    python experiments/coverage.py --studies 200 --questions 60
    python experiments/coverage.py --only "figures: fair" audits power       some lines

Each study has its own questions, answers, people and judge. People see the quality of an answer, which grows with its
length. The judge sees the same quality, may be sharper, and has the planted bias. The rows:

    held      share of 95 % intervals that contain the truth
    named     share of studies in which the figure alone is significant at 5 %; `promised`: the share that follows from
              the studies' own errors
    audit     share of whole audits (seven figures, Holm) with a significant figure, and by figure
    power     share of comparisons of the size of task=power whose win rate differs significantly from 50 %
    sequence  share of confidence sequences that ever exclude the truth
"""

import argparse
import gc
import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).parents[1]))

from omegaconf import OmegaConf  # noqa: E402

from evals import biases  # noqa: E402
from evals.audit import audit  # noqa: E402
from evals.intervals import share_estimate  # noqa: E402
from evals.power import comparisons_for, confidence_sequence, with_clusters  # noqa: E402
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
    """conf/task/audit.yaml as in a run."""
    task = OmegaConf.load(CONF / "task" / "audit.yaml")
    task.families = OmegaConf.load(CONF / "evaluate.yaml").families
    task.input, task.format = [], "verdicts"
    task.rounds = 20  # for kappa's bootstrap; kappa is far from 0 here
    return task


def figures_of(votes: pd.DataFrame) -> dict[str, dict]:
    """The figures of a study with planted truth, at 95 %, each alone."""
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


def truth_of(plan: dict, *, people: int) -> dict[str, float]:
    """The value of each figure on many questions, for a planted bias; else the value of a fair judge."""
    truth = {"position": 0.5, "length": 0.0}
    truth["self_preference"] = plan.get("family", 0.0) / plan["sharpness"] * 400 / np.log(10)
    for bias, figure in (("order", "position"), ("length", "length")):
        if bias in plan:
            truth[figure] = figures_of(study(10_000, questions=1500, people=people, **plan))[figure]["value"]
    return truth


def coverage(plan: dict, *, studies: int, questions: int, people: int) -> dict:
    """{figure: truth, held, named, promised}, over studies that differ in their seed."""
    truth = truth_of(plan, people=people)
    rows: dict[str, list] = {name: [] for name in truth}
    for seed in range(studies):
        for name, figure in figures_of(study(seed, questions=questions, people=people, **plan)).items():
            if figure["value"] is not None:
                error = (figure["upper"] - figure["lower"]) / 2 / norm.ppf(0.975)
                away = abs(truth[name] - (0.5 if name == "position" else 0.0)) / error
                contains = figure["lower"] <= truth[name] <= figure["upper"]
                promised = norm.cdf(away - norm.ppf(0.975)) + norm.cdf(-away - norm.ppf(0.975))
                rows[name].append((contains, figure["p_value"] < 0.05, promised))
    columns = ("held", "named", "promised")
    return {
        name: {"truth": round(float(truth[name]), 4)}
        | dict(zip(columns, np.mean(rows[name], axis=0).round(4).tolist(), strict=True))
        for name in truth
    }


def audits(*, studies: int, questions: int, people: int, sharpness: float) -> dict:
    """The share of audits of a fair judge with a significant figure, and the number by figure."""
    task = settings()
    named: Counter[str] = Counter()
    for seed in range(studies):
        votes = study(seed, questions=questions, people=people, sharpness=sharpness)
        found = audit(votes, {}, task)["named"]
        named.update([*found, *(["anything"] if found else [])])
    return {"anything": named.pop("anything", 0) / studies, "by_figure": dict(named)}


def bradley_terry(*, studies: int, questions: int, interval: str) -> float:
    """Coverage of a model's rating, if all pairs share the questions."""
    contains = []
    large = study(10_000, questions=3000, people=1, sharpness=1.0)
    chosen: dict[str, Any] = {"method": "bradley_terry", "level": 0.95, "rounds": 100, "k": 4.0, "anchor": None}
    truth = rate(large[large["human"]], interval="sandwich", **chosen)["ratings"]
    for seed in range(studies):
        votes = study(seed, questions=questions, people=1, sharpness=1.0)
        rated = rate(votes[votes["human"]], interval=interval, **chosen)["ratings"]
        contains += [row["lower"] <= truth[name]["rating"] <= row["upper"] for name, row in rated.items()]
    return float(np.mean(contains))


def power_of_sizes(win_rate: float, ties: float, per_question: int, icc: float, *, studies: int) -> dict:
    """Shares of studies with the size of task=power in which the win rate, or no difference, is significant."""
    questions = with_clusters(comparisons_for(win_rate, ties, alpha=0.05, power=0.8), per_question, icc)
    clusters, named = np.repeat(np.arange(questions), per_question), {}
    for rate_, name in ((win_rate, "power"), (0.5, "false_alarms")):
        rng, found = np.random.default_rng(0), 0
        for _ in range(studies):
            # a vote is its question's (with probability sqrt(icc)) or drawn anew, so that votes correlate by icc
            shared = rng.random((questions, per_question)) < np.sqrt(icc)
            draw = np.where(shared, rng.random((questions, 1)), rng.random((questions, per_question)))
            hits = np.where(draw < ties, 0.5, draw < ties + rate_ - ties / 2).ravel()
            found += share_estimate(hits, clusters, null=0.5, level=0.95)["p_value"] < 0.05
        named[name] = found / studies
    return {"questions": questions, **named}


def sequences(win_rate: float, ties: float, *, studies: int, votes: int) -> float:
    """How often a confidence sequence excludes the truth after any of the votes."""
    rng, out = np.random.default_rng(0), 0
    for _ in range(studies):
        draw = rng.random(votes)
        lower, upper = confidence_sequence(np.where(draw < ties, 0.5, draw < ties / 2 + win_rate), alpha=0.05)
        out += bool((lower > win_rate).any() or (upper < win_rate).any())
    return out / studies


def blocks(studies: int, questions: int) -> dict[str, Callable]:
    """{name of a line of the table: the function that measures it}."""
    found: dict[str, Callable] = {
        f"figures: {name}": partial(coverage, plan, studies=studies, questions=questions, people=2)
        for name, plan in PLANS.items()
    }
    for sharpness in (1.0, 3.0):
        found[f"audits of a fair judge, sharpness {sharpness}"] = partial(
            audits, studies=studies, questions=questions, people=2, sharpness=sharpness
        )
    for size in (20, questions):
        for interval in ("bootstrap", "clustered"):
            found[f"Bradley-Terry, {size} questions, {interval}"] = partial(
                bradley_terry, studies=studies, questions=size, interval=interval
            )
    for win_rate, ties, per_question, icc in ((0.6, 0.0, 1, 0.0), (0.6, 0.3, 1, 0.0), (0.6, 0.0, 3, 0.3)):
        name = f"power {win_rate}, ties {ties}, votes a question {per_question}, icc {icc}"
        found[name] = partial(power_of_sizes, win_rate, ties, per_question, icc, studies=10 * studies)
    for win_rate, ties in ((0.5, 0.0), (0.5, 0.4), (0.6, 0.0)):
        found[f"sequence {win_rate}, ties {ties}"] = partial(sequences, win_rate, ties, studies=studies, votes=500)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of the names of lines")
    given = parser.parse_args()
    gc.freeze()  # statsmodels runs the garbage collector at every correction
    for name, measure in blocks(given.studies, given.questions).items():
        if name.startswith(tuple(given.only)):
            print(f"{name}: {json.dumps(measure())}", flush=True)
