"""The kinds of record that rooms exchange as files: JSONL(.gz) and Parquet, in and out, each row with its origin."""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data.chat_template import Message

SPLITS = ("train", "eval")


@dataclass(frozen=True)
class Record:
    """`where` is FILE:LINE; `columns` holds the row's further fields (id, license, ...), which travel along.

    `tools` are what the assistant may call, as JSON schemas.
    """

    where: str = field(default="", kw_only=True)
    tools: list[dict] | None = field(default=None, kw_only=True)
    columns: dict[str, Any] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class Example(Record):
    """A demonstration: the assistant turns of a conversation."""

    messages: list[Message]

    def texts(self) -> list[str]:
        return [message["content"] for message in self.messages]


@dataclass(frozen=True)
class Comparison(Record):
    """One completion preferred to another, by `margin` (0: not told). A tie has no better side."""

    prompt: list[Message]
    chosen: str
    rejected: str
    margin: float = 0.0
    tie: bool = False

    def texts(self) -> list[str]:
        return [*(message["content"] for message in self.prompt), self.chosen, self.rejected]


@dataclass(frozen=True)
class Ranking(Record):
    """K completions of one prompt; a lower rank is better, equal ranks are ties."""

    prompt: list[Message]
    completions: list[str]
    ranks: list[float]

    def texts(self) -> list[str]:
        return [*(message["content"] for message in self.prompt), *self.completions]


@dataclass(frozen=True)
class Rated(Record):
    """A completion with a human reward in [0, 1]."""

    prompt: list[Message]
    completion: str
    reward: float

    def texts(self) -> list[str]:
        return [*(message["content"] for message in self.prompt), self.completion]


@dataclass(frozen=True)
class Prompt(Record):
    """What a model is asked; the further columns go to reward functions."""

    prompt: list[Message]

    def texts(self) -> list[str]:
        return [message["content"] for message in self.prompt]


@dataclass(frozen=True)
class Verdict:
    """One vote on two answers to one question."""

    question: str  # id of the question: the unit of clustering
    model_a: str
    model_b: str
    verdict: str  # a | b | tie | error; an error is neither a tie nor a loss
    judge: str
    human: bool = False  # a person voted
    turn: int = 1
    category: str | None = None
    shown: str | None = None  # whose answer was read first: a | b | both (a folded pair of votes) | None (unknown)
    preference: float | None = None  # the judge's probability that b is better, where it gave one
    weight: float = 1.0
    length_a: int | None = None  # characters
    length_b: int | None = None
    hash_a: str | None = None
    hash_b: str | None = None
    text: str | None = None  # what the judge wrote
    both_bad: bool = False  # a tie because neither answer was acceptable


class BadRows:
    """What happens to a row that cannot be used: `error` raises with its FILE:LINE, `skip` counts and lists it."""

    def __init__(self, on_bad_row: str):
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"data.on_bad_row is 'error' or 'skip', got {on_bad_row!r}")
        self.on_bad_row = on_bad_row
        self.skipped: list[str] = []

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            if self.on_bad_row == "error":
                raise ValueError(f"{where}: {error}") from error
            self.skipped.append(f"{where}: {error}")


def read_records(file: str | Path, parse: Callable[[dict], list[Record]], bad_rows: BadRows) -> list[Record]:
    """The records of one file. `parse` (see `data/formats.py`) turns a row into records, or raises ValueError.

    `FILE@train` and `FILE@eval` name nine tenths and one tenth of a file, told apart by `split_of`.

    Raises:
        ValueError: the file is missing, empty or damaged; a row is bad and `bad_rows` does not skip.
    """
    path, part = split_name(str(file))
    records: list[Record] = []
    num_rows = 0
    for number, raw in _raw_rows(path):
        num_rows += 1
        where = f"{path}:{number}"
        with bad_rows.at(where):
            row = _as_object(raw)
            if part in (None, split_of(row)):
                records += [replace(record, where=where) for record in parse(row)]
    if not num_rows:
        raise ValueError(f"{path} is empty: expected one record a row")
    return records


def read_jsonl(path: str | Path) -> list[dict]:
    """Every row of a JSONL(.gz) or Parquet file as it is; raises ValueError with FILE:LINE where one is malformed."""
    rows, bad_rows = [], BadRows("error")
    for number, raw in _raw_rows(str(path)):
        with bad_rows.at(f"{path}:{number}"):
            rows.append(_as_object(raw))
    return rows


def split_name(file: str) -> tuple[str, str | None]:
    """ "FILE@eval" -> ("FILE", "eval"); a plain name has no part."""
    path, _, part = file.rpartition("@")
    return (path, part) if part in SPLITS else (file, None)


def split_of(row: dict) -> str:
    """ "eval" for one row in ten, told by sha256 of its context, prompt or, failing these, dialogue id."""
    names = ("context", "prompt", "message_tree_id", "id", "messages")
    key = next((row[name] for name in names if row.get(name) is not None), row)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    return "eval" if int(digest, 16) % 10 == 0 else "train"


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Writes rows as JSONL (gzip where the name ends in .gz), aside and then renamed."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    aside.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)  # mtime 0: same rows, same bytes
    os.replace(aside, path)


def _as_object(raw: Any) -> dict:
    if isinstance(raw, str):
        try:
            if "\\ud" in raw or "\\uD" in raw:  # half a surrogate pair is JSON, but no text that can be written
                json.dumps(json.loads(raw), ensure_ascii=False).encode()
            raw = json.loads(raw)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
        except RecursionError:
            raise ValueError("not JSON that can be read: nested too deeply") from None
    if not isinstance(raw, dict):
        raise ValueError(f"expected a JSON object, got {type(raw).__name__}")
    return raw


def _raw_rows(path: str) -> Iterator[tuple[int, Any]]:
    """(line or row number from 1, text or row). Blank lines are no rows."""
    if not Path(path).is_file():
        raise ValueError(f"no data file {path!r} (current directory: {os.getcwd()})")
    if path.endswith(".parquet"):
        yield from _parquet_rows(path)
        return
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):  # noqa: B007 (the handler below tells how far it came)
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}:{number + 1}: the file is damaged or not {Path(path).suffix}: {error}") from error


def _parquet_rows(path: str) -> Iterator[tuple[int, dict]]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reading {path} needs pyarrow: pip install 'helpful[eval]', or convert it to JSONL"
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
    number = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield number, row
