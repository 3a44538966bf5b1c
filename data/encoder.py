"""From rows of a file to encodings, in this process or in several."""

import hashlib
import json
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Generic, NamedTuple

import numpy as np

from data.adapters import Layout
from data.records import BadRows, R, Record, opening, parse_rows
from data.token_store import ITEM, ROW, Encodings

CHUNK = 512  # number of rows or records that a process encodes at a time
CHUNK_TEXT = 1 << 22  # characters after which a chunk ends early
AHEAD = 3  # number of chunks that are prepared for each process
_STRAY_MARKER = re.compile(r"\n\n(Human|Assistant)\b")  # a marker from Anthropic's raw text


class Encoding(NamedTuple):
    """One item: its rows from `data/chat.py`, its other fields (as JSON), and names of its peculiarities."""

    rows: list[dict]
    note: dict = {}
    marks: tuple[str, ...] = ()


class Encoder(Generic[R]):
    """The conversion of one kind of record to items: see data/sft.py, data/preferences.py and data/prompts.py."""

    tokenizer: Any

    @property
    def regroup(self) -> Callable[[list[R]], list[R]] | None:
        """A function of all records of a file at once."""
        return None

    def parse(self, row: dict) -> list[R]:
        """The records of a row in our format. Raises ValueError if there is no record."""
        raise NotImplementedError

    def encode(self, record: R) -> list[Encoding]:
        """One item or several. Raises ValueError if the record cannot be used."""
        raise NotImplementedError

    def item(self, rows: list[dict], note: dict, where: str) -> Any:
        """The item that a trainer gets for an encoding."""
        raise NotImplementedError

    def settings(self) -> dict:
        """The settings that influence the tokens, as JSON. With tokenizer and code they determine the tokens."""
        raise NotImplementedError


@dataclass(frozen=True)
class Job:
    """The encoding of the rows of one file. With on_bad_row=error both methods raise at the first bad row."""

    encoder: Encoder
    layout: Layout
    on_bad_row: str
    part: str | None  # train | eval, of FILE@train and FILE@eval

    def encode_rows(self, rows: list[tuple[str, Any]]) -> Encodings:
        """Encodings of the rows of `each_row`. Raises Unjoined at a message that needs other rows."""
        bad_rows = BadRows(self.on_bad_row)
        records = parse_rows(iter(rows), self.encoder.parse, bad_rows, self.layout, self.part, join=False)
        return self._encode(records, bad_rows, len(rows))

    def encode_records(self, records: list[Record]) -> Encodings:
        """Encodings of records that were read before."""
        return self._encode(records, BadRows(self.on_bad_row), len(records))

    def _encode(self, records: Iterable[Record], bad_rows: BadRows, num_rows: int) -> Encodings:
        found: list[tuple[Record, list[Encoding]]] = []
        for record in records:
            with bad_rows.at(record.where):
                found.append((record, self.encoder.encode(record)))
        marks = [(mark, record.where) for record, encodings in found for mark in _marks(record, encodings)]
        marks += [("language", where) for where in bad_rows.left_out]
        items = [(record, encoding) for record, encodings in found for encoding in encodings]
        return _joined(items)._replace(marks=marks, problems=bad_rows.problems, num_rows=num_rows)


def _joined(found: list[tuple[Record, Encoding]]) -> Encodings:
    """The encodings as columns."""
    encoded = [row for _, encoding in found for row in encoding.rows]
    ids = [np.asarray(row["input_ids"], dtype=np.int32) for row in encoded]
    masks = [np.asarray(row["completion_mask"], dtype=bool) for row in encoded]
    rows, items = np.zeros(len(encoded), ROW), np.zeros(len(found), ITEM)
    rows["length"] = list(map(len, ids))
    rows["start"] = np.cumsum(rows["length"]) - rows["length"]
    rows["targets"] = [mask.sum() for mask in masks]
    rows["num_cut"] = [row["num_cut"] for row in encoded]
    items["rows"] = [len(encoding.rows) for _, encoding in found]
    items["row"] = np.cumsum(items["rows"]) - items["rows"]
    items["opening"] = [_number(first.encode()) if (first := opening(record)) else 0 for record, _ in found]
    for number, (first, count) in enumerate(zip(items["row"].tolist(), items["rows"].tolist(), strict=True)):
        items["digest"][number] = _number(b"|".join(x.tobytes() for x in ids[first : first + count]))
    notes = [json.dumps(encoding.note).encode() if encoding.note else b"" for _, encoding in found]
    items["note_length"] = list(map(len, notes))
    items["note"] = np.cumsum(items["note_length"]) - items["note_length"]
    return Encodings(
        tokens=np.concatenate([*ids, np.empty(0, np.int32)]),
        targets=np.concatenate([*masks, np.empty(0, bool)]),
        rows=rows,
        items=items,
        notes=b"".join(notes),
        places=[record.where for record, _ in found],
        marks=[],
        problems=[],
        num_rows=0,
    )


def _number(content: bytes) -> int:
    """A 64-bit hash of the content, never 0."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True) or 1


def _marks(record: Record, encodings: list[Encoding]) -> Iterator[str]:
    """record, for every record. split: it gives several items. stray: a text contains a raw turn marker. single_turn:
    its conversation has one answer, including the one to learn. The encoder adds further marks."""
    yield "record"
    yield from (mark for encoding in encodings for mark in encoding.marks)
    if len(encodings) > 1:
        yield "split"
    if any(map(_STRAY_MARKER.search, record.texts())):
        yield "stray"
    answers = sum(message["role"] == "assistant" for message in record.turns)
    if answers + (not hasattr(record, "messages")) == 1:
        yield "single_turn"


def chunked(things: Iterable[Any]) -> Iterator[list[Any]]:
    """Lists of up to CHUNK rows (where, raw) or records."""
    chunk, size = [], 0
    for thing in things:
        chunk.append(thing)
        size += len(thing[1]) if isinstance(thing, tuple) and isinstance(thing[1], str) else 0
        if len(chunk) == CHUNK or size > CHUNK_TEXT:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def num_processes() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def in_processes(work: Callable[[list], Encodings], chunks: Iterable[list], processes: int) -> Iterator[Encodings]:
    """`work` of each chunk, in their order, by processes forked from this one.

    Raises:
        ValueError: raised by `work`, or a process was killed.
    """
    # no arguments are passed, because forked processes already have the tokenizer
    context, parent = get_context("fork"), os.getpid()
    pool = ProcessPoolExecutor(processes, context, _begin, (work, parent))
    waiting: deque[Future[Encodings]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_do, chunk))
            if len(waiting) > AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError(
            f"one of {processes} processes that encode tokens was killed, probably because memory ran out; use fewer "
            "cores (taskset -c 0-3 python ...), or free memory"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[list], Encodings]  # of a process of the pool, from its beginning


def _begin(work: Callable[[list], Encodings], parent: int) -> None:
    """Set up a new process: it ignores Ctrl-C, which the parent handles, and ends when the parent ends."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    with suppress(OSError):
        while os.getppid() == parent:
            time.sleep(1)
    os._exit(1)


def _do(chunk: list) -> Encodings:
    return _work(chunk)
