"""Find evaluation rows in the training data: the same prompt, a near duplicate, or a long shared span.

The compared prompts are all user messages of a row together, and each long one alone. So a question inside a
conversation and the later turns of a benchmark are found too. Spans of n words are searched in all texts of a row.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data.adapters import Layout
from data.checks.near import BASE, NearIndex, codes, normal, sketches, words
from data.checks.texts import TextRow, read_texts
from data.records import BadRows
from runtime.config import check_whole
from runtime.report import bullets, heading, table, write_page, write_result

BATCH = 500  # rows whose spans are hashed together
LISTED = 20  # number of matches of one kind that are listed for one evaluation row


def check_contamination(
    files: Sequence[str],
    against: Sequence[str],
    directory: Path,
    *,
    threshold: float,
    span_words: int,
    min_words: int,
    on_bad_row: str,
    layout: Layout | None = None,
) -> dict:
    """result.json and report.html: `exact`, `near`, `spans` count evaluation rows, each under its strongest kind.

    Args:
            threshold: near duplicates have at least this Jaccard similarity of words and word pairs.
            span_words: number of consecutive words that must be equal; 0 = no search for spans.
            min_words: shorter user messages are not compared alone.
    """
    check_whole(0, check__span_words=span_words, check__min_words=min_words)
    bad_rows = BadRows(on_bad_row)
    train, evaluation = read_texts(files, bad_rows, layout), read_texts(against, bad_rows)
    matches = find_copies(train, evaluation, threshold=threshold, min_words=min_words)
    found = {match["eval"] for match in matches}
    if span_words:
        rest = [row for row in evaluation if row.where not in found]
        matches += find_spans(train, rest, span_words)
    kinds = {kind: len({m["eval"] for m in matches if m["kind"] == kind}) for kind in ("exact", "near", "span")}
    share = sum(kinds.values()) / len(evaluation)
    result = {
        "exact": kinds["exact"],
        "near": kinds["near"],
        "spans": kinds["span"],
        "share": share,
        "train_rows": len(train),
        "eval_rows": len(evaluation),
        "matches": matches,
        "skipped_rows": bad_rows.skipped,
    }
    lines = [
        f"{kinds['exact']} of {len(evaluation)} evaluation prompts are in the training data, {kinds['near']} nearly, "
        f"{kinds['span']} more rows share {span_words} words in a row"
    ]
    rows = [["evaluation row", "training row", "kind", "similarity", "text"]]
    rows += [[m["eval"], m["train"], m["kind"], m["similarity"], m["text"][:120]] for m in matches[:200]]
    result["verdicts"] = lines
    blocks = [bullets(lines), heading("Matches (the first 200)"), table(rows)]
    write_page(directory / "report.html", "Contamination", *blocks)
    write_result(directory, result)
    return result


def find_copies(
    train: Sequence[TextRow], evaluation: Sequence[TextRow], *, threshold: float, min_words: int
) -> list[dict]:
    """Exact and near matches, at most `LISTED` of a kind per evaluation row.

    Near matches are left out if one is exact.
    """
    places: dict[str, list[int]] = {}
    written: dict[str, str] = {}
    for e, row in enumerate(evaluation):
        for text in row.questions(min_words):
            places.setdefault(normal(text), []).append(e)
            written.setdefault(normal(text), text)
    index, indexed = NearIndex(threshold), list(places)
    for sketch in sketches(indexed):
        index.add(sketch)

    open_rows = {"exact": places, "near": {text: list(rows) for text, rows in places.items()}}
    matches: dict[tuple[int, int], dict] = {}
    listed: Counter[tuple[str, int]] = Counter()
    for t, row in enumerate(train):
        texts = dict.fromkeys(map(normal, row.questions(min_words)))
        for text, sketch in zip(texts, sketches(list(texts)), strict=True):
            found = [("exact", text, 1.0)] if text in places else []
            found = found or [("near", indexed[i], similarity) for i, similarity in index.near(sketch)]
            for kind, other, similarity in found:
                rows = open_rows[kind][other]
                for e in rows:
                    if similarity > matches.get((t, e), {"similarity": 0.0})["similarity"]:
                        matches[t, e] = _match(kind, similarity, row, evaluation[e], written[other])
                        listed[kind, e] += 1
                # without this limit, a common prompt would cost rows x rows
                rows[:] = [e for e in rows if listed[kind, e] < LISTED]
    exact = {match["eval"] for match in matches.values() if match["kind"] == "exact"}
    return [m for m in matches.values() if m["kind"] == "exact" or m["eval"] not in exact]


def find_spans(train: Sequence[TextRow], evaluation: Sequence[TextRow], span_words: int) -> list[dict]:
    """For each evaluation row, the first training row that shares `span_words` words in a row with it."""
    parts = list(windows(evaluation, span_words))
    values, owners = (np.concatenate(part) for part in zip(*parts, strict=True)) if parts else (np.zeros(0),) * 2
    order = np.argsort(values, kind="stable")
    values, owners, found = values[order], owners[order], {}
    answered = np.zeros(len(values), dtype=bool)  # at the first place of a span: whether all its rows have a match
    for hashes, rows in windows(train, span_words) if len(values) else ():
        at = np.searchsorted(values, hashes).clip(max=len(values) - 1)
        hits = np.flatnonzero((values[at] == hashes) & ~answered[at])
        for place, t in zip(at[hits].tolist(), rows[hits].tolist(), strict=True):
            if answered[place]:
                continue
            end = np.searchsorted(values, values[place], side="right")
            waiting = {e for e in owners[place:end].tolist() if e not in found}
            for e in waiting:
                if text := shared_span(train[t], evaluation[e], span_words):
                    found[e] = _match("span", None, train[t], evaluation[e], text)
            answered[place] = waiting <= set(found)  # otherwise two spans have the same hash
    return [found[e] for e in sorted(found)]


def _match(kind: str, similarity: float | None, train: TextRow, evaluation: TextRow, text: str) -> dict:
    places = {"train": train.where, "eval": evaluation.where}
    return {"kind": kind, "similarity": similarity, **places, "text": text[:300]}


def _texts(row: TextRow) -> list[list[str]]:
    return [words(text) for text in (*(message["content"] for message in row.messages), *row.later_turns)]


def windows(rows: Sequence[TextRow], n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(64-bit polynomial hashes of every n consecutive words of a message, the row number of each)."""
    for start in range(0, len(rows), BATCH):
        texts = [(r, tokens) for r, row in enumerate(rows[start : start + BATCH], start) for tokens in _texts(row)]
        numbers = codes([word for _, tokens in texts for word in tokens])
        places = max(len(numbers) - n + 1, 0)
        hashes = np.zeros(places, dtype=np.uint64)
        for k in range(n):  # Horner, modulo 2^64
            hashes = hashes * BASE + numbers[k : k + places]
        lengths = [len(tokens) for _, tokens in texts]
        text, row = np.repeat(np.arange(len(texts)), lengths), np.repeat([r for r, _ in texts], lengths)
        within = text[:places] == text[len(text) - places :]  # a span does not cross two messages
        yield hashes[within], row[:places][within]


def shared_span(a: TextRow, b: TextRow, n: int) -> str:
    """The first shared span, compared word by word, because different spans may have the same hash."""
    spans = {tuple(tokens[i : i + n]) for tokens in _texts(b) for i in range(len(tokens) - n + 1)}
    for tokens in _texts(a):
        for i in range(len(tokens) - n + 1):
            if tuple(tokens[i : i + n]) in spans:
                return " ".join(tokens[i : i + n])
    return ""
