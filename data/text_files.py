"""Rows of text files: JSONL, JSON arrays, CSV and TSV, plain or compressed. One row is in memory at a time."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from data.table_files import load_pyarrow, table_row

MAX_ROW = 1 << 26  # 64 MiB; a longer line means another format or a malicious file
MAX_WINDOW = 1 << 28  # limit in bytes of the memory that an .xz may need

csv.field_size_limit(MAX_ROW)
MAGIC = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ", ".zst": b"\x28\xb5\x2f\xfd"}


def text_rows(path: Path, kind: str) -> Iterator[tuple[int, Any]]:
    """(number from 1, row) of a text file. kind: its format as a suffix, ".jsonl" of a.jsonl.gz.

    Raises:
        ValueError: the file is damaged, or it is not UTF-8.
    """
    at = [0]  # number of rows read so far, for the error message
    try:
        with _unpacked(path) as file:
            if file.peek(3)[:3] == b"\xef\xbb\xbf":  # files of Windows tools may begin with a byte order mark
                file.read(3)
            if kind in (".csv", ".tsv"):
                rows = csv_rows(io.TextIOWrapper(file, encoding="utf-8", newline=""), "," if kind == ".csv" else "\t")
            elif kind == ".json" and file.peek(1)[:1024].lstrip()[:1] == b"[":
                rows = _array_rows(path, io.TextIOWrapper(file, encoding="utf-8"))
            else:
                rows = _lines(file)
            for number, row in rows:
                at[0] = number
                yield number, row
    except UnicodeDecodeError as error:
        with open(path, "rb") as file:
            suffix = next((suffix for suffix, first in MAGIC.items() if file.peek(8).startswith(first)), None)
        if suffix not in (None, path.suffix.lower()):
            raise ValueError(f"{path} is compressed, but its name does not end in {suffix}; rename it") from error
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
        raw = io.BufferedReader(load_pyarrow(path).input_stream(str(path), compression="zstd"))
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
    decoder = json.JSONDecoder(object_pairs_hook=lambda pairs: as_dict(pairs, twice))
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


def csv_rows(file: io.TextIOBase, delimiter: str) -> Iterator[tuple[int, Any]]:
    """(line number, row) of a CSV or TSV whose first line names the columns. An empty cell is null."""
    reader = csv.reader(file, delimiter=delimiter)
    header = next(reader, [])
    if len(set(header)) < len(header):
        raise csv.Error(f"two columns have the same name: {', '.join(header)}")
    start = reader.line_num + 1
    for cells in reader:
        if cells:
            yield start, table_row(header, cells)
        start = reader.line_num + 1


def as_dict(pairs: list[tuple[str, Any]], twice: list[str]) -> dict:
    """An object of JSON. A key that it has twice, of which json would keep the last, is added to `twice` as a fault."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice.append(f"an object has a key twice: {', '.join(name for name, _ in pairs)}")
    return found
