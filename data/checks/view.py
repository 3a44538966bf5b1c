"""Rows of a set as the trainers read them, token by token: the first, longest, most cut, and named ones."""

from collections.abc import Callable, Iterator, Sequence
from heapq import nlargest
from pathlib import Path

from data import formats
from data.adapters import Layout
from data.records import BadRows, Record, read_records
from data.view import Side, show, trace
from runtime.config import check_choice, check_whole
from runtime.report import write_result

PARSERS: dict[str, Callable[[dict], Sequence[Record]]] = {
    "any": formats.any_record,
    "demonstrations": formats.examples,
    "preferences": formats.preferences,
    "prompts": formats.prompts,
}


def check_view(
    files: Sequence[str], directory: Path, *, tokenizer, layout: Layout, kind: str, rows: Sequence[int], num: int,
    max_length: int, max_prompt_length: int, on_bad_row: str,
) -> dict:  # fmt: skip
    """report.html, the same in the terminal, and result.json.

    Args:
        kind: how the rows are read; "any" = recognised from each row.
        rows: numbers of further rows (lines of a JSONL file) to show. num: rows of each sort.
    """
    check_choice("check.kind", kind, tuple(PARSERS))
    check_whole(1, check__num=num, check__max_length=max_length, check__max_prompt_length=max_prompt_length)
    bad_rows, limits = BadRows(on_bad_row), {"max_length": max_length, "max_prompt_length": max_prompt_length}

    def traced() -> Iterator[tuple[Record, list[Side]]]:
        for file in files:
            for record in read_records(file, PARSERS[kind], bad_rows, layout):
                with bad_rows.at(record.where):
                    yield record, trace(record, tokenizer, **limits)

    chosen: dict[str, list[tuple[Record, list[Side]]]] = {"first": [], "given": []}
    total = 0
    sizes: list[tuple[int, int, Record, list[Side]]] = []
    for record, sides in traced():
        total += 1
        length, cut = sum(len(side.tokens) for side in sides), sum(token.cut for side in sides for token in side.tokens)
        if total <= num:
            chosen["first"].append((record, sides))
        if int(record.where.rpartition(":")[2]) in rows:
            chosen["given"].append((record, sides))
        sizes = nlargest(num, [*sizes, (length, -total, record, sides)], key=lambda one: one[:2]) if length else sizes
        chosen["most cut"] = (
            nlargest(num, [*chosen.get("most cut", []), (record, sides)], key=_cut)
            if cut
            else chosen.get("most cut", [])
        )
    if not total:
        raise ValueError(f"no row of {', '.join(files)} can be shown: {bad_rows.why}")
    chosen["longest"] = [(record, sides) for _, _, record, sides in sizes]
    shown: dict[int, tuple[str, Record, list[Side]]] = {}
    for sort in ("given", "first", "longest", "most cut"):
        for record, sides in chosen.get(sort, []):
            shown.setdefault(id(record), (sort, record, sides))
    titled = [(f"{sort}: {record.where}", sides) for sort, record, sides in shown.values()]
    notes = [f"{total} rows of {', '.join(files)}; {bad_rows.counted}", f"cut at max_length={max_length}"]
    path = show(directory, "report", "Training rows", titled, notes)
    result = {"rows": total, "skipped_rows": bad_rows.skipped, "shown": [name for name, _ in titled]}
    result["verdicts"] = [f"{len(titled)} of {total} rows, {bad_rows.counted}; token by token: {path}"]
    write_result(directory, result)
    return result


def _cut(one: tuple[Record, list[Side]]) -> int:
    return sum(token.cut for side in one[1] for token in side.tokens)
