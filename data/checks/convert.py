"""Convert files of any known format to our JSONL. Each row gets its origin and its license."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data import formats
from data.adapters import FORMATS, Layout, adapted_rows
from data.files import as_object, each_row
from data.records import BadRows, split_name, split_of, write_jsonl
from runtime.report import bullets, table, write_page, write_result


def check_convert(
    files: Sequence[str], directory: Path, *, layout: Layout, license: str | None, on_bad_row: str
) -> dict:
    """converted.jsonl, written row by row, result.json and report.html.

    Args:
        license: the license of rows that do not name their own.
    Raises:
        ValueError: a row has no license, and `license` is None.
    """
    bad_rows = BadRows(on_bad_row)
    counts: Counter[tuple[str, str]] = Counter()

    def rows() -> Iterator[dict]:
        for file in files:
            path, part = split_name(file)
            current = [""]  # format of the last row that was read

            def noted(raw_rows: Iterator[tuple[str, Any]], current=current) -> Iterator[tuple[str, Any]]:
                for where, raw in raw_rows:
                    if isinstance(raw, dict | str):
                        current[0] = _name(raw, layout)
                    yield where, raw

            for where, row in adapted_rows(noted(each_row(path)), layout, bad_rows.at):
                if row is None:
                    bad_rows.left_out.append(where)
                    continue
                with bad_rows.at(where):
                    for record in formats.any_record(row):
                        if part in (None, split_of(record, row)):
                            counts[current[0], type(record).__name__] += 1
                            yield _with_origin(formats.as_row(record), where, current[0], license)

    written = write_jsonl(directory / "converted.jsonl", rows())
    if not written:
        (directory / "converted.jsonl").unlink()
        raise ValueError(f"no row of {', '.join(files)} can be used: {bad_rows.why}")
    kinds = [{"format": name, "kind": kind, "rows": n} for (name, kind), n in sorted(counts.items())]
    lines = [f"converted.jsonl: {written} rows, {bad_rows.counted}"]
    result = {"rows": written, "formats": kinds, "skipped_rows": bad_rows.skipped, "verdicts": lines}
    cells: list[list] = [["format", "kind", "rows"], *(list(kind.values()) for kind in kinds)]
    write_page(directory / "report.html", "Converted", bullets(lines), table(cells))
    write_result(directory, result)
    return result


def _name(raw: Any, layout: Layout) -> str:
    try:
        return layout.name_of(layout.renamed(as_object(raw)))
    except ValueError:  # adapted_rows raises it again with its place
        return ""


def _with_origin(row: dict, where: str, name: str, license: str | None) -> dict:
    """The row with its origin and its license."""
    row_license = row.get("license") or license
    if row_license is None:
        of_set = f"; the original set in this schema has the license {FORMATS[name].license}" if name in FORMATS else ""
        raise ValueError(f"the row names no license: set check.license=NAME{of_set}")
    try:
        json.dumps(row, allow_nan=False)
    except ValueError:
        raise ValueError("a value is NaN or infinite, which JSON has no word for; write null") from None
    source = FORMATS[name].source if name in FORMATS else None
    origin = {"file": where, "format": name} | ({"schema": source} if source else {})
    return row | {"license": row_license, "provenance": row.get("provenance", origin)}
