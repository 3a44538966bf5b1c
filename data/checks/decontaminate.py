"""Remove contaminated training rows: rows with a prompt, a near duplicate or a long span of an evaluation set."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data.adapters import Layout
from data.checks.contamination import shared_span, windows
from data.checks.dedupe import output_names, show_pairs
from data.checks.near import NearIndex, normal, sketches
from data.checks.texts import TextRow, read_texts
from data.records import BadRows, write_jsonl
from runtime.config import check_whole

KINDS = ("kept", "exact", "near", "span")


def check_decontaminate(
    files: Sequence[str],
    against: Sequence[str],
    directory: Path,
    *,
    threshold: float,
    span_words: int,
    min_words: int,
    layout: Layout | None = None,
    on_bad_row: str,
) -> dict:
    """NAME.jsonl of each file without its contaminated rows, pairs.jsonl (both texts), result.json, report.html.

    Every training row that matches an evaluation row is removed. (`check=contamination` lists only a few per row.)

    Args:
        threshold, span_words, min_words: as in check=contamination.
    """
    check_whole(0, check__span_words=span_words, check__min_words=min_words)
    bad_rows, names = BadRows(on_bad_row), output_names(files)
    counts: Counter = Counter()
    evaluation = read_texts(against, bad_rows)
    prompts: dict[str, tuple[TextRow, str]] = {}  # prompt of an evaluation row -> (the row, its original text)
    for row in evaluation:
        for text in row.questions(min_words):
            prompts.setdefault(normal(text), (row, text))
    asked, index = list(prompts.values()), NearIndex(threshold)
    for sketch in sketches(prompts):
        index.add(sketch)
    spans = _Spans(evaluation, span_words)
    pairs: list[dict] = []

    def clean(file: str) -> Iterator[dict]:
        rows = read_texts([file], bad_rows, layout)
        suspects = spans.suspects(rows)
        for at, row in enumerate(rows):
            match = _copied(row, prompts, asked, index, min_words) or spans.match(row, suspects.get(at, ()))
            if match is None:
                counts[file, "kept"] += 1
                yield row.raw
                continue
            kind, similarity, text, other, of = match
            counts[file, kind] += 1
            pair = {"kind": kind, "similarity": similarity, "row": row.where, "repeats": other.where}
            pairs.append(pair | {"text": text, "of": of})

    for file, name in names.items():
        write_jsonl(directory / name, clean(file))
    write_jsonl(directory / "pairs.jsonl", pairs)
    table_rows: list[list] = [["file", *KINDS, "written"]]
    table_rows += [[f, *(counts[f, kind] for kind in KINDS), n] for f, n in names.items()]
    total = {kind: sum(counts[file, kind] for file in names) for kind in KINDS}
    lines = [
        f"{total['kept']} rows are kept; {total['exact']} have the prompt of an evaluation row, {total['near']} "
        f"nearly, {total['span']} share {span_words} consecutive words with one: see pairs.jsonl"
    ]
    result = total | {"files": names, "eval_rows": len(evaluation), "skipped_rows": bad_rows.skipped, "verdicts": lines}
    show_pairs(directory, "Decontaminated", result, table_rows, pairs)
    return result


def _copied(
    row: TextRow,
    prompts: dict[str, tuple[TextRow, str]],
    asked: list[tuple[TextRow, str]],
    index: NearIndex,
    min_words: int,
) -> tuple | None:
    """(kind, similarity, text, evaluation row, its text) of the strongest match of a row's prompts."""
    questions, best = row.questions(min_words), None
    for text, sketch in zip(questions, sketches(map(normal, questions)), strict=True):
        if sketch.text in prompts:
            return "exact", 1.0, text, *prompts[sketch.text]
        for at, similarity in index.near(sketch)[:1]:
            if best is None or similarity > best[1]:
                best = "near", similarity, text, *asked[at]
    return best


class _Spans:
    """Every n consecutive words of the evaluation rows, by their hashes."""

    def __init__(self, evaluation: Sequence[TextRow], n: int):
        self.evaluation, self.n = evaluation, n
        parts = list(windows(evaluation, n)) if n else []
        hashes, owners = (np.concatenate(part) for part in zip(*parts, strict=True)) if parts else (np.zeros(0),) * 2
        order = np.argsort(hashes, kind="stable")
        self.hashes, self.owners = hashes[order], owners[order]

    def suspects(self, rows: Sequence[TextRow]) -> dict[int, list[int]]:
        """For each row, the evaluation rows with a span of the same hash. `match` compares the words."""
        found: dict[int, list[int]] = {}
        for hashes, at in windows(rows, self.n) if len(self.hashes) else ():
            place = np.searchsorted(self.hashes, hashes).clip(max=len(self.hashes) - 1)
            hits = self.hashes[place] == hashes
            for row, owner in zip(at[hits].tolist(), self.owners[place[hits]].tolist(), strict=True):
                found.setdefault(row, []).append(owner)
        return {row: list(dict.fromkeys(owners)) for row, owners in found.items()}

    def match(self, row: TextRow, owners: Sequence[int]) -> tuple | None:
        for owner in owners:
            if text := shared_span(row, self.evaluation[owner], self.n):
                return "span", None, text, self.evaluation[owner], text
        return None
