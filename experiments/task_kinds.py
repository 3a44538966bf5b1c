"""How far the classifier of check=task_mix can be believed: prompts that resemble each other never part.

    python experiments/task_kinds.py

Accuracy over 20 splits into five parts; prompts whose first paragraphs share half of their words and word pairs
(Jaccard) lie in one part. Then, over three such splits, the precision of the rows that a threshold passes, where the
thresholds were chosen without the rows that are judged.
"""

import sys
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold
from statsmodels.stats.proportion import proportion_confint

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from data.checks.task_classifier import fit_classifier, pipeline  # noqa: E402
from data.checks.task_mix import READ  # noqa: E402
from data.records import read_jsonl  # noqa: E402
from runtime.report import print_table  # noqa: E402

SPLITS, NESTED, ALIKE, MIN_PRECISION = 20, 3, 0.5, 0.8


def groups_of(texts: list[str]) -> np.ndarray:
    """(N,) a number that prompts share whose first paragraphs resemble each other, or the same third."""
    bags = []
    for text in texts:
        words = text.strip().split("\n")[0].lower().split()
        bags.append(set(words) | set(zip(words, words[1:], strict=False)))
    group = np.arange(len(texts))
    for i, j in combinations(range(len(texts)), 2):
        shared = len(bags[i] & bags[j])
        if shared and shared >= ALIKE * len(bags[i] | bags[j]):
            group[group == group[j]] = group[i]
    return group


def main() -> None:
    rows = [*read_jsonl(ROOT / "data/embedded/task_kinds.jsonl")]
    texts = np.array([row["prompt"][:READ] for row in rows], dtype=object)
    labels = np.array([row["category"] for row in rows])
    seeds = np.array([row["origin"].startswith("seed") for row in rows])
    groups = groups_of(list(texts))
    print(f"{len(rows)} prompts, {len(set(groups))} groups of prompts that resemble each other")
    right, per_kind = defaultdict(list), defaultdict(list)
    for split in range(SPLITS):
        predicted = np.empty(len(rows), dtype=object)
        for train, test in StratifiedGroupKFold(5, shuffle=True, random_state=split).split(texts, labels, groups):
            predicted[test] = pipeline().fit(texts[train], labels[train]).predict(texts[test])
        for name, part in (("all", np.ones(len(rows), bool)), ("seed tasks", seeds), ("written here", ~seeds)):
            right[name].append((predicted == labels)[part].mean())
        for kind in np.unique(labels):
            per_kind[kind].append((labels == kind)[predicted == kind].mean())
    head = ("", "accuracy, mean", "least", "most", "sd over splits", "prompts")
    print_table(
        f"{SPLITS} splits",
        head,
        [
            (name, float(np.mean(v)), min(v), max(v), float(np.std(v, ddof=1)), n)
            for (name, v), n in zip(right.items(), (len(rows), seeds.sum(), (~seeds).sum()), strict=True)
        ],
    )
    hits: dict[str, int] = defaultdict(int)
    passed: dict[str, int] = defaultdict(int)
    for split in range(NESTED):
        for train, test in StratifiedGroupKFold(5, shuffle=True, random_state=split).split(texts, labels, groups):
            classifier = fit_classifier(texts[train], labels[train], min_precision=MIN_PRECISION, seed=split)
            for kind, sure, truth in zip(*classifier.predict(texts[test]), labels[test], strict=True):
                passed[kind] += sure
                hits[kind] += sure and kind == truth
    table = []
    for kind in np.unique(labels):
        n, hit, of_kind = passed[kind] / NESTED, hits[kind] / NESTED, (labels == kind).sum()
        lower, upper = proportion_confint(hit, n, method="wilson") if n else (0.0, 1.0)
        table.append(
            (str(kind), float(np.mean(per_kind[kind])), hit / n if n else None, lower, upper, n, hit / of_kind)
        )
    columns = ("", "precision of all", "above the threshold", "lower", "upper", "rows a split", "recall")
    print_table(
        f"thresholds for a precision of {MIN_PRECISION}, chosen without the rows that are judged", columns, table
    )


if __name__ == "__main__":
    main()
