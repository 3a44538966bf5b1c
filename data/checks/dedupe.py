"""Remove duplicates: of equal or nearly equal rows, within a file and across files, the first one is kept."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.adapters import Layout
from data.checks.near import NearIndex, normal, sketches
from data.checks.texts import TextRow, read_texts
from data.records import BadRows, split_name, write_jsonl
from runtime.config import check_choice
from runtime.report import bullets, heading, table, write_page, write_result


def check_dedupe(
    files: Sequence[str], directory: Path, *, by: str, threshold: float, layout: Layout | None = None, on_bad_row: str
) -> dict:
    """NAME.jsonl of each file without its repeats, pairs.jsonl (both texts of each match), result.json, report.html.

    Args:
            by: "conversation" (all texts; of a comparison, those with the better answer) or "prompt".
            threshold: near duplicates have at least this Jaccard similarity of words and word pairs; see `NearIndex`.
    """
    check_choice("check.by", by, ("conversation", "prompt"))
    bad_rows, index = BadRows(on_bad_row), NearIndex(threshold)
    kept: list[tuple[str, str]] = []
    counts: Counter[tuple[str, str]] = Counter()
    exact: dict[str, int] = {}
    names = output_names(files)

    def unique(rows: Sequence[TextRow], pairs: list[dict], file: str) -> Iterator[dict]:
        texts = [normal(text_of(row, by)) for row in rows]
        for row, sketch in zip(rows, sketches(texts), strict=True):
            first = exact.get(sketch.text)
            near = [] if first is not None else index.near(sketch)
            if first is None and not near:
                exact[sketch.text] = len(kept)
                index.add(sketch)
                kept.append((row.where, text_of(row, by)))
                counts[file, "kept"] += 1
                yield row.raw
                continue
            kind, (at, similarity) = ("exact", (first, 1.0)) if first is not None else ("near", near[0])
            counts[file, kind] += 1
            where, text = kept[at]
            match = {"kind": kind, "similarity": similarity, "row": row.where, "repeats": where}
            pairs.append(match | {"text": text_of(row, by), "of": text})

    pairs: list[dict] = []
    for file, name in names.items():
        write_jsonl(directory / name, unique(read_texts([file], bad_rows, layout), pairs, file))
    write_jsonl(directory / "pairs.jsonl", pairs)
    table_rows: list[list] = [["file", "kept", "exact repeats", "near repeats", "written"]]
    table_rows += [[f, *(counts[f, kind] for kind in ("kept", "exact", "near")), n] for f, n in names.items()]
    total = {kind: sum(counts[file, kind] for file in names) for kind in ("kept", "exact", "near")}
    lines = [
        f"{total['kept']} rows are kept; {total['exact']} repeat another one, {total['near']} nearly: see pairs.jsonl"
    ]
    result = total | {"files": names, "skipped_rows": bad_rows.skipped, "verdicts": lines}
    show_pairs(directory, "Repeats", result, table_rows, pairs)
    return result


def text_of(row: TextRow, by: str) -> str:
    """The text by which rows are compared."""
    return row.prompt if by == "prompt" else "\n".join(message["content"] for message in row.messages)


def output_names(files: Sequence[str]) -> dict[str, str]:
    """FILE -> NAME.jsonl to write. Raises ValueError if two files would get the same name."""
    names = {file: Path(split_name(file)[0].rstrip("/")).name.split(".")[0].replace("*", "_") for file in files}
    if len(set(names.values())) < len(files):
        raise ValueError(f"output files have the names of the input files, and two names are equal: {', '.join(files)}")
    return {file: f"{name}.jsonl" for file, name in names.items()}


def show_pairs(directory: Path, title: str, result: dict, counts: list[list], pairs: Sequence[dict]) -> None:
    """Write result.json, and a page with the counts and the first matches, with both texts side by side."""
    rows = [["kind", "similarity", "row", "what it repeats"]]
    for pair in pairs[:100]:
        texts = (f"{pair[place]}: {pair[name][:200]}" for place, name in (("row", "text"), ("repeats", "of")))
        rows.append([pair["kind"], pair["similarity"], *texts])
    blocks = [bullets(result["verdicts"]), table(counts), heading("Matches (the first 100)"), table(rows)]
    write_page(directory / "report.html", title, *blocks)
    write_result(directory, result)
