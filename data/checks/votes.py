"""Votes of annotators on items: read from rows, checked, and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.adapters import Layout
from data.adapters.exports import RECORDS, votes
from data.records import BadRows, Record

MAX_LABELS = 200  # a pair's table has MAX_LABELS^2 cells, which are drawn again in each resample


@dataclass(frozen=True)
class Vote(Record):
    """One annotator's label of one item."""

    item: str
    annotator: str
    label: str
    category: str | None
    asked: str | None = None  # the row's prompt, shown beside disputed votes


class VoteLayout(Layout):
    """Rows of votes as they are, and those of the exports of annotation tools as votes."""

    def adapt(self, row: dict) -> list[dict]:
        """A row for each vote."""
        if "label" in row:
            return [row]
        name = self.name_of(row)
        return votes(name, row) if name in (*RECORDS, "label_studio") else [row]


def parse_vote(row: dict) -> list[Vote]:
    """The vote of a row with `item`, `annotator`, `label` and optionally `category`. A null or NaN label is missing."""
    values = {name: row.get(name) for name in ("item", "annotator", "label", "category")}
    if missing := [name for name in ("item", "annotator") if values[name] is None] + ["label"] * ("label" not in row):
        raise ValueError(f"a vote needs item, annotator and label; missing: {', '.join(missing)}")
    for name, value in values.items():
        if isinstance(value, list | dict) or value == "":
            raise ValueError(f"{name} must be text or a number (null if it is missing), got {value!r:.50}")
    if values["label"] is None or values["label"] != values["label"]:
        return []
    asked = row["prompt"] if isinstance(row.get("prompt"), str) else None
    item, annotator, label, category = (None if value is None else _name(value) for value in values.values())
    return [Vote(item, annotator, label, category, asked)]


def _name(value) -> str:
    """The label as text. 1.0 becomes 1, because many libraries convert a column with missing votes to floats."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def once(votes: Sequence[Vote], bad_rows: BadRows) -> list[Vote]:
    """The votes without duplicates: a second vote of an annotator on an item is a bad row."""
    kept: dict[tuple[str, str], Vote] = {}
    for vote in votes:
        with bad_rows.at(vote.where):
            if (vote.item, vote.annotator) in kept:
                raise ValueError(f"annotator {vote.annotator!r} has already voted on item {vote.item!r}")
            kept[vote.item, vote.annotator] = vote
    return list(kept.values())


def _number(label: str, level: str) -> float:
    try:
        number = float(label)
    except ValueError:
        number = float("nan")
    if not np.isfinite(number):
        raise ValueError(f"check.level={level} needs labels that are numbers, got {label!r}; set check.level=nominal")
    return number


class Votes:
    """Votes as a table: a row of `rows` is (item, annotator, code of the label).

    `level`: labels only differ (nominal), have an order (ordinal), or have distances (interval). For the last two,
    labels must be numbers.
    """

    def __init__(self, votes: Sequence[Vote], level: str = "nominal"):
        if not votes:
            raise ValueError("there is no vote in check.input: every label is null, or every row was skipped")
        self.items = list(dict.fromkeys(vote.item for vote in votes))
        self.annotators = sorted({vote.annotator for vote in votes})
        self.level, self.names = level, sorted({vote.label for vote in votes})
        self.values = None
        if level != "nominal":
            self.names = sorted(self.names, key=lambda name: _number(name, level))
            self.values = [_number(name, level) for name in self.names]
        if len(self.names) > MAX_LABELS:
            raise ValueError(
                f"{len(self.names)} different labels; at most {MAX_LABELS} are possible: put numbers into bins first"
            )
        item_at = {item: i for i, item in enumerate(self.items)}
        annotator_at = {name: a for a, name in enumerate(self.annotators)}
        code = {label: c for c, label in enumerate(self.names)}
        self.rows = np.array([(item_at[v.item], annotator_at[v.annotator], code[v.label]) for v in votes])  # (N, 3)
        self.where = {vote.item: vote.where for vote in reversed(votes)}  # of the first vote
        self.prompts = {vote.item: vote.asked for vote in votes if vote.asked is not None}
        self.categories = {vote.item: vote.category for vote in votes if vote.category is not None}

    def counts(self, keep: np.ndarray | None = None) -> np.ndarray:
        """(items, labels): votes for each label, of the kept rows."""
        rows = self.rows if keep is None else self.rows[keep]
        table = np.zeros((len(self.items), len(self.names)), dtype=np.int64)
        np.add.at(table, (rows[:, 0], rows[:, 2]), 1)
        return table
