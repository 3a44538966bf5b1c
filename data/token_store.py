"""The encoded rows of one file on disk, mapped into memory. Parts are read when they are needed.

tokens.bin    int32, the ids of all rows, one row after the other
targets.bin   bool, for each token: is it a target?
rows.bin      ROW, one per row: the place of its tokens, and the numbers of its targets and of its cut tokens
items.bin     ITEM, one per item: its rows, its place in the file, digests of its beginning and of its tokens
notes.bin     JSON of each item: its further fields
store.json    skipped rows and remarks for people; then SHA256SUMS
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.files import SUMS, check_sums, read_sums, write_sums

ROW = np.dtype([("start", "<i8"), ("length", "<i4"), ("targets", "<i4"), ("num_cut", "<i4")])
ITEM = np.dtype(
    [
        ("row", "<i8"),
        ("rows", "<i4"),
        ("file", "<i4"),
        ("line", "<i8"),
        ("opening", "<i8"),
        ("digest", "<i8"),
        ("note", "<i8"),
        ("note_length", "<i4"),
    ]
)
COLUMNS = {"tokens": np.dtype("<i4"), "targets": np.dtype("?"), "rows": ROW, "items": ITEM, "notes": np.dtype("u1")}
CONTENT = tuple(f"{name}.bin" for name in ("tokens", "targets", "rows", "notes"))  # the content that a training reads
SHOWN = 20  # number of places that a mark stores


class Encodings(NamedTuple):
    """Encoded items, one after the other; `starts` and `note` count from 0. `Writer.add` appends them."""

    tokens: np.ndarray
    targets: np.ndarray
    rows: np.ndarray  # ROW
    items: np.ndarray  # without file and line
    notes: bytes
    places: list[str]  # FILE:LINE of each item
    marks: list[tuple[str, str]]  # (name, FILE:LINE) of remarks for people
    problems: list[tuple[str, str]]  # (FILE:LINE, fault) of rows that cannot be used
    num_rows: int  # number of rows that were read


class Writer:
    """Appends encodings to the columns of a store in `directory`. `close` completes the store."""

    def __init__(self, directory: Path, files: Sequence[Path]):
        self.directory, self.numbers = directory, {str(path): number for number, path in enumerate(files)}
        self.out = {name: (directory / f"{name}.bin").open("wb") for name in COLUMNS}
        self.ends = dict.fromkeys(COLUMNS, 0)  # number of entries written so far
        self.skipped: list[tuple[int, int, str]] = []
        self.marks: dict[str, tuple[int, list[tuple[int, int]]]] = {}

    def add(self, new: Encodings) -> None:
        """Append."""
        rows, items = new.rows.copy(), new.items.copy()
        rows["start"] += self.ends["tokens"]
        items["row"] += self.ends["rows"]
        items["note"] += self.ends["notes"]
        if new.places:
            items["file"], items["line"] = zip(*map(self._place, new.places), strict=True)
        notes = np.frombuffer(new.notes, dtype=np.uint8)
        columns = {"tokens": new.tokens, "targets": new.targets, "rows": rows, "items": items, "notes": notes}
        for name, column in columns.items():
            self.out[name].write(np.ascontiguousarray(column, dtype=COLUMNS[name]).tobytes())
            self.ends[name] += len(column)
        for where, problem in new.problems:
            self.skip(where, problem)
        for name, where in new.marks:
            self.mark(name, where)

    def mark(self, name: str, where: str) -> None:
        """Store a remark on a row."""
        count, first = self.marks.get(name, (0, []))
        self.marks[name] = count + 1, [*first, self._place(where)] if count < SHOWN else first

    def skip(self, where: str, problem: str) -> None:
        """Store a row that could not be used."""
        self.skipped.append((*self._place(where), problem))

    def close(self, made_from: dict) -> None:
        """Write the remaining data, and sync everything to disk."""
        for file in self.out.values():
            file.close()
        contents = {"made_from": made_from, "skipped": self.skipped, "marks": self.marks}
        (self.directory / "store.json").write_text(json.dumps(contents, indent=1, ensure_ascii=False), encoding="utf-8")
        write_sums(self.directory)

    def _place(self, where: str) -> tuple[int, int]:
        path, _, line = where.rpartition(":")
        return self.numbers[path], int(line)


class Store:
    """One file's items. `files` are the current names of its shards: files may have moved since they were encoded.

    Raises:
        ValueError: the store is damaged.
    """

    def __init__(self, directory: Path, files: Sequence[Path]):
        self.files = files
        sums = read_sums(directory)
        if sums.keys() != {"store.json", *(f"{name}.bin" for name in COLUMNS)}:
            raise ValueError(f"{directory} does not match its {SUMS}")
        check_sums(directory)
        self.columns = {name: _mapped(directory / f"{name}.bin", kind) for name, kind in COLUMNS.items()}
        contents = json.loads((directory / "store.json").read_text(encoding="utf-8"))
        self.skipped = [f"{self.place(*at)}: {problem}" for *at, problem in contents["skipped"]]
        self.marks = {
            name: (count, [self.place(*at) for at in first]) for name, (count, first) in contents["marks"].items()
        }
        self.digest = hashlib.sha256("".join(sums[name] for name in CONTENT).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.columns["items"])

    def place(self, file: int, line: int) -> str:
        """FILE:LINE."""
        return f"{self.files[file]}:{line}"

    def read(self, number: int) -> tuple[list[dict], dict, str]:
        """(rows, note, FILE:LINE) of an item. A row: {"input_ids": int32, "completion_mask": bool, "num_cut": int}."""
        first, count, file, line, _, _, note, length = self.columns["items"][number].item()
        rows = []
        for row in range(first, first + count):
            start, size, _, num_cut = self.columns["rows"][row].item()
            ids, mask = (self.columns[name][start : start + size] for name in ("tokens", "targets"))
            rows.append({"input_ids": ids, "completion_mask": mask, "num_cut": num_cut})
        notes = self.columns["notes"][note : note + length].tobytes()
        return rows, json.loads(notes) if length else {}, self.place(file, line)

    def over_items(self, name: str, reduce: np.ufunc) -> np.ndarray:
        """(items,) a field of the rows, reduced over the rows of each item."""
        return reduce.reduceat(self.columns["rows"][name], self.columns["items"]["row"])


def _mapped(path: Path, kind: np.dtype) -> np.ndarray:
    """The column, mapped copy-on-write, because torch requires writable arrays."""
    if not path.stat().st_size:
        return np.empty(0, kind)
    return np.asarray(np.memmap(path, kind, "c"))


class Items(Sequence):
    """The items of several stores, created on access by `make(rows, note, FILE:LINE)`."""

    def __init__(self, stores: Sequence[Store], make: Callable[[list[dict], dict, str], Any]):
        self.stores, self.make = stores, make
        self.ends = list(accumulate(map(len, stores)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, number):
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = number + len(self) if number < 0 else number
        if not 0 <= number < len(self):
            raise IndexError(f"item {number} of {len(self)}")
        store = int(np.searchsorted(self.ends, number, side="right"))
        return self.make(*self.stores[store].read(number - (self.ends[store] - len(self.stores[store]))))

    def __iter__(self) -> Iterator[Any]:
        return (self.make(*store.read(number)) for store in self.stores for number in range(len(store)))

    @property
    def digest(self) -> str:
        """A digest of the content that a training reads. It is equal if all tokens, masks and notes are equal."""
        return hashlib.sha256("".join(store.digest for store in self.stores).encode()).hexdigest()

    def column(self, name: str) -> np.ndarray:
        """(items,) a field of ITEM."""
        return np.concatenate([store.columns["items"][name] for store in self.stores])

    def row_column(self, name: str) -> np.ndarray:
        """(rows,) a field of ROW."""
        return np.concatenate([store.columns["rows"][name] for store in self.stores])

    @property
    def num_tokens(self) -> np.ndarray:
        """(items,) tokens of each item, in all its rows together."""
        return np.concatenate([store.over_items("length", np.add) for store in self.stores])

    @property
    def longest(self) -> np.ndarray:
        """(items,) tokens of each item's longest row."""
        return np.concatenate([store.over_items("length", np.maximum) for store in self.stores])
