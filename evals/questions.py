"""Question sets by name, with the categories and reference answers of the questions."""

from pathlib import Path

import pandas as pd

from data.files import read_rows
from evals.readers import content_text

HERE = Path(__file__).parent / "sets"
SETS = {"mt_bench": HERE / "mt_bench.jsonl", "vicuna": HERE / "vicuna.jsonl", "coffee": HERE / "coffee.jsonl"}
REFERENCES = {"mt_bench": HERE / "mt_bench_references.jsonl", "vicuna": HERE / "vicuna_references.jsonl"}


def question_file(name: str) -> str:
    """The path of a question set, which is a built-in name or a file."""
    return str(SETS.get(name, name))


def load_questions(name: str) -> list[dict]:
    """[{"question_id": str, "category": str, "turns": [str, ...]}] of `mt_bench`, `vicuna`, `coffee` or a file.

    A file may be FastChat's (question_id, turns), Arena-Hard's (uid, prompt; or turns of {content}) or AlpacaEval's
    (instruction). A question without an id is identified by its first turn.

    Raises:
        ValueError: a question has no turns that are texts, or an id occurs twice.
    """
    questions, seen = [], set()
    for where, row in read_rows(question_file(name)):
        key = next((key for key in ("turns", "prompt", "instruction", "question") if row.get(key)), None)
        if key is None:
            raise ValueError(f"{where} needs turns (a list of texts), prompt or instruction, it has {', '.join(row)}")
        turns = question_turns(where, key, row[key])
        number = next((row[key] for key in ("question_id", "uid", "id") if row.get(key) is not None), turns[0])
        question = {"question_id": str(number), "category": row.get("category"), "turns": turns}
        if question["question_id"] in seen:
            raise ValueError(f"{where}: question_id {question['question_id'][:60]} occurs twice; ids must be unique")
        seen.add(question["question_id"])
        questions.append(question)
    return questions


def question_turns(where: str, key: str, value) -> list[str]:
    """The user's turns as texts. A text is one turn; of messages, the user's are the turns."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value):
        value = [turn for turn in value if turn["role"] == "user"]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {key} must be a text or a list of texts, got {str(value)[:80]!r}")
    return [content_text(where, key, turn) for turn in value]


def load_references(questions: str, file: str | None) -> dict[str, list[str]]:
    """{question id: reference answer of each turn}, in FastChat's answer format. Built-in sets have their own."""
    path = file or REFERENCES.get(questions)
    if path is None:
        return {}
    references = {}
    for where, row in read_rows(str(path)):
        if "question_id" not in row or "choices" not in row:
            raise ValueError(f"{where} needs question_id and choices, it has {', '.join(row)}")
        turns = row["choices"][0]["turns"]
        references[str(row["question_id"])] = [content_text(where, "turns", turn) for turn in turns]
    return references


def add_categories(votes: pd.DataFrame, name: str | None) -> pd.DataFrame:
    """The votes with the category of each question from a question set, if the votes have none."""
    if name is None:
        return votes
    categories = {question["question_id"]: question["category"] for question in load_questions(name)}
    return votes.assign(category=votes["category"].fillna(votes["question"].map(categories)))
