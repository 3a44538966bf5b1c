"""Read rows of data files. Trainers, checks and evaluations all use this reader.

JSONL, JSON arrays, CSV, TSV, Excel, Parquet, Arrow, plain or compressed (gz, bz2, xz, zst). A name is a file, a
glob, a directory of shards, or the output of `save_to_disk` of datasets. Rows are streamed: only one row (at most
64 MiB) or one batch of a table is in memory, whatever the unpacked size is.
"""

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.table_files import arrow_rows, excel_rows, parquet_rows
from data.text_files import as_dict, text_rows
from runtime.files import check_sums

TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TABLES = (".parquet", ".arrow", ".feather", ".xlsx")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# Columns that are lists in every published set. A text in them, as in a CSV, is their JSON.
LISTS = (
    "messages",
    "conversations",
    "conversation",
    "conversation_a",
    "conversation_b",
    "completions",
    "ranks",
    "tools",
)


def each_row(name: str) -> Iterator[tuple[str, Any]]:
    """("FILE:LINE", row) of every row of `name`. Tables and arrays count their rows from 1.

    A row is a dict, the text of a dict (see `as_object`), or a ValueError with the fault of the row.

    Raises:
        ValueError: there is no such file, its format is unknown, or it is damaged.
    """
    for path in find_files(name):
        check_sums(path.parent, [path.name])
        for number, row in _rows(path):
            yield f"{path}:{number}", row


def read_rows(name: str) -> Iterator[tuple[str, dict]]:
    """("FILE:LINE", row). Raises ValueError with the place if a row is malformed."""
    for where, raw in each_row(name):
        try:
            row = as_object(raw)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        yield where, row


def as_object(raw: Any) -> dict:
    """The row as a dict, from an item of `each_row`. Raises ValueError if it is not a JSON object or not valid text."""
    if isinstance(raw, ValueError):
        raise raw
    if isinstance(raw, str):
        try:
            twice: list[str] = []
            value = json.loads(raw, object_pairs_hook=lambda pairs: as_dict(pairs, twice))
            if twice:
                raise ValueError(twice[0])
            # half a surrogate pair is valid JSON, but not a text that can be written
            if "\\ud" in raw or "\\uD" in raw:
                json.dumps(value, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON, one object per line: {error.msg} at column {error.colno}") from error
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("unicode_escape").decode()
            raise ValueError(f"a text contains {half}, half of a surrogate pair, which is not a character") from error
        except RecursionError:
            raise ValueError("not JSON that can be read: nested too deeply") from None
    else:
        value = raw
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return _with_lists(value)


def _with_lists(row: dict) -> dict:
    """The row with lists in place of their JSON text, and of structs of lists, which datasets makes of them."""
    for name in LISTS:
        value = row.get(name)
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            try:
                row = row | {name: json.loads(value)}
            except json.JSONDecodeError as error:
                raise ValueError(f"{name} begins a list and is not JSON: {error.msg}") from None
        columns = list(value.values()) if isinstance(value, dict) else []
        if columns and all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
            row = row | {name: [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]}
    return row


def find_files(name: str) -> list[Path]:
    """The files of a name: the file itself, the matches of a glob, or the shards in a directory, sorted.

    Raises:
        ValueError: there is no file, or a directory has several splits or several formats.
    """
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _shards(path)
    found = sorted(Path(match) for match in glob.glob(name, recursive=True)) if glob.has_magic(name) else []
    files = [path for path in found if path.is_file()]
    if not files:
        raise ValueError(f"no data file {name!r} (current directory: {os.getcwd()})")
    return files


def _shards(directory: Path) -> list[Path]:
    if (directory / "dataset_dict.json").is_file():  # several sets, each saved in its own directory
        splits = json.loads((directory / "dataset_dict.json").read_text())["splits"]
        raise ValueError(f"{directory} has the splits {', '.join(splits)}; name one, e.g. {directory / splits[0]}")
    if (directory / "state.json").is_file():
        state = json.loads((directory / "state.json").read_text())
        return [directory / file["filename"] for file in state["_data_files"]]
    files = sorted(path for path in directory.rglob("*") if path.is_file() and _format(path) in (*TEXT, *TABLES))
    splits = {path.name.split("-")[0].split(".")[0] for path in files} & {"train", "test", "validation", "valid", "dev"}
    for kind, found in (("splits", splits), ("formats", {_format(path) for path in files})):
        if len(found) > 1:
            names = ", ".join(sorted(found))
            raise ValueError(f"{directory} has the {kind} {names}; name the files to read, for example with a glob")
    if not files:
        raise ValueError(f"{directory} has no file of a known format: {', '.join((*TEXT, *TABLES))}")
    return files


def _format(path: Path) -> str:
    """ ".jsonl" of a.jsonl and of a.jsonl.gz."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    kind, packed = _format(path), path.suffix.lower() in COMPRESSED
    if kind not in (*TEXT, *TABLES) or packed and kind in TABLES:
        known = ", ".join((*TEXT, *TABLES))
        raise ValueError(f"{path}: {path.suffix or 'a name without a suffix'} is not a known format ({known})")
    if kind == ".parquet":
        return parquet_rows(path)
    if kind in (".arrow", ".feather"):
        return arrow_rows(path)
    if kind == ".xlsx":
        return excel_rows(path)
    return text_rows(path, kind)
