"""Rows of tables: Parquet, Arrow and Excel, and a table's row and values as JSON."""

import base64
import math
import zipfile
from collections.abc import Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

MAX_EXCEL = 1 << 30  # limit in bytes of an unpacked workbook, because openpyxl keeps its table of texts in memory
BATCH = 1024  # rows of a table in memory


def table_row(header: list[str], cells: list) -> Any:
    """The row as a dict, an empty cell as None; a ValueError if it has more or fewer cells than the header."""
    if len(cells) != len(header):
        return ValueError(f"{len(cells)} cells under {len(header)} columns ({', '.join(map(str, header))})")
    return {name: None if cell == "" else plain(cell) for name, cell in zip(header, cells, strict=True)}


def plain(value: Any) -> Any:
    """A table's value as JSON: dates as ISO text, decimals as numbers, NaN as null, bytes as text (or base64)."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, date | time):  # a datetime is also a date
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, float) and math.isnan(value):  # how pandas and NumPy mark an empty cell
        return None
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return value


def parquet_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(number from 1, row) of a Parquet file."""
    pyarrow = load_pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _batch_rows(file.iter_batches(batch_size=BATCH))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error


def arrow_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Arrow's stream format (written by datasets) or its file format (Feather)."""
    pyarrow = load_pyarrow(path)
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


def excel_rows(path: Path) -> Iterator[tuple[int, Any]]:
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
            yield number, table_row(header, filled)
    book.close()


def load_pyarrow(path: Path):
    """The module pyarrow. Raises ValueError, which names the file that needs it, if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reading {path} needs pyarrow: pip install 'helpful[eval]', or convert it to JSONL"
        ) from error
    return pyarrow
