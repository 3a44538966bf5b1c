"""Question sets by name, and the categories and reference answers that go with questions."""

from pathlib import Path

import pandas as pd

from evals.readers import read_rows

HERE = Path(__file__).parent / "sets"
SETS = {"mt_bench": HERE / "mt_bench.jsonl", "vicuna": HERE / "vicuna.jsonl", "coffee": HERE / "coffee.jsonl"}
REFERENCES = {"mt_bench": HERE / "mt_bench_references.jsonl", "vicuna": HERE / "vicuna_references.jsonl"}


def question_file(name: str) -> str:
    """The path of a question set: a name of ours or a file."""
    return str(SETS.get(name, name))


def load_questions(name: str) -> list[dict]:
    """[{"question_id": str, "category": str, "turns": [str, ...]}] of `mt_bench`, `vicuna`, `coffee` or a file.

    Raises:
        ValueError: a question without an id or turns, or an id seen twice.
    """
    questions, seen = [], set()
    for where, row in read_rows(question_file(name)):
        if "question_id" not in row or not row.get("turns"):
            raise ValueError(f"{where} needs question_id and turns (a list of texts), it has {', '.join(row)}")
        question = {"question_id": str(row["question_id"]), "category": row.get("category"), "turns": row["turns"]}
        if question["question_id"] in seen:
            raise ValueError(f"{where}: question_id {question['question_id']} was there before; ids must be unique")
        seen.add(question["question_id"])
        questions.append(question)
    return questions


def load_references(questions: str, file: str | None) -> dict[str, list[str]]:
    """{question id: reference answer of each turn}, in FastChat's answer format; our sets bring theirs."""
    file = file or REFERENCES.get(questions)
    if file is None:
        return {}
    return {str(row["question_id"]): row["choices"][0]["turns"] for _, row in read_rows(str(file))}


def add_categories(votes: pd.DataFrame, name: str | None) -> pd.DataFrame:
    """The votes with the category of each question from a question set, where the votes have none."""
    if name is None:
        return votes
    categories = {question["question_id"]: question["category"] for question in load_questions(name)}
    return votes.assign(category=votes["category"].fillna(votes["question"].map(categories)))
