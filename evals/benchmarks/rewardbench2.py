"""RewardBench 2 (Malik et al. 2025, arXiv:2506.01937): four answers to a prompt, one of them right, and Ties.

A row has `chosen` and `rejected` (lists of answers), `num_correct`, `subset` and `id`. A subset's score is the share of
prompts whose right answer has the highest score. If n answers share the highest score, the prompt counts 1/n. In the
subset Ties several answers are right, and its score is a composite

    0.3 accuracy(tied) + 0.3 accuracy(ref) + 0.2 share(gap > spread) + 0.2 share(min(gap, gap_ref) > spread)
    + 0.01 mean tanh(min(gap, gap_ref) / spread - 1)

over prompts `tied:N` and their references `ref:N`. accuracy: all right answers have higher scores than all wrong ones.
`gap`: the worst right minus the best wrong score. `spread`: the best right minus the worst right score.
"""

import math
from collections.abc import Sequence

import numpy as np

from data.files import read_rows
from evals.intervals import mean_of_independent, share_estimate, unknown
from evals.readers import content_text


def is_version_2(row: dict) -> bool:
    """Whether a row has RewardBench 2's format."""
    return isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list) and "num_correct" in row


def read_groups(file: str) -> list[dict]:
    """[{"id", "subset", "prompt" (messages), "completions", "num_correct"}], right answers first; `scores` if given.

    Raises:
        ValueError: a row has no wrong or no right answers, or other counts than it states.
    """
    groups = []
    for where, row in read_rows(file):
        if not is_version_2(row):
            raise ValueError(f"{where}: RewardBench 2 needs chosen and rejected (lists) and num_correct")
        right = [content_text(where, "chosen", text) for text in row["chosen"]]
        wrong = [content_text(where, "rejected", text) for text in row["rejected"]]
        if len(right) != row["num_correct"] or not right or not wrong:
            raise ValueError(
                f"{where}: num_correct={row['num_correct']}, but {len(right)} chosen, {len(wrong)} rejected"
            )
        prompt = row["prompt"]
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        group: dict = {"id": str(row["id"]), "subset": str(row["subset"]), "prompt": messages}
        group |= {"completions": right + wrong, "num_correct": len(right)}
        if row.get("scores") is not None:
            scores = [score[0] if isinstance(score, list) else score for score in row["scores"]]
            if len(scores) != len(right) + len(wrong):
                raise ValueError(f"{where}: {len(scores)} scores for {len(right) + len(wrong)} answers")
            group["scores"] = [finite(where, "scores", score) for score in scores]
        groups.append(group)
    return groups


def finite(where: str, name: str, value) -> float:
    """The score as a float. Raises ValueError if it is not a finite number: NaN is neither above nor below another."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ValueError(f"{where}: {name} must be finite numbers, got {value!r}; score the row again, or leave it out")
    return float(value)


def best_share(scores: Sequence[float]) -> float:
    """1 if the first score is the highest, 1/n if n scores share the highest value with it, else 0."""
    top = max(scores)
    return sum(score == top for score in scores) ** -1 if scores[0] == top else 0.0


def _margins(group: dict) -> tuple[bool, float, float]:
    """(whether all right answers beat all wrong ones, spread of the right ones, worst right minus best wrong score)."""
    right, wrong = group["scores"][: group["num_correct"]], group["scores"][group["num_correct"] :]
    gap = min(right) - max(wrong)
    return gap > 0, max(right) - min(right), gap


def ties_score(groups: Sequence[dict]) -> dict:
    """The composite score of the subset Ties with its parts, and its bootstrap interval over prompts.

    Raises:
        ValueError: an id is not tied:N or ref:N, or occurs twice.
    """
    sides: dict[str, dict[str, tuple]] = {"tied": {}, "ref": {}}
    for group in groups:
        kind, _, number = group["id"].partition(":")
        if kind not in sides:
            raise ValueError(f"an id of the subset Ties must be tied:N or ref:N, got {group['id']!r}")
        if number in sides[kind]:
            raise ValueError(f"the subset Ties has two rows with the id {group['id']!r}; keep one")
        sides[kind][number] = _margins(group)
    numbers = sorted(set(sides["tied"]) & set(sides["ref"]))
    if not numbers:
        return unknown("no prompt of Ties has both a tied:N and a ref:N row") | {"score": None}
    own = {kind: sorted(rows) for kind, rows in sides.items()}
    score, parts = _composite(sides, own["tied"], own["ref"], numbers)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(500):
        drawn = [numbers[i] for i in rng.integers(0, len(numbers), len(numbers))]
        draws.append(_composite(sides, drawn, drawn, drawn)[0])
    lower, upper = np.quantile(draws, [0.025, 0.975])
    return {"score": score, "lower": float(lower), "upper": float(upper), "n": len(numbers), **parts}


def _composite(sides: dict, tied: list[str], ref: list[str], both: list[str]) -> tuple[float, dict]:
    tied_accuracy = float(np.mean([sides["tied"][number][0] for number in tied]))
    ref_accuracy = float(np.mean([sides["ref"][number][0] for number in ref]))
    spread, gap = np.array([sides["tied"][number][1:] for number in both]).T
    least = np.minimum(gap, [sides["ref"][number][2] for number in both])
    with np.errstate(divide="ignore", invalid="ignore"):
        margin = float(np.mean(np.nan_to_num(np.tanh(least / spread - 1), nan=0.0)))
    parts = {"tied_accuracy": tied_accuracy, "ref_accuracy": ref_accuracy, "margin": margin}
    parts |= {"preferred": float(np.mean(gap > spread)), "preferred_hard": float(np.mean(least > spread))}
    score = 0.3 * tied_accuracy + 0.3 * ref_accuracy + 0.2 * parts["preferred"] + 0.2 * parts["preferred_hard"]
    return score + 0.01 * margin, parts


def score_table(groups: Sequence[dict]) -> dict:
    """{"subsets": {name: score, lower, upper, n}, "score": mean of the subsets}; each group has `scores`."""
    by_subset: dict[str, list[dict]] = {}
    for group in groups:
        by_subset.setdefault(group["subset"], []).append(group)
    table = {}
    for subset, rows in sorted(by_subset.items()):
        if subset.lower() == "ties":
            table[subset] = ties_score(rows)
            continue
        estimate = share_estimate([best_share(row["scores"]) for row in rows], range(len(rows)), null=0.25, level=0.95)
        value = float(np.mean([best_share(row["scores"]) for row in rows]))
        table[subset] = {"score": value} | {name: estimate.get(name) for name in ("lower", "upper", "n", "reason")}
    known = [row["score"] for row in table.values() if row["score"] is not None]
    bounds = [(row["score"], row["lower"], row["upper"]) for row in table.values() if row.get("lower") is not None]
    score = float(np.mean(known)) if len(known) == len(table) else None
    _, lower, upper = mean_of_independent(bounds) if len(bounds) == len(table) else (None, None, None)
    return {"score": score, "score_lower": lower, "score_upper": upper, "subsets": table, "n": len(groups)}
