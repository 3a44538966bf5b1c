"""Which evaluation rows the training data has already shown: the same prompt, nearly the same, or a shared long span.

Prompts are compared: the user's messages of a row together, and of a training row each longer one alone, so that an
evaluation prompt inside a conversation is found. Spans of n words are looked for in everything that a row says.
"""

import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.checks.near import NearIndex, normal, sketches
from data.checks.report import write_page, write_result
from data.checks.texts import Row, read_rows
from data.methods.filters import words
from data.records import BadRows

LISTED = 20  # matches of a kind that are listed for one evaluation row
_BASE = np.uint64(0x9E3779B97F4A7C15)


def check_contamination(
    files: Sequence[str], against: Sequence[str], directory: Path, *, threshold: float, span_words: int, min_words: int,
    on_bad_row: str,
) -> dict:  # fmt: skip
    """result.json and report.html: `exact`, `near`, `spans` count evaluation rows, each under its strongest kind.

    Args:
        threshold: Jaccard similarity of words and word pairs from which prompts are near duplicates.
        span_words: words in a row that must be the same; 0 = don't look for spans.
        min_words: of a later user message that is compared alone.
    Raises:
        ValueError: no file on a side, a bad row, or the same file on both sides.
    """
    if not files or not against:
        raise ValueError("check=contamination compares check.input=[TRAIN FILES] with check.against=[EVALUATION FILES]")
    bad_rows = BadRows(on_bad_row)
    train, evaluation = read_rows(files, bad_rows), read_rows(against, bad_rows)
    matches = find_copies(train, evaluation, threshold=threshold, min_words=min_words)
    found = {match["eval"] for match in matches}
    if span_words:
        rest = [row for row in evaluation if row.where not in found]
        matches += find_spans(train, rest, span_words)
    kinds = {kind: len({m["eval"] for m in matches if m["kind"] == kind}) for kind in ("exact", "near", "span")}
    share = sum(kinds.values()) / len(evaluation)
    result = {
        "exact": kinds["exact"], "near": kinds["near"], "spans": kinds["span"], "share": share,
        "train_rows": len(train), "eval_rows": len(evaluation), "matches": matches, "skipped_rows": bad_rows.skipped,
    }  # fmt: skip
    lines = [
        f"{kinds['exact']} of {len(evaluation)} evaluation prompts are in the training data, {kinds['near']} nearly, "
        f"{kinds['span']} more rows share {span_words} words in a row"
    ]
    table = [["evaluation row", "training row", "kind", "similarity", "text"]]
    table += [[m["eval"], m["train"], m["kind"], m["similarity"], m["text"][:120]] for m in matches[:200]]
    result["verdicts"] = lines
    write_page(directory, "Contamination", lines, {"Matches (the first 200)": table}, [])
    write_result(directory, result)
    return result


def find_copies(train: Sequence[Row], evaluation: Sequence[Row], *, threshold: float, min_words: int) -> list[dict]:
    """Exact and near matches, at most `LISTED` of a kind for an evaluation row; an exact one hides its near ones."""
    places: dict[str, list[int]] = {}
    for e, row in enumerate(evaluation):
        places.setdefault(normal(row.prompt), []).append(e)
    index, indexed = NearIndex(threshold), list(places)
    for grams, sketch in sketches(indexed):
        index.add(grams, sketch)

    open_rows = {"exact": places, "near": {text: list(rows) for text, rows in places.items()}}
    listed, matches = Counter(), {}
    for t, row in enumerate(train):
        texts = dict.fromkeys([normal(row.prompt), *(normal(m) for m in row.asked if len(m.split()) >= min_words)])
        for text, (grams, sketch) in zip(texts, sketches(list(texts)), strict=True):
            found = [("exact", text, 1.0)] if text in places else []
            found = found or [("near", indexed[i], similarity) for i, similarity in index.near(grams, sketch)]
            for kind, other, similarity in found:
                rows = open_rows[kind][other]
                for e in rows:
                    if similarity > matches.get((t, e), {"similarity": 0.0})["similarity"]:
                        matches[t, e] = _match(kind, similarity, row, evaluation[e], evaluation[e].prompt)
                        listed[kind, e] += 1
                rows[:] = [e for e in rows if listed[kind, e] < LISTED]  # or a common prompt costs rows x rows
    exact = {match["eval"] for match in matches.values() if match["kind"] == "exact"}
    return [m for m in matches.values() if m["kind"] == "exact" or m["eval"] not in exact]


def find_spans(train: Sequence[Row], evaluation: Sequence[Row], span_words: int) -> list[dict]:
    """For each evaluation row the first training row that shares `span_words` words in a row with it."""
    owners: dict[int, list[int]] = defaultdict(list)
    for e, row in enumerate(evaluation):
        for value in np.unique(_windows(row, span_words)).tolist():
            owners[value].append(e)
    known, found = np.array(sorted(owners), dtype=np.uint64), {}
    for row in train:
        for value in np.intersect1d(_windows(row, span_words), known).tolist():
            rest = []
            for e in owners[value]:
                if e not in found and (text := _shared(row, evaluation[e], span_words)):
                    found[e] = _match("span", None, row, evaluation[e], text)
                elif e not in found:
                    rest.append(e)  # two spans with one hash
            owners[value] = rest  # an answered span is not looked at again
    return [found[e] for e in sorted(found)]


def _match(kind: str, similarity: float | None, train: Row, evaluation: Row, text: str) -> dict:
    places = {"train": train.where, "eval": evaluation.where}
    return {"kind": kind, "similarity": similarity, **places, "text": text[:300]}


def _texts(row: Row) -> list[list[str]]:
    return [words(message["content"]) for message in row.messages]


def _windows(row: Row, n: int) -> np.ndarray:
    """64-bit polynomial hashes of every n words in a row of each message."""
    found = []
    for tokens in _texts(row):
        if len(tokens) >= n:
            codes = np.array([zlib.crc32(token.encode()) for token in tokens], dtype=np.uint64)
            hashed = np.zeros(len(codes) - n + 1, dtype=np.uint64)
            for k in range(n):  # Horner, modulo 2^64
                hashed = hashed * _BASE + codes[k : k + len(hashed)]
            found.append(hashed)
    return np.concatenate(found) if found else np.zeros(0, dtype=np.uint64)


def _shared(a: Row, b: Row, n: int) -> str:
    """The first shared span, word for word: a hash alone proves nothing."""
    spans = {tuple(tokens[i : i + n]) for tokens in _texts(b) for i in range(len(tokens) - n + 1)}
    for tokens in _texts(a):
        for i in range(len(tokens) - n + 1):
            if tuple(tokens[i : i + n]) in spans:
                return " ".join(tokens[i : i + n])
    return ""
