"""A bag of words on the sets on which reward models are evaluated: the same splits, the same records.

    python experiments/bag_of_words.py

It is a logistic regression on counts of words and word pairs of the completion, and once also of the context
(scikit-learn). The features of a comparison are the difference of its sides. The strength of regularisation is the best
of four on the held-out part, which favours the bag of words. Rows of one dialogue are on both sides of a split by
context, so the context's words also identify the dialogue.
"""

import sys
from pathlib import Path

from scipy.sparse import hstack, vstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from data import formats  # noqa: E402
from data.records import BadRows, read_records  # noqa: E402

STRENGTHS = (0.001, 0.01, 0.1, 1.0)


def read(name: str) -> list:
    return read_records(ROOT / "data" / "embedded" / name, formats.preferences, BadRows("error"))


def rated_auc(name: str, *, context: bool) -> tuple[float, int]:
    """AUC on the held-out tenth of a file of rated completions, and its size; optionally with the context's words."""
    train, held_out = read(f"{name}@train"), read(f"{name}@eval")
    views = [lambda r: r.completion, *([lambda r: " ".join(m["content"] for m in r.prompt)] if context else [])]
    columns = []
    for view in views:
        vectorizer = CountVectorizer(ngram_range=(1, 2), min_df=2).fit(map(view, train))
        columns.append([vectorizer.transform(map(view, rows)) for rows in (train, held_out)])
    counts, held_counts = (hstack(parts, format="csr") for parts in zip(*columns, strict=True))
    good, held_good = [r.reward > 0.5 for r in train], [r.reward > 0.5 for r in held_out]
    fits = (LogisticRegression(C=c, max_iter=2000).fit(counts, good) for c in STRENGTHS)
    return max(roc_auc_score(held_good, fit.decision_function(held_counts)) for fit in fits), len(held_out)


def num_of_known_dialogues(name: str) -> int:
    """Held-out rows whose context begins a training row, or continues one of at least four messages."""
    train, held_out = ([[str(m) for m in r.prompt] for r in read(f"{name}@{part}")] for part in ("train", "eval"))
    beginnings = {tuple(messages[:i]) for messages in train for i in range(1, len(messages) + 1)}
    wholes = {tuple(messages) for messages in train if len(messages) >= 4}
    return sum(tuple(m) in beginnings or any(tuple(m[:i]) in wholes for i in range(4, len(m) + 1)) for m in held_out)


def pair_accuracy(train: list, held_out: list) -> tuple[float, int]:
    """Share of held-out pairs that are ranked correctly, and their number."""
    vectorizer = CountVectorizer(ngram_range=(1, 2), min_df=2).fit([t for r in train for t in (r.chosen, r.rejected)])
    differences, held_differences = (
        vectorizer.transform([r.chosen for r in rows]) - vectorizer.transform([r.rejected for r in rows])
        for rows in (train, held_out)
    )
    both, labels = vstack([differences, -differences]), [1] * len(train) + [0] * len(train)
    fits = (LogisticRegression(C=c, fit_intercept=False, max_iter=2000).fit(both, labels) for c in STRENGTHS)
    return max((fit.decision_function(held_differences) > 0).mean() for fit in fits), len(held_out)


def main() -> None:
    for name in ("reward_movie_train", "reward_coffee_train"):
        for context in (False, True):
            auc, n = rated_auc(f"{name}.jsonl.gz", context=context)
            print(f"{name}: AUC {auc:.3f} on {n} held-out completions{', context read too' if context else ''}")
        print(f"{name}: {num_of_known_dialogues(f'{name}.jsonl.gz')} of them from dialogues of the training set")
    pairs = {"pref_hh_helpful": [read(f"pref_hh_helpful_{part}.jsonl.gz") for part in ("train", "test")]}
    pairs["pref_coffee"] = [read(f"pref_coffee_train.jsonl.gz@{part}") for part in ("train", "eval")]
    for name, (train, held_out) in pairs.items():
        accuracy, n = pair_accuracy(train, held_out)
        print(f"{name}: accuracy {accuracy:.3f} on {n} held-out pairs")


if __name__ == "__main__":
    main()
