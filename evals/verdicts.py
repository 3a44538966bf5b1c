"""Votes of people and judges as one table: a row per vote, a column per field of `Verdict`."""

from collections.abc import Iterable
from dataclasses import fields
from hashlib import sha256
from sys import intern

import pandas as pd

from data.records import Verdict

COLUMNS = [field.name for field in fields(Verdict)]
EXTRA = ["index"]  # number of the question in its benchmark, if the file has it
DEFAULTS = {"human": False, "turn": 1, "weight": 1.0}
OUTCOMES = ("a", "b", "tie", "error")
PAIR = ["question", "turn", "model_a", "model_b"]
OTHER = {"a": "b", "b": "a"}
FLOATS = ["preference", "weight", "length_a", "length_b"]


def votes_table(rows: Iterable[dict]) -> pd.DataFrame:
    """Votes as a DataFrame with the columns of `Verdict`; lengths are float64, NaN where unknown."""
    columns: dict[str, list] = {name: [] for name in COLUMNS + EXTRA}
    for row in rows:
        for name in COLUMNS + EXTRA:
            value = row.get(name, DEFAULTS.get(name))
            columns[name].append(intern(value) if type(value) is str and name != "text" else value)
    votes = pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})
    for name in FLOATS:
        votes[name] = pd.to_numeric(votes[name]).astype(float)
    votes["human"] = votes["human"].astype(bool)
    votes["turn"] = votes["turn"].astype(int)
    return votes


def text_hash(text: str) -> str:
    """Twelve hexadecimal digits that name a text."""
    return sha256(text.encode()).hexdigest()[:12]


def swapped(votes: pd.DataFrame, rows: pd.Series) -> pd.DataFrame:
    """The votes with model a and model b exchanged in `rows` (bool), in all columns that refer to a side."""
    votes = votes.copy()
    for name in ("model", "length", "hash", "unique"):
        if f"{name}_a" not in votes:
            continue
        a, b = votes[f"{name}_a"], votes[f"{name}_b"]
        votes[f"{name}_a"], votes[f"{name}_b"] = a.mask(rows, b), b.mask(rows, a)
    for name in ("verdict", "shown"):
        votes.loc[rows, name] = votes.loc[rows, name].replace(OTHER)
    votes.loc[rows, "preference"] = 1 - votes.loc[rows, "preference"]
    return votes


def sort_pairs(votes: pd.DataFrame) -> pd.DataFrame:
    """The votes with model_a < model_b in every row. Two files may only be joined after this."""
    return swapped(votes, votes["model_a"] > votes["model_b"])


def fold_orders(votes: pd.DataFrame) -> pd.DataFrame:
    """A judge's two votes on one pair, once in each order, become one; Zheng et al. 2023 (arXiv:2306.05685), 3.4.

    A win counts only if both orders agree, otherwise it is a tie. An error in either order makes the item an error.
    Votes in one order only, votes of people and votes of unknown order are not changed.
    """
    votes = sort_pairs(votes)
    ordered = votes["shown"].isin(["a", "b"]) & ~votes["human"]
    pairs = votes[ordered].drop_duplicates([*PAIR, "judge", "shown"])
    first = pairs[pairs["shown"] == "a"].set_index([*PAIR, "judge"])
    second = pairs[pairs["shown"] == "b"].set_index([*PAIR, "judge"])
    both = first.index.intersection(second.index)
    rest = votes[~(ordered & pd.MultiIndex.from_frame(votes[[*PAIR, "judge"]]).isin(both))]
    if not len(both):
        return rest.reset_index(drop=True)
    folded, other = first.loc[both], second.loc[both]
    verdict = folded["verdict"].where(folded["verdict"] == other["verdict"], "tie")
    failed = (folded["verdict"] == "error") | (other["verdict"] == "error")
    folded = folded.assign(
        verdict=verdict.mask(failed, "error"),
        shown="both",
        preference=(folded["preference"] + other["preference"]) / 2,
        weight=(folded["weight"] + other["weight"]) / 2,
        text=None,
    )
    return pd.concat(
        [folded.reset_index()[[*COLUMNS, *(name for name in EXTRA if name in votes)]], rest], ignore_index=True
    )


def scored(votes: pd.DataFrame) -> pd.DataFrame:
    """One row per battle. A judge's two orders are folded, errors are left out, and the file order is kept.

    Raises:
        ValueError: all votes are errors.
    """
    check_readable(votes)
    if (votes["shown"].eq("b") & ~votes["human"]).any():
        votes = fold_orders(votes)
    return votes[votes["verdict"] != "error"]


def decisive(votes: pd.DataFrame) -> pd.DataFrame:
    """Votes that name a winner."""
    return votes[votes["verdict"].isin(["a", "b"])]


def points(verdicts: pd.Series) -> pd.Series:
    """1 where a won, 0 where b won, 0.5 for a tie; NaN for an error."""
    return verdicts.map({"a": 1.0, "b": 0.0, "tie": 0.5}).astype(float)


def check_readable(votes: pd.DataFrame) -> None:
    """Raise ValueError if no vote is a win or a tie."""
    if (votes["verdict"] == "error").all():
        raise ValueError(f"none of the {len(votes)} verdicts is a win or a tie; check task.format")
