"""Which kind of task a prompt is: words, word pairs, letters and the prompt's form, under logistic regression.

A task is named at the beginning ("Summarize ...", "Given the passage, ..."), and what follows is material. So the first
paragraph is read by itself, as words, as pieces of words and as its first three words, beside some plain facts of form.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer
from statsmodels.stats.proportion import proportion_confint

FOLDS = 5
MIN_JUDGED = 5  # labelled prompts above a threshold, at least
_CODE = re.compile(
    r"\b(def|return|import|python|java|javascript|sql|code|function|regex|regular expression|script|html|program"
    r"|algorithm|equation|solve|calculate|compute|bash|latex|bug)\b|[{}<>;=]",
    re.IGNORECASE,
)
_FORM = (  # of the first paragraph
    re.compile(
        r"^(what|who|whom|whose|when|where|why|how|which|is|are|was|were|do|does|did|can|could|should|would|will"
        r"|has|have)\b",
        re.IGNORECASE,
    ),
    re.compile(r"\b(I|my|me|I'm)\b"),
    re.compile(r"\b(you|your)\b", re.IGNORECASE),
    re.compile(r"^(hi|hello|hey|good (morning|evening))\b", re.IGNORECASE),
    re.compile(r"\b(given|following|below|this|these|above)\b", re.IGNORECASE),
    re.compile(r"\bor\b"),
    re.compile(r"\b(text|passage|paragraph|article|sentence|document|email|review)\b", re.IGNORECASE),
    re.compile(r"question", re.IGNORECASE),
    re.compile(r"\?\s*$"),
    re.compile(r":\s*$"),
)


@dataclass(frozen=True)
class Classifier:
    """A fitted classifier, and what its labelled prompts say of it when each is judged by a fit without it."""

    model: Pipeline
    accuracy: float
    thresholds: dict[str, dict]  # kind -> threshold, precision (lower: of its 95 % interval), recall, n

    def predict(self, texts: Sequence[str]) -> tuple[list[str], list[bool]]:
        """(kinds, whether each is at or above its kind's threshold)."""
        chances = self.model.predict_proba(texts)  # (N, kinds)
        kinds = [str(kind) for kind in self.model.classes_[chances.argmax(1)]]
        limits = [self.thresholds[kind]["threshold"] for kind in kinds]
        sure = [limit is not None and p >= limit for p, limit in zip(chances.max(1), limits, strict=True)]
        return kinds, sure


def fit_classifier(texts: Sequence[str], names: Sequence[str], *, min_precision: float, seed: int) -> Classifier:
    """The classifier of labelled prompts; a kind's threshold is the lowest that gives it `min_precision`."""
    labels = np.array(names)
    folds = StratifiedKFold(min(FOLDS, min(np.unique(labels, return_counts=True)[1])), shuffle=True, random_state=seed)
    chances = cross_val_predict(pipeline(), list(texts), labels, cv=folds, method="predict_proba")
    model = pipeline().fit(list(texts), labels)
    predicted = model.classes_[chances.argmax(1)]
    thresholds = {
        str(kind): _threshold(
            chances.max(1)[predicted == kind], labels[predicted == kind] == kind, (labels == kind).sum(), min_precision
        )
        for kind in model.classes_
    }
    return Classifier(model, float((predicted == labels).mean()), thresholds)


def _threshold(chances: np.ndarray, right: np.ndarray, of_kind: int, min_precision: float) -> dict:
    """The lowest chance at and above which the share of right ones is `min_precision`; None where there is none."""
    order = np.argsort(-chances, kind="stable")
    precision = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    good = np.flatnonzero((precision >= min_precision) & (np.arange(1, len(order) + 1) >= MIN_JUDGED))
    n = int(good[-1]) + 1 if len(good) else len(order)
    hits = int(right[order[:n]].sum())
    lower = float(proportion_confint(hits, n, method="wilson")[0]) if n else 0.0
    found = {"precision": hits / max(n, 1), "lower": lower, "recall": hits / int(of_kind), "n": n}
    return {"threshold": float(chances[order[n - 1]]) if len(good) else None, **found}


def pipeline() -> Pipeline:
    """The classifier before it is fitted: words, parts of words, first words and form, under logistic regression."""
    words = {"sublinear_tf": True, "token_pattern": r"\w+|[?:{}=<>]"}
    return make_pipeline(
        make_union(
            make_pipeline(FunctionTransformer(_heads), TfidfVectorizer(ngram_range=(1, 2), **words)),
            make_pipeline(FunctionTransformer(_beginnings), TfidfVectorizer(**words)),
            make_pipeline(
                FunctionTransformer(_heads), TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
            ),
            make_pipeline(FunctionTransformer(_first_words), TfidfVectorizer(ngram_range=(1, 3), token_pattern=r"\w+")),
            FunctionTransformer(_form),
        ),
        LogisticRegression(C=10.0, class_weight="balanced", max_iter=2000),
    )


def _head(text: str) -> str:
    return text.strip().split("\n")[0]


def _heads(texts: Sequence[str]) -> list[str]:
    return [_head(text) for text in texts]


def _beginnings(texts: Sequence[str]) -> list[str]:
    return [text[:400] for text in texts]


def _first_words(texts: Sequence[str]) -> list[str]:
    return [" ".join(re.findall(r"\w+", _head(text).lower())[:3]) for text in texts]


def _form(texts: Sequence[str]) -> np.ndarray:
    """(N, F) facts of form, each from 0 to about 1."""
    rows = []
    for text in texts:
        head = _head(text)
        rest, marks = text.strip()[len(head) :], len(_CODE.findall(text))
        plain = [bool(rest), "?" in text, marks > 0, marks > 2, bool(re.search(r"\d", text)), len(text) < 60]
        lengths = [np.log1p(len(rest.split())) / 3, np.log1p(len(head.split())) / 2]
        rows.append([*plain, *lengths, *(bool(pattern.search(head)) for pattern in _FORM)])
    return 0.5 * np.array(rows, dtype=float)
