"""The kinds of record that packages exchange as files, each row with its origin. `data/files.py` reads the files."""

import contextlib
import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from data.adapters import Layout, adapted_rows
from data.chat_template import Message
from data.files import each_row, read_rows
from runtime.files import named_in_errors

SPLITS = ("train", "eval")


@dataclass(frozen=True)
class Record:
    """`where` is FILE:LINE. `columns` has the row's further fields (id, license, ...), which are kept.

    `tools` are the functions that the assistant may call, as JSON schemas.
    """

    where: str = field(default="", kw_only=True)
    tools: list[dict] | None = field(default=None, kw_only=True)
    columns: dict[str, Any] = field(default_factory=dict, kw_only=True)

    @property
    def turns(self) -> list[Message]:
        """The conversation that all completions of the record share. Empty if there is none."""
        return getattr(self, "messages", None) or getattr(self, "prompt", None) or []

    def texts(self) -> list[str]:
        """Every text that a model would read or learn."""
        raise NotImplementedError


R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Example(Record):
    """A demonstration: the assistant turns of a conversation."""

    messages: list[Message]

    def texts(self) -> list[str]:
        return [message["content"] for message in self.messages]


@dataclass(frozen=True)
class Comparison(Record):
    """Two completions, of which `chosen` is better by `margin` (0: unknown). A tie has no better side."""

    prompt: list[Message]
    chosen: str
    rejected: str
    margin: float = 0.0
    tie: bool = False

    def texts(self) -> list[str]:
        return [*(message["content"] for message in self.prompt), self.chosen, self.rejected]


@dataclass(frozen=True)
class Ranking(Record):
    """K completions of one prompt. A lower rank is better, equal ranks are ties."""

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
    """A prompt for a model. The further columns are for reward functions."""

    prompt: list[Message]

    def texts(self) -> list[str]:
        return [message["content"] for message in self.prompt]


@dataclass(frozen=True)
class Verdict:
    """One vote on two answers to one question."""

    question: str  # id of the question, the unit of clustering
    model_a: str
    model_b: str
    verdict: str  # a | b | tie | error; an error is neither a tie nor a loss
    judge: str
    human: bool = False  # whether a person voted
    turn: int = 1
    category: str | None = None
    shown: str | None = None  # the answer that was read first: a | b | both (a folded pair of votes) | None (unknown)
    preference: float | None = None  # the judge's probability that b is better, if it gave one
    weight: float = 1.0
    length_a: int | None = None  # characters
    length_b: int | None = None
    hash_a: str | None = None
    hash_b: str | None = None
    text: str | None = None  # the judge's text
    both_bad: bool = False  # a tie because neither answer was acceptable


class BadRows:
    """The handling of bad rows: `error` raises ValueError with FILE:LINE, `skip` counts and lists them."""

    def __init__(self, on_bad_row: str):
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"data.on_bad_row must be 'error' or 'skip', got {on_bad_row!r}")
        self.on_bad_row = on_bad_row
        self.problems: list[tuple[str, str]] = []  # (FILE:LINE, fault) of the skipped rows
        self.left_out: list[str] = []  # FILE:LINE of rows, which are not bad, in languages that are not selected

    @property
    def skipped(self) -> list[str]:
        """FILE:LINE and the fault of each skipped row."""
        return [f"{where}: {problem}" for where, problem in self.problems]

    @property
    def counted(self) -> str:
        """The numbers of rows that were not used, for people: "1 skipped, 2 in other languages"."""
        others = f", {len(self.left_out)} in other languages" if self.left_out else ""
        return f"{len(self.problems)} skipped{others}"

    @property
    def why(self) -> str:
        """The same with the first fault, for the error that no row can be used."""
        first = f"; the first was skipped for: {self.skipped[0]}" if self.problems else ""
        return f"{self.counted}{first}"

    @contextlib.contextmanager
    def at(self, where: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            if self.on_bad_row == "error":
                raise ValueError(f"{where}: {error}") from error
            self.problems.append((where, str(error)))


def read_records(
    file: str | Path, parse: Callable[[dict], Sequence[R]], bad_rows: BadRows, layout: Layout | None = None
) -> list[R]:
    """The records of one file, glob or directory. `parse` (see `data/formats.py`) turns a row of ours into records.

    `FILE@train` and `FILE@eval` are nine tenths and one tenth of a file, chosen by `split_of`. `layout` says how a
    published row is converted to ours (see `data/adapters`). With None, the fields of a row decide its format.

    Raises:
        ValueError: the file is missing, empty or damaged, or a row is bad and `bad_rows` does not skip it.
    """
    path, part = split_name(str(file))
    rows = counted(each_row(path), path)
    return list(parse_rows(rows, parse, bad_rows, layout or Layout(), part))


def parse_rows(
    rows: Iterator[tuple[str, Any]],
    parse: Callable[[dict], Sequence[R]],
    bad_rows: BadRows,
    layout: Layout,
    part: str | None,
    *,
    join: bool = True,
) -> Iterator[R]:
    """The records of the rows of `each_row`, in order, or only those of `part` if it is given.

    Raises Unjoined, unless `join`, at the first message that needs other rows to form a conversation.
    """
    for where, row in adapted_rows(rows, layout, bad_rows.at, join=join):
        if row is None:
            bad_rows.left_out.append(where)
            continue
        records: list[R] = []
        with bad_rows.at(where):
            records = [replace(r, where=where) for r in parse(row) if part in (None, split_of(r, row))]
        yield from records


def counted(rows: Iterator[tuple[str, Any]], path: str) -> Iterator[tuple[str, Any]]:
    """The rows. Raises ValueError if there is none."""
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{path} is empty; it needs one record per row")
    yield first
    yield from rows


def read_jsonl(path: str | Path) -> list[dict]:
    """Every row of a file, unchanged. Raises ValueError with FILE:LINE if a row is malformed."""
    return [row for _, row in read_rows(str(path))]


def split_name(file: str) -> tuple[str, str | None]:
    """ "FILE@eval" -> ("FILE", "eval"). A plain name has no part."""
    path, _, part = file.rpartition("@")
    return (path, part) if part in SPLITS else (file, None)


def split_of(record: Record, row: dict) -> str:
    """ "eval" for one dialogue in ten, else "train", by the sha256 of its first user turn, or else of its id or row.

    So all answers to a prompt, turns of a dialogue and branches of a tree are in the same part, in every format.
    """
    names = ("dialogue_id", "conversation_id", "message_tree_id", "item", "id")
    key = opening(record) or next((row[name] for name in names if row.get(name) is not None), row)
    return "eval" if int(_digest(key), 16) % 10 == 0 else "train"


def opening(record: Record) -> str | None:
    """The user's first text, without surrounding white space. None if the user has no text."""
    texts = (message["content"].strip() for message in record.turns if message["role"] == "user")
    return next(filter(None, texts), None)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> int:
    """Write rows as JSONL (gzip if the name ends in .gz) to a temporary file and rename it. Returns their number."""
    path, count = Path(path), 0
    tmp_path = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with named_in_errors(path), open(tmp_path, "wb") as raw:
            packed = gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else None
            # no name and no time in the file: equal rows give equal bytes
            with packed or contextlib.nullcontext(raw) as file:
                for row in rows:
                    file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
                    count += 1
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(tmp_path, path)
    finally:
        tmp_path.unlink(missing_ok=True)
    return count
