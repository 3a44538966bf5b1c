"""Files -> records -> encoded items -> loader: the path that demonstrations, comparisons and prompts share."""

import itertools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.adapters import Layout
from data.loader import Loader, num_tokens
from data.mixture import mix
from data.records import BadRows, Record, opening, read_records

log = logging.getLogger(__name__)
_STRAY_MARKER = re.compile(r"\n\n(Human|Assistant)\b")  # left over from Anthropic's raw text


@dataclass
class Encoded:
    """The encoded items of several files, and what was lost on the way."""

    items: list[Any] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    file_sizes: list[int] = field(default_factory=list)  # items of each file
    openings: list[int | None] = field(default_factory=list)  # of each item: hash of what the user says first
    skipped: list[str] = field(default_factory=list)  # FILE:LINE: what is wrong
    stray: list[str] = field(default_factory=list)  # FILE:LINE of records with a raw turn marker inside a text
    num_records: int = 0
    num_split: int = 0  # conversations of more than one row
    num_single_turn: int = 0  # records whose conversation has one assistant turn, the answer included

    def report(self, name: str) -> str:
        """One line for the log: how much there is, how much was cut, how much was skipped."""
        rows = [row for item in self.items for row in _rows(item)]
        cut = [row["num_cut"] for row in rows if row["num_cut"]]
        targets = sum(int(np.sum(row["completion_mask"])) for row in rows)
        return (
            f"{name}: {len(self.items):,} items, {sum(map(num_tokens, self.items)):,} tokens ({targets:,} targets); "
            f"cut at data.max_length: {len(cut):,} rows, {sum(cut):,} tokens; skipped: {len(self.skipped):,} rows"
        )

    def tell(self, name: str) -> None:
        """Logs the report, and what a person should know of the rows."""
        log.info(self.report(name))
        if self.num_split:
            log.info(
                "%s: %d of %d conversations are a row for each assistant turn, since the chat template writes a turn "
                "otherwise once more was said; %d rows in all",
                name, self.num_split, self.num_records, len(self.items),
            )  # fmt: skip
        if self.skipped:
            log.warning("%s: %d rows skipped%s", name, len(self.skipped), _listed(self.skipped))
        if self.stray:
            at = self.stray[0]
            log.warning('%s: %d records hold "\\n\\nHuman" inside a text, the first at %s', name, len(self.stray), at)
        if self.num_single_turn == self.num_records:
            log.warning("%s: single-turn conversations only; a model learns from them to answer, not to converse", name)


def encode_files(
    name: str,
    files: Sequence[str],
    parse: Callable[[dict], list[Record]],
    encode: Callable[[Record], list[Any]],
    *,
    on_bad_row: str,
    layout: Layout,
    regroup: Callable[[list[Record]], list[Record]] | None = None,
) -> Encoded:
    """Reads and encodes every row of `files` (the config key `name`) at once: what is wrong is known before step 1.

    Raises:
        ValueError: no file, a file without a usable row, or a bad row where on_bad_row=error.
    """
    check_files(name, files)
    bad_rows = BadRows(on_bad_row)
    encoded = Encoded(files=list(files), skipped=bad_rows.skipped)
    for file in files:
        records, before = read_records(file, parse, bad_rows, layout), len(encoded.items)
        for record in regroup(records) if regroup else records:
            with bad_rows.at(record.where):
                items, begins = encode(record), opening(record)
                encoded.items += items
                encoded.openings += [None if begins is None else hash(begins)] * len(items)
                encoded.num_records += 1
                encoded.num_split += len(items) > 1
                encoded.num_single_turn += _num_answers(record) == 1
                encoded.stray += [record.where] if any(map(_STRAY_MARKER.search, record.texts())) else []
        encoded.file_sizes.append(len(encoded.items) - before)
        if not encoded.file_sizes[-1]:
            raise ValueError(f"{file} has no usable row{_listed(bad_rows.skipped)}")
    encoded.tell(name)
    return encoded


def check_files(name: str, files: Sequence[str]) -> None:
    """Raise ValueError where the config key `name` is no list of files, or an empty one."""
    if isinstance(files, str):
        raise ValueError(f"{name} is a list of files; write {name}=[{files}]")
    if not files:
        raise ValueError(f"{name} names no file; give one or more, e.g. {name}=[FILE]")


def training_texts(data, parse: Callable[[dict], list[Record]]) -> Iterator[str]:
    """Every message and answer of `data.train`, to train a tokenizer on."""
    check_files("data.train", data.train)
    bad_rows = BadRows(data.on_bad_row)
    for file in data.train:
        for record in read_records(file, parse, bad_rows, Layout.of(data)):
            yield from record.texts()


def check_window(items: Sequence[Any], window: int) -> None:
    """Raise ValueError where a row is longer than the model's window: else whatever step reads it would fail."""
    for item in items:
        length = max(len(row["input_ids"]) for row in _rows(item))
        if length > window:
            where = item.where if hasattr(item, "rows") else item.get("where", "a mismatched pair")
            raise ValueError(
                f"{where}: a row of {length} tokens exceeds the model's window of {window}; say "
                f"data.max_length={window}, or less"
            )


def make_loader(
    encoded: Encoded, *, shuffle: bool, weights: Sequence[float] | None, proportions: Sequence[float] | None, **order
) -> Loader:
    """A loader over encoded items, their files mixed as `mix` says; `order`: batch_size, seed, rank, world_size."""
    bounds = [0, *itertools.accumulate(encoded.file_sizes)]
    parts = [encoded.items[start:end] for start, end in itertools.pairwise(bounds)]
    tokens = [sum(map(num_tokens, part)) for part in parts]
    targets = [sum(int(np.sum(row["completion_mask"])) for item in part for row in _rows(item)) for part in parts]
    passes = mix(encoded.files, encoded.file_sizes, tokens, targets, weights, proportions)
    loader = Loader(encoded.items, shuffle=shuffle, file_sizes=encoded.file_sizes, weights=passes, **order)
    loader.openings = set(encoded.openings) - {None}
    return loader


def warn_of_overlap(train: Loader, held_out: Encoded, name: str = "data.eval") -> None:
    """Logs how many held-out items begin as a training item does, and how many are one, token for token."""
    known = sum(one in train.openings for one in held_out.openings)
    if not known:
        return
    whole = set(map(_key, train.items))
    same = sum(_key(item) in whole for item in held_out.items)
    log.warning(
        "%s: %d of %d items begin with a user turn that the training data has too, and %d are in it whole; figures on "
        "them tell what was remembered. FILE@train and FILE@eval split a file by its first user turns",
        name, known, len(held_out.items), same,
    )  # fmt: skip


def _key(item: Any) -> int:
    return hash(tuple(np.asarray(row["input_ids"], dtype=np.int32).tobytes() for row in _rows(item)))


def compact(row: dict) -> dict:
    """The same row as arrays: 5 bytes a token instead of 16 and more, so that 200k conversations fit."""
    ids, mask = np.asarray(row["input_ids"], dtype=np.int32), np.asarray(row["completion_mask"], dtype=bool)
    return row | {"input_ids": ids, "completion_mask": mask}


def _rows(item: Any) -> list[dict]:
    return item.rows if hasattr(item, "rows") else [item]


def _num_answers(record: Record) -> int:
    if hasattr(record, "messages"):
        return sum(message["role"] == "assistant" for message in record.messages)
    return 1 + sum(message["role"] == "assistant" for message in record.prompt)


def _listed(problems: list[str], most: int = 100) -> str:
    """The problems, one a line; the first `most` of them (all are in `Encoded.skipped`)."""
    lines = problems[:most] + ([f"... and {len(problems) - most} more"] if len(problems) > most else [])
    return "".join(f"\n  {line}" for line in [""] + lines if line)
