"""task=rm_accuracy: reward models and judges on RewardBench 1 and 2, LLMBar, and comparisons such as HH."""

from collections import defaultdict
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from statsmodels.stats.proportion import proportion_confint, proportions_ztest

from data.files import read_rows
from data.formats import preferences
from data.records import Comparison
from evals.asking import Judging
from evals.benchmarks.rewardbench2 import finite, is_version_2, read_groups, score_table
from evals.intervals import holm, mean_of_independent
from evals.judge import grade_answers, judge_pairs
from evals.judge_items import Item
from evals.reward_judge import RewardJudge
from evals.verdicts import text_hash
from runtime.plots import plot_intervals
from runtime.report import print_table

# RewardBench v1 (Lambert et al. 2024, arXiv:2403.13787): the weight of each subset in examples. math-prm has 447 pairs
# and weighs 984, so that mathematics weighs as much as code
SECTIONS = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28}
    | {"mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134}
    | {"llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154}
    | {"xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984} | {f"hep-{name}": 164 for name in ("cpp", "go", "java", "js", "python", "rust")},
}


def read_pairs(file: str) -> list[dict]:
    """[{"subset", "prompt" (messages), "sides"}], or {"subset", "scores"} if the row has scores: chosen, then rejected.

    Rows are RewardBench's (prompt, chosen, rejected, subset), LLMBar's (input, output_1, output_2, label) or any
    comparison that the trainers read. Ties are left out, because no side is known to be right.
    """
    pairs = []
    for where, row in read_rows(file):
        subset = str(row.get("subset", Path(file).name.split(".")[0]))
        if "chosen_score" in row and "rejected_score" in row:
            scores = tuple(finite(where, name, row[name]) for name in ("chosen_score", "rejected_score"))
            pairs.append({"subset": subset, "scores": scores})
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


def score_pairs(pairs: list[dict], judging: Judging) -> tuple[np.ndarray, int]:
    """((P, 2) scores of chosen and rejected, from the file or from the judge; the number of unreadable verdicts).

    A reward model scores each answer. A language model (judge=llm) gets both answers, in an order that depends on their
    text; its verdict gives scores 1 and 0. A tie or an unreadable verdict gives 0 and 0, which counts half, as in
    RewardBench.
    """
    if all("scores" in pair for pair in pairs):
        return np.array([pair["scores"] for pair in pairs]), 0
    if any("scores" in pair for pair in pairs):
        raise ValueError("some rows have scores and others do not; split the file")
    if judging.judge.kind == "reward_model":
        judge = RewardJudge(judging.judge)
        sides = [
            judge.scores([[*pair["prompt"], {"role": "assistant", "content": pair["sides"][side]}] for pair in pairs])
            for side in (0, 1)
        ]
        return np.array(sides).T, 0
    verdicts = judge_comparisons(pairs, judging)
    scores = {"a": (1.0, 0.0), "b": (0.0, 1.0), "tie": (0.0, 0.0), "error": (0.0, 0.0)}
    return np.array([scores[verdict] for verdict in verdicts]), verdicts.count("error")


def judge_comparisons(pairs: list[dict], judging: Judging) -> list[str]:
    """a (chosen), b, tie or error for each pair: the verdict of a language model that sees both answers once."""
    items = []
    for number, pair in enumerate(pairs):
        asked = talk_of(pair["prompt"])
        question = {"question_id": str(number), "category": None, "turns": [asked]}
        shown = "ab"[int(text_hash("\n".join(pair["sides"])), 16) % 2]
        items.append(Item(question, 1, ("chosen", "rejected"), ([pair["sides"][0]], [pair["sides"][1]]), None, shown))
    verdicts, _, _ = judge_pairs(judging, items)
    return [verdict.verdict for verdict in verdicts]


def talk_of(prompt: list[dict]) -> str:
    """The prompt as one text for a judge. Several messages have their roles, so that it sees who said what."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt)


def score_groups(groups: list[dict], judging: Judging) -> list[dict]:
    """RewardBench 2's rows with scores of all answers, by a reward model or by a language model's grades from 1 to 10.

    An unreadable grade is lower than every other grade, as in RewardBench 2.
    """
    missing = [group for group in groups if "scores" not in group]
    talks = [(group, text) for group in missing for text in group["completions"]]
    if not talks:
        return groups
    if judging.judge.kind == "reward_model":
        conversations = [[*group["prompt"], {"role": "assistant", "content": text}] for group, text in talks]
        scores = iter(RewardJudge(judging.judge).scores(conversations))
    else:
        items = []
        for number, (group, text) in enumerate(talks):
            asked = talk_of(group["prompt"])
            question = {"question_id": f"{group['id']}/{number}", "category": None, "turns": [asked]}
            items.append(Item(question, 1, ("answer",), ([text],), None))
        grades, _, _ = grade_answers(judging, items)
        scores = iter(-1.0 if row["grade"] is None else row["grade"] for row in grades)
    return [
        group if "scores" in group else group | {"scores": [next(scores) for _ in group["completions"]]}
        for group in groups
    ]


def best_and_worst(table: dict) -> dict:
    """The subsets whose accuracy differs from the mean of all, after Holm's correction for the choice among many."""
    names = [name for name, row in table["subsets"].items() if row.get("lower") is not None and row["n"] > 1]
    if len(names) < 2:
        return {}
    mean = table.get("accuracy", table.get("score"))
    figures = []
    for name in names:
        row = table["subsets"][name]
        value = row.get("accuracy", row.get("score"))
        p_value = float(proportions_ztest(value * row["n"], row["n"], mean, prop_var=mean)[1]) if 0 < mean < 1 else 1.0
        figures.append({"p_value": p_value, "value": value})
    holm(figures, alpha=0.05)
    return {
        name: {"value": figure["value"], "p_adjusted": figure["p_adjusted"]}
        for name, figure in zip(names, figures, strict=True)
        if figure["significant"]
    }


def accuracy_table(subsets: list[str], scores: np.ndarray) -> dict:
    """Accuracy of every subset with its Wilson interval, and of RewardBench's sections. Equal scores count half."""
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
            value, weight = total / sum(seen.values()), sum(seen.values())
            errors = [
                (count / weight) ** 2 * table[subset]["accuracy"] * (1 - table[subset]["accuracy"]) / table[subset]["n"]
                for subset, count in seen.items()
            ]
            effective = value * (1 - value) / sum(errors) if sum(errors) > 0 else sum(table[s]["n"] for s in seen)
            low, high = proportion_confint(value * effective, effective, method="wilson")
            n = sum(table[subset]["n"] for subset in seen)
            sections[section] = {"accuracy": value, "lower": low, "upper": high, "n": n, "missing_subsets": missing}
    result = {"accuracy": float(right.mean()), "n": len(right), "subsets": table, "sections": sections}
    complete = len(sections) == len(SECTIONS) and not any(s["missing_subsets"] for s in sections.values())
    bounds = [(s["accuracy"], s["lower"], s["upper"]) for s in sections.values()]
    mean = mean_of_independent(bounds) if complete else (None, None, None)
    return result | dict(zip(("score", "score_lower", "score_upper"), mean, strict=True))


def run(cfg: DictConfig, out: Path) -> dict:
    """task=rm_accuracy: result.json, rm_accuracy.png."""
    first = next((row for file in cfg.task.input for _, row in read_rows(file)), None)
    if first is not None and is_version_2(first):
        groups = [group for file in cfg.task.input for group in read_groups(file)]
        result = score_table(score_groups(groups, Judging(cfg.judge, cfg.get("client"), "single")))
        rows = [
            (n, *(row.get(key) for key in ("score", "lower", "upper", "n"))) for n, row in result["subsets"].items()
        ]
        keys = ("score", "score_lower", "score_upper", "n")
        extra = [("MEAN OF THE SUBSETS", *(result[key] for key in keys))]
    else:
        pairs = [pair for file in cfg.task.input for pair in read_pairs(file)]
        if not pairs:
            raise ValueError(f"no decided comparison in {', '.join(cfg.task.input)}")
        scores, errors = score_pairs(pairs, Judging(cfg.judge, cfg.get("client"), "pairwise"))
        result = accuracy_table([pair["subset"] for pair in pairs], scores) | {"errors": errors}
        keys = ("accuracy", "lower", "upper", "n")
        rows = [(name, *(row[key] for key in keys)) for name, row in result["subsets"].items()]
        extra = [(name.upper(), *(row[key] for key in keys)) for name, row in result["sections"].items()]
        if result["score"] is not None:
            extra.append(("SCORE", *(result[key] for key in ("score", "score_lower", "score_upper", "n"))))
    result["stand_out"] = best_and_worst(result)
    print_table("reward model accuracy", ("", "accuracy", "lower", "upper", "n"), rows + extra)
    for name, row in result["stand_out"].items():
        print(f"{name} differs from the mean of all: {row['value']:.3f}, Holm-adjusted p {row['p_adjusted']:.3g}")
    plot_intervals(out / "rm_accuracy.png", "accuracy", [row[:4] for row in rows if row[2] is not None], null=0.5)
    return result
