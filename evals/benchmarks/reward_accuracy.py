"""task=rm_accuracy: a reward model on RewardBench's sections, on LLMBar, and on comparisons such as Anthropic's HH."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from statsmodels.stats.proportion import proportion_confint

from data.files import read_rows
from data.formats import preferences
from data.records import Comparison
from evals.reward_judge import RewardJudge
from runtime.plots import plot_intervals
from runtime.report import print_table

# RewardBench v1 (Lambert et al. 2024, arXiv:2403.13787): how many examples each subset stands for; math-prm has 447
# pairs and counts 984, so that mathematics weighs as much as code
SECTIONS = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28}
    | {"mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134}
    | {"llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 250}
    | {"xstest-should-respond": 154, "donotanswer": 136},
    "Reasoning": {"math-prm": 984} | {f"hep-{name}": 164 for name in ("cpp", "go", "java", "js", "python", "rust")},
}


def read_pairs(file: str) -> list[dict]:
    """[{"subset", "prompt" (messages), "sides"}], or {"subset", "scores"} where a row has them: chosen, then rejected.

    Rows are RewardBench's (prompt, chosen, rejected, subset), LLMBar's (input, output_1, output_2, label) or any
    comparison that the trainers read. Ties are left out: nobody said which side is right.
    """
    pairs = []
    for where, row in read_rows(file):
        subset = str(row.get("subset", Path(file).name.split(".")[0]))
        if "chosen_score" in row and "rejected_score" in row:
            pairs.append({"subset": subset, "scores": (float(row["chosen_score"]), float(row["rejected_score"]))})
            continue
        for record in _comparisons(where, row):
            pairs.append({"subset": subset, "prompt": record.prompt, "sides": (record.chosen, record.rejected)})
    return pairs


def _comparisons(where: str, row: dict) -> list[Comparison]:
    if {"input", "output_1", "output_2", "label"} <= set(row):
        best = int(row["label"])
        if best not in (1, 2):
            raise ValueError(f"{where}: label must be 1 or 2, got {row['label']!r}")
        row = {"prompt": row["input"], "chosen": row[f"output_{best}"], "rejected": row[f"output_{3 - best}"]}
    try:
        records = preferences(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return [record for record in records if isinstance(record, Comparison) and not record.tie]


def score_pairs(pairs: list[dict], settings: DictConfig) -> np.ndarray:
    """(P, 2) scores of chosen and rejected: those in the file, or the reward model's."""
    if all("scores" in pair for pair in pairs):
        return np.array([pair["scores"] for pair in pairs])
    if settings.kind != "reward_model" or any("scores" in pair for pair in pairs):
        raise ValueError("rows without scores need a reward model (judge=reward_model judge.path=DIR) for all of them")
    judge = RewardJudge(settings)
    sides = [
        judge.scores([[*pair["prompt"], {"role": "assistant", "content": pair["sides"][side]}] for pair in pairs])
        for side in (0, 1)
    ]
    return np.array(sides).T


def accuracy_table(subsets: list[str], scores: np.ndarray) -> dict:
    """Accuracy of every subset with its Wilson interval, and of RewardBench's sections; equal scores are half right."""
    right = (np.sign(scores[:, 0] - scores[:, 1]) + 1) / 2  # (P,)
    members = defaultdict(list)
    for hit, subset in zip(right, subsets, strict=True):
        members[subset].append(hit)
    table = {}
    for subset, hits in sorted(members.items()):
        lower, upper = proportion_confint(sum(hits), len(hits), method="wilson")
        table[subset] = {"accuracy": float(np.mean(hits)), "lower": lower, "upper": upper, "n": len(hits)}
    sections = {}
    for section, counts in SECTIONS.items():
        seen = {subset: count for subset, count in counts.items() if subset in table}
        if seen:
            total = sum(count * table[subset]["accuracy"] for subset, count in seen.items())
            missing = [subset for subset in counts if subset not in seen]
            sections[section] = {"accuracy": total / sum(seen.values()), "missing_subsets": missing}
    result = {"accuracy": float(right.mean()), "n": len(right), "subsets": table, "sections": sections}
    complete = len(sections) == len(SECTIONS) and not any(s["missing_subsets"] for s in sections.values())
    result["score"] = float(np.mean([s["accuracy"] for s in sections.values()])) if complete else None
    return result


def order_accuracy(votes: pd.DataFrame) -> dict:
    """A judge with verdicts in both orders against the labels, LLMBar's way (Zeng et al. 2023, arXiv:2310.07641).

    Args:
        votes: of one judge and of the label (human), pairs sorted.
    Returns:
        accuracy in each order, their mean, in both, and how often the orders agree.
    """
    label = votes[votes["human"]].set_index("question")["verdict"]
    judge = votes[~votes["human"]].pivot(index="question", columns="shown", values="verdict")
    label = label.loc[judge.index]
    hits = judge.eq(label, axis=0)
    return {
        "n": len(judge),
        "acc_ab": float(hits["a"].mean()),
        "acc_ba": float(hits["b"].mean()),
        "acc_avg": float(hits.to_numpy().mean()),
        "acc_both": float(hits.all(axis=1).mean()),
        "agreement_rate": float((judge["a"] == judge["b"]).mean()),
    }


def run(cfg: DictConfig, out: Path) -> dict:
    """task=rm_accuracy: result.json, rm_accuracy.png."""
    pairs = [pair for file in cfg.task.input for pair in read_pairs(file)]
    if not pairs:
        raise ValueError(f"no decided comparison in {', '.join(cfg.task.input)}")
    result = accuracy_table([pair["subset"] for pair in pairs], score_pairs(pairs, cfg.judge))
    rows = [(name, row["accuracy"], row["lower"], row["upper"]) for name, row in result["subsets"].items()]
    sections = [(name.upper(), row["accuracy"], None, None) for name, row in result["sections"].items()]
    print_table("reward model accuracy", ("", "accuracy", "lower", "upper"), rows + sections)
    plot_intervals(out / "rm_accuracy.png", "accuracy", rows, null=0.5)
    return result
