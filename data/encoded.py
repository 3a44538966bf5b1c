"""From files to items and to a loader, for demonstrations, comparisons and prompts."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.adapters import Layout
from data.encoder import Encoder, Job
from data.loader import Loader
from data.mixture import mix
from data.records import BadRows, R, read_records, split_name
from data.token_cache import open_store
from data.token_store import Items

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """The items of several files, with the skipped rows and the cut tokens."""

    items: Items
    files: list[str]

    @property
    def file_sizes(self) -> list[int]:
        """Items of each file."""
        return list(map(len, self.items.stores))

    @property
    def skipped(self) -> list[str]:
        """FILE:LINE and the fault of each skipped row."""
        return [problem for store in self.items.stores for problem in store.skipped]

    def marked(self, name: str) -> tuple[int, list[str]]:
        """(number of records with this mark (data/encoder.py), FILE:LINE of the first of them)."""
        found = [store.marks.get(name, (0, [])) for store in self.items.stores]
        return sum(count for count, _ in found), [place for _, places in found for place in places]

    def report(self, name: str) -> str:
        """One line for the log: numbers of items and tokens, cut tokens, skipped rows."""
        cut = self.items.row_column("num_cut")
        tokens, targets = (int(self.items.row_column(column).sum()) for column in ("length", "targets"))
        return (
            f"{name}: {len(self.items):,} items, {tokens:,} tokens ({targets:,} targets); cut at data.max_length: "
            f"{np.count_nonzero(cut):,} rows, {cut.sum():,} tokens; skipped: {len(self.skipped):,} rows"
        )

    def log_report(self, name: str) -> None:
        """Log the report, and warnings about the rows."""
        log.info(self.report(name))
        (records, _), (split, _) = (self.marked(mark) for mark in ("record", "split"))
        if split:
            log.info(
                "%s: %d of %d conversations become one row per assistant turn, because the chat template writes a turn "
                "differently after later turns; %d rows in total",
                name,
                split,
                records,
                len(self.items),
            )
        if skipped := self.skipped:
            log.warning("%s: %d rows skipped%s", name, len(skipped), _listed(skipped))
        stray, places = self.marked("stray")
        if stray:
            message = '%s: %d records have "\\n\\nHuman" inside a text, the first at %s'
            log.warning(message, name, stray, places[0])
        if self.marked("single_turn")[0] == records:
            log.warning("%s: single-turn conversations only; a model cannot learn later turns from them", name)


def encode_files(name: str, files: Sequence[str], data, encoder: Encoder) -> Encoded:
    """The items of `files`, the value of the config key `name`. Tokens come from the cache, or are computed here.

    All rows are checked, so a bad row is reported before step 1. `data` is a config group with on_bad_row, cache and a
    layout.

    Raises:
        ValueError: there is no file, a file without a usable row, or a bad row with on_bad_row=error.
    """
    check_files(name, files)
    BadRows(data.on_bad_row)  # raises ValueError for an unknown value
    stores = []
    for file in files:
        job = Job(encoder, Layout.of(data), data.on_bad_row, split_name(file)[1])
        stores.append(open_store(name, file, job, data.cache))
        if not len(stores[-1]):
            others = stores[-1].marks.get("language", (0, []))[0]
            in_others = f"; {others} are in other languages than {list(data.languages)}" if others else ""
            raise ValueError(f"{file} has no usable row{in_others}{_part_of(file)}{_listed(stores[-1].skipped)}")
    encoded = Encoded(Items(stores, encoder.item), list(files))
    encoded.log_report(name)
    if left_out := encoded.marked("language")[0]:
        log.info("%s: %d rows in other languages than %s left out", name, left_out, list(data.languages))
    return encoded


def _part_of(file: str) -> str:
    """Why FILE@eval or FILE@train may be empty, for an error message."""
    part = split_name(file)[1]
    if part is None:
        return ""
    return (
        f"; @{part} takes rows by their first user turn, so it is empty where all prompts came from the other part of "
        f"another file. Make the file from prompts of a whole file, or read it without @{part}"
    )


def check_files(name: str, files: Sequence[str]) -> None:
    """Raise ValueError if the config key `name` is not a list of files, or is empty."""
    if isinstance(files, str):
        raise ValueError(f"{name} must be a list of files; write {name}=[{files}]")
    if not files:
        raise ValueError(f"{name} is empty; give one or more, e.g. {name}=[FILE]")
    if wrong := [file for file in files if not isinstance(file, str)]:
        raise ValueError(f"{name} names {wrong[0]}, which is not the name of a file; write {name}=[FILE]")


def training_texts(data, parse: Callable[[dict], list[R]]) -> Iterator[str]:
    """Every message and answer of `data.train`, to train a tokenizer on."""
    check_files("data.train", data.train)
    bad_rows = BadRows(data.on_bad_row)
    for file in data.train:
        for record in read_records(file, parse, bad_rows, Layout.of(data)):
            yield from record.texts()


def check_window(window: int, *sets: Sequence[Any]) -> None:
    """Raise ValueError if a row is longer than the model's window."""
    for items in filter(len, sets):
        lengths = items.longest if isinstance(items, Items) else np.array([_longest(item) for item in items])
        for number in np.flatnonzero(lengths > window)[:1]:
            item = items[int(number)]
            where = item.where if hasattr(item, "rows") else item.get("where", "a mismatched pair")
            raise ValueError(
                f"{where}: a row of {lengths[number]} tokens exceeds the model's window of {window}; set "
                f"data.max_length={window} or less"
            )


def make_loader(
    encoded: Encoded, *, shuffle: bool, weights: Sequence[float] | None, proportions: Sequence[float] | None, **order
) -> Loader:
    """A loader over encoded items, with files mixed by `mix`. order: batch_size, seed, rank, world_size."""
    sums = [
        [int(store.columns["rows"][name].sum()) for store in encoded.items.stores] for name in ("length", "targets")
    ]
    passes = mix(encoded.files, encoded.file_sizes, *sums, weights=weights, proportions=proportions)
    return Loader(encoded.items, shuffle=shuffle, file_sizes=encoded.file_sizes, weights=passes, **order)


def warn_of_overlap(train: Loader, held_out: Encoded, name: str = "data.eval") -> None:
    """Log how many held-out items begin with the same user turn as a training item, and how many are equal to one."""
    assert isinstance(train.items, Items)
    openings = held_out.items.column("opening")
    known = np.isin(openings[openings != 0], train.items.column("opening")).sum()
    if not known:
        return
    same = np.isin(held_out.items.column("digest"), train.items.column("digest")).sum()
    log.warning(
        "%s: %d of %d items begin with a user turn of the training data, and %d are entirely in it; figures on "
        "them measure memorisation. FILE@train and FILE@eval split a file by its first user turns",
        name,
        known,
        len(held_out.items),
        same,
    )


def _longest(item: Any) -> int:
    rows = item.rows if hasattr(item, "rows") else [item]
    return max(len(row["input_ids"]) for row in rows)


def _listed(problems: list[str], most: int = 100) -> str:
    """The first `most` problems, one per line. All are in `Encoded.skipped`."""
    lines = problems[:most] + ([f"... and {len(problems) - most} more"] if len(problems) > most else [])
    return "".join(f"\n  {line}" for line in [""] + lines if line)
