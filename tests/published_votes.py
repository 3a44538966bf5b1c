"""Real votes with published answers that lie beside the project, and small tables of votes made by hand."""

import csv
import gzip
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

import evaluate
from evals.verdicts import votes_table

SCRIPT = SimpleNamespace(train=evaluate.evaluate, __name__="evaluate")  # what conftest's `script` opens
FOLDER = Path(__file__).parents[2] / "shared" / "reference" / "evaluation"


def published(*names: str) -> list[str]:
    """Paths of the reference files; skips the test where they are not there."""
    if not FOLDER.exists():
        pytest.skip(f"the published votes are not at {FOLDER}; they are not shipped, part of them is CC BY-NC")
    return [str(FOLDER / name) for name in names]


@cache
def _given() -> dict:
    (file,) = published("reference_given.json")
    return json.loads(Path(file).read_text())["given"]


def given(section: str) -> dict:
    """A section of the published answers."""
    return _given()[section]


@cache
def alpaca_rows(version: int) -> pd.DataFrame:
    """AlpacaEval's annotations without texts: model, index, preference, len_1, len_2."""
    name = {1: "ae1_gpt4_annotations", 2: "ae2_weighted_annotations"}[version]
    return pd.read_csv(published(f"alpaca_eval/{name}.csv.gz")[0])


def difficulties() -> list[float]:
    """The difficulty of each of AlpacaEval's instructions, by its number."""
    with gzip.open(published("alpaca_eval/instruction_difficulty_recovered.csv.gz")[0], "rt") as file:
        return [float(row["instruction_difficulty"]) for row in csv.DictReader(file)]


def annotations(model: str, version: int = 2) -> list[dict]:
    """What alpaca_eval writes for a model, with texts of the published lengths."""
    rows = alpaca_rows(version)
    return [
        {
            "instruction": f"instruction {row.index_}",
            "output_1": "x" * int(row.len_1),
            "output_2": "y" * int(row.len_2),
            "generator_1": "baseline",
            "generator_2": model,
            "annotator": "weighted_alpaca_eval_gpt4_turbo",
            "preference": None if pd.isna(row.preference) else row.preference,
        }
        for row in rows[rows["model"] == model].rename(columns={"index": "index_"}).itertuples()
    ]


def write_lines(path: Path, rows: list[dict]) -> str:
    """A JSONL file of rows; returns its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def battles(*rows: tuple, **fields) -> pd.DataFrame:
    """Votes from (model a, model b, verdict), each on a question of its own."""
    return votes_table(
        {"question": f"q{i}", "model_a": a, "model_b": b, "verdict": verdict, "judge": "j"} | fields
        for i, (a, b, verdict) in enumerate(rows)
    )
