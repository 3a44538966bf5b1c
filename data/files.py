"""Read rows of data files. Trainers, checks and evaluations all use this reader.

JSONL, JSON arrays, CSV, TSV, Excel, Parquet, Arrow, plain or compressed (gz, bz2, xz, zst). A name is a file, a
glob, a directory of shards, or the output of `save_to_disk` of datasets. Rows are streamed: only one row (at most
`MAX_ROW` bytes) or one batch of a table is in memory, whatever the unpacked size is.
"""

import base64
import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

from runtime.files import check_sums

TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TABLES = (".parquet", ".arrow", ".feather", ".xlsx")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
MAX_ROW = 1 << 26  # 64 MiB; a longer line means another format or a malicious file
MAX_EXCEL = 1 << 30  # limit in bytes of an unpacked workbook, because openpyxl keeps its table of texts in memory
MAX_WINDOW = 1 << 28  # limit in bytes of the memory that an .xz may need
BATCH = 1024  # rows of a table in memory
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

csv.field_size_limit(MAX_ROW)


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
            value = json.loads(raw, object_pairs_hook=lambda pairs: _once(pairs, twice))
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


def _once(pairs: list[tuple[str, Any]], twice: list[str]) -> dict:
    """An object of JSON. A key that it has twice, of which json would keep the last, is added to `twice` as a fault."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice.append(f"an object has a key twice: {', '.join(name for name, _ in pairs)}")
    return found


def _with_lists(row: dict) -> dict:
    """The row with lists in place of their JSON text."""
    for name in LISTS:
        value = row.get(name)
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            try:
                row = row | {name: json.loads(value)}
            except json.JSONDecodeError as error:
                raise ValueError(f"{name} begins a list and is not JSON: {error.msg}") from None
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
        return _parquet_rows(path)
    if kind in (".arrow", ".feather"):
        return _arrow_rows(path)
    if kind == ".xlsx":
        return _excel_rows(path)
    return _text_rows(path, kind)


# ---- text


def _text_rows(path: Path, kind: str) -> Iterator[tuple[int, Any]]:
    at = [0]  # number of rows read so far, for the error message
    try:
        with _unpacked(path) as file:
            if file.peek(3)[:3] == b"\xef\xbb\xbf":  # files of Windows tools may begin with a byte order mark
                file.read(3)
            if kind in (".csv", ".tsv"):
                rows = _table_rows(
                    io.TextIOWrapper(file, encoding="utf-8", newline=""), "," if kind == ".csv" else "\t"
                )
            elif kind == ".json" and file.peek(1)[:1024].lstrip()[:1] == b"[":
                rows = _array_rows(path, io.TextIOWrapper(file, encoding="utf-8"))
            else:
                rows = _lines(file)
            for number, row in rows:
                at[0] = number
                yield number, row
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}:{at[0] + 1}: the file is not UTF-8 ({error}); convert it, for example with iconv"
        ) from error
    except (EOFError, OSError, zlib.error, lzma.LZMAError, csv.Error) as error:
        raise ValueError(f"{path}:{at[0] + 1}: the file is damaged or not {path.suffix}: {error}") from error


@contextmanager
def _unpacked(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file that may be compressed, as a buffered stream."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        raw = io.BufferedReader(_pyarrow(path).input_stream(str(path), compression="zstd"))
    elif suffix == ".xz":
        raw = io.BufferedReader(_XZ(path))
    else:
        openers: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open}
        raw = openers.get(suffix, open)(path, "rb")
    with raw as file:
        yield file if hasattr(file, "peek") else io.BufferedReader(file)


class _XZ(io.RawIOBase):
    """An .xz stream with a memory limit of `MAX_WINDOW` bytes. lzma.open has no limit."""

    def __init__(self, path: Path):
        self.file = path.open("rb")
        self.decoder: lzma.LZMADecompressor | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while True:
            if self.decoder is None or self.decoder.eof:  # the beginning of the next stream, or the end
                rest = self.decoder.unused_data if self.decoder else b""
                rest = rest or self.file.read(1 << 16)
                if not rest.strip(b"\0") and self.decoder:
                    return 0
                self.decoder = lzma.LZMADecompressor(memlimit=MAX_WINDOW)
            else:
                rest = self.file.read(1 << 16) if self.decoder.needs_input else b""
                if self.decoder.needs_input and not rest:
                    raise EOFError("it ends before the compressed stream does")
            if data := self.decoder.decompress(rest, max_length=len(buffer)):
                buffer[: len(data)] = data
                return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def _lines(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """(line number from 1, text). Blank lines are skipped."""
    number = 0
    while line := file.readline(MAX_ROW):
        number += 1
        if len(line) == MAX_ROW and not line.endswith(b"\n"):
            raise EOFError(f"a line of more than {MAX_ROW >> 20} MiB")
        if line.strip():
            yield number, line.decode("utf-8")


def _array_rows(path: Path, file: io.TextIOBase) -> Iterator[tuple[int, Any]]:
    """(number from 1, element) of a JSON array, one element in memory at a time."""
    twice: list[str] = []  # the faults of this element that json would not notice
    decoder = json.JSONDecoder(object_pairs_hook=lambda pairs: _once(pairs, twice))
    text, number, step = file.read(1 << 16).lstrip()[1:], 0, 1 << 16
    while True:
        twice.clear()
        text = text.lstrip()
        if number and text[:1] == ",":
            text = text[1:].lstrip()
        if text[:1] == "]":
            if (text[1:] + file.read(1 << 10)).strip():
                raise ValueError(
                    f"{path}: there is text after the end of the array; name the file .jsonl if it has one object "
                    "per line"
                )
            return
        try:
            value, end = decoder.raw_decode(text)
            if end == len(text):  # a number may continue
                raise json.JSONDecodeError("more to come", text, end)
        except json.JSONDecodeError as error:
            more = file.read(step)
            if not more or len(text) > MAX_ROW:
                raise ValueError(f"{path}: element {number + 1} of the array is not JSON: {error.msg}") from error
            text, step = (
                text + more,
                step * 2,
            )  # the buffer doubles each time, so that a long element is not parsed many times
            continue
        except RecursionError:
            raise ValueError(f"{path}: element {number + 1} of the array is nested too deeply") from None
        number, text, step = number + 1, text[end:], 1 << 16
        yield number, ValueError(twice[0]) if twice else _checked(value)


def _checked(value: Any) -> Any:
    """The element, or a ValueError if it has a text that is not valid Unicode."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return ValueError(f"a text contains {error.object[error.start]!a}, half of a surrogate pair")
    return value


def _table_rows(file: io.TextIOBase, delimiter: str) -> Iterator[tuple[int, Any]]:
    """(line number, row) of a CSV or TSV whose first line names the columns. An empty cell is null."""
    reader = csv.reader(file, delimiter=delimiter)
    header = next(reader, [])
    if len(set(header)) < len(header):
        raise csv.Error(f"two columns have the same name: {', '.join(header)}")
    start = reader.line_num + 1
    for cells in reader:
        if cells:
            yield start, _table_row(header, cells)
        start = reader.line_num + 1


def _table_row(header: list[str], cells: list) -> Any:
    if len(cells) != len(header):
        return ValueError(f"{len(cells)} cells under {len(header)} columns ({', '.join(map(str, header))})")
    return {name: None if cell == "" else plain(cell) for name, cell in zip(header, cells, strict=True)}


# ---- tables


def plain(value: Any) -> Any:
    """A table's value as JSON: dates as ISO text, decimals as numbers, bytes as text (or base64)."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, date | time):  # a datetime is also a date
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return value


def _pyarrow(path: Path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reading {path} needs pyarrow: pip install 'helpful[eval]', or convert it to JSONL"
        ) from error
    return pyarrow


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict]]:
    pyarrow = _pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _batch_rows(file.iter_batches(batch_size=BATCH))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error


def _arrow_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Arrow's stream format (written by datasets) or its file format (Feather)."""
    pyarrow = _pyarrow(path)
    try:
        with pyarrow.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                source.seek(0)
                batches = pyarrow.ipc.open_stream(source)
            parts = (batch.slice(i, BATCH) for batch in batches for i in range(0, batch.num_rows, BATCH))
            yield from _batch_rows(parts)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a readable Arrow file: {error}") from error


def _batch_rows(batches) -> Iterator[tuple[int, dict]]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, plain(row)


def _excel_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a workbook with one sheet. Its first row names the columns."""
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        raise ValueError(f"reading {path} needs openpyxl: pip install 'helpful[eval]', or save it as CSV") from error
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_EXCEL:
            raise ValueError(f"{path} unpacks to {size:,} bytes, more than {MAX_EXCEL:,}; save it as CSV")
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise ValueError(f"{path} is not a readable Excel file: {error}") from error
    if len(book.sheetnames) > 1:
        raise ValueError(
            f"{path} has the sheets {', '.join(book.sheetnames)}; save the sheet to read as its own workbook, or as CSV"
        )
    rows = book.worksheets[0].iter_rows(values_only=True)
    names = list(next(rows, ()))
    while names and names[-1] is None:
        names.pop()
    header = [str(name) for name in names]
    if None in names or len(set(header)) < len(header):
        raise ValueError(f"{path}:1: each column needs a name of its own, got {', '.join(header)}")
    for number, cells in enumerate(rows, 2):
        if any(cell is not None for cell in cells):
            rest = [cell for cell in cells[len(header) :] if cell is not None]
            filled = [*cells[: len(header)], *[None] * (len(header) - len(cells)), *rest]
            yield number, _table_row(header, filled)
    book.close()
