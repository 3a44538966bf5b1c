"""Read models' answers to questions from files of several formats, and compute features of their texts."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from data.files import read_rows
from data.records import write_jsonl
from evals.questions import load_questions
from evals.readers import content_text
from evals.verdicts import text_hash
from generation.build_client import build_client
from generation.clients import Client

NAMES = ("model", "model_id", "generator")


def load_answers(files: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """{model: {question: [answer of each turn]}}.

    Formats: FastChat's model_answer files, AlpacaEval's outputs, completions.jsonl of generate.py. If rows have no
    model name, the model is named after the folder of the file. A question without an id is identified by its prompt.

    Raises:
        ValueError: a row without an answer, or a model that answers a question twice.
    """
    answers: dict[str, dict[str, list[str]]] = {}
    for file in files:
        for where, row in read_rows(file):
            model = next((row[name] for name in NAMES if row.get(name)), Path(file).absolute().parent.name)
            question, turns = _answer(where, row)
            known = answers.setdefault(str(model), {})
            if question in known:
                raise ValueError(
                    f"{where}: {model} answers question {question[:60]!r} twice; keep one answer per question"
                )
            known[question] = turns
    return answers


def load_samples(files: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """{model: {question: [first turn of each sample]}}. Samples are `choices` of a row, or several rows."""
    samples: dict[str, dict[str, list[str]]] = {}
    for file in files:
        for where, row in read_rows(file):
            model = next((row[name] for name in NAMES if row.get(name)), Path(file).absolute().parent.name)
            rows = [row]
            if isinstance(row.get("choices"), list) and len(row["choices"]) > 1:
                rows = [row | {"choices": [choice]} for choice in row["choices"]]
            for one in rows:
                question, turns = _answer(where, one)
                samples.setdefault(str(model), {}).setdefault(question, []).append(turns[0])
    return samples


def _answer(where: str, row: dict) -> tuple[str, list[str]]:
    if "choices" in row:
        turns = row["choices"][0].get("turns") if isinstance(row["choices"], list) and row["choices"] else None
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"{where}: choices must begin with an object that has turns, a list of texts")
        number = next((row[key] for key in ("question_id", "uid", "id") if row.get(key) is not None), None)
        if number is None:
            raise ValueError(f"{where} lacks question_id; it has {', '.join(row)}")
        return str(number), [content_text(where, "turns", turn) for turn in turns]
    if "messages" in row:
        turns = [message for message in row["messages"] if message.get("role") == "assistant"]
        number = next((row[key] for key in ("question_id", "uid", "id") if row.get(key) is not None), None)
        question = question_text(row["messages"]) if number is None else number
        if not turns:
            raise ValueError(f"{where}: messages hold no assistant turn")
        return str(question), [content_text(where, "messages", message) for message in turns]
    for name, asked in (("completion", "prompt"), ("output", "instruction")):
        if name in row:
            question = row.get("question_id", question_text(row.get(asked, "")))
            return str(question), [content_text(where, name, row[name])]
    raise ValueError(
        f"{where} holds no answer: it needs choices, messages, completion or output, and has {', '.join(row)}"
    )


def question_text(prompt) -> str:
    """The last user message of a prompt, which is a list of messages or a text."""
    if isinstance(prompt, str):
        return prompt
    return next((content_text("", "prompt", m) for m in reversed(prompt) if m["role"] == "user"), "")


def text_features(turns: Sequence[str]) -> dict[str, float]:
    """Characters, words, unique words, and the share of distinct 4-word spans (1: nothing is repeated)."""
    text = "\n".join(turns)
    words = re.findall(r"\w+", text.lower())
    spans = Counter(zip(*(words[i:] for i in range(4)), strict=False))
    return {
        "length": len(text),
        "words": len(words),
        "unique": len(set(words)),
        "fresh": len(spans) / sum(spans.values()) if spans else 1.0,
    }


def style_features(turns: Sequence[str]) -> dict[str, float]:
    """The features for style control: words, headers, list items and bold spans of a Markdown answer."""
    text = re.sub(r"```[^`]*```", "", "\n".join(turns))  # as published: a fence that contains a backtick is not removed
    return {
        "tokens": len(re.findall(r"\w+|[^\w\s]", "\n".join(turns))),
        "headers": len(re.findall(r"^#{1,6}\s", text, flags=re.MULTILINE)),
        "lists": len(re.findall(r"^\s*(?:\d+\.|[-*+])\s", text, flags=re.MULTILINE)),
        "bold": sum(len(re.findall(mark, text)) for mark in (r"\*\*[^*\n]+\*\*", r"__[^_\n]+__")),
    }


def add_answers(votes: pd.DataFrame, answers: dict[str, dict[str, list[str]]]) -> pd.DataFrame:
    """The votes with length, hash, unique words and freshness of both answers, if the answers are known.

    A vote on turn t is about the answers up to turn t.
    """
    features: dict[tuple, dict] = {}
    for model, questions in answers.items():
        for question, turns in questions.items():
            for turn in range(1, len(turns) + 1):
                seen = turns[:turn]
                features[model, question, turn] = text_features(seen) | {"hash": text_hash("\n".join(seen))}
    votes = votes.copy()
    for side in "ab":
        keys = list(zip(votes[f"model_{side}"], votes["question"], votes["turn"], strict=True))
        found = [features.get(key, {}) for key in keys]
        for name in ("length", "hash"):
            known = pd.Series([row.get(name) for row in found], index=votes.index, dtype=object)
            column = known.where(known.notna(), votes[f"{name}_{side}"])
            votes[f"{name}_{side}"] = column.astype(float) if name == "length" else column
        votes[f"unique_{side}"] = [row.get("unique", np.nan) for row in found]
    return votes


def answer_questions(
    questions: list[dict], client: Client, *, model: str, temperatures: Mapping, **settings
) -> tuple[list[dict], dict[str, str]]:
    """(a client's answers in FastChat's format, {question_id: why} of the questions that it did not answer).

    All turns are asked. Later turns follow the client's own answers. A question with a request that was refused or
    failed has no row: an empty text would be judged as the model's answer.

    Args:
        temperatures: {category: temperature}, with the key `default` for other categories.
        settings: max_tokens and seed.
    """
    conversations: list[list[dict]] = [[] for _ in questions]
    lacking: dict[str, str] = {}
    for turn in range(max(len(question["turns"]) for question in questions)):
        by_temperature: dict[float, list[int]] = {}
        for i, question in enumerate(questions):
            if turn < len(question["turns"]) and question["question_id"] not in lacking:
                conversations[i].append({"role": "user", "content": question["turns"][turn]})
                temperature = temperatures.get(question["category"], temperatures["default"])
                by_temperature.setdefault(temperature, []).append(i)
        for temperature, rows in by_temperature.items():
            replies = client.ask([conversations[i] for i in rows], temperature=temperature, **settings)
            for i, answer in zip(rows, replies, strict=True):
                conversations[i].append({"role": "assistant", "content": answer.text})
                if answer.missing:
                    lacking[questions[i]["question_id"]] = f"{answer.finish_reason}: {answer.error}"
    answered = [
        {
            "question_id": question["question_id"],
            "model_id": model,
            "choices": [{"index": 0, "turns": [m["content"] for m in talk if m["role"] == "assistant"]}],
        }
        for question, talk in zip(questions, conversations, strict=True)
        if question["question_id"] not in lacking
    ]
    return answered, lacking


def run(cfg: DictConfig, out: Path) -> dict:
    """task=answer: answers.jsonl, which task=judge and task=audit read."""
    task = cfg.task
    if cfg.get("client") is None:
        raise ValueError("task=answer asks a model: give client=local client.policy=PATH, or client=openai")
    questions = load_questions(task.questions)
    settings = {"max_tokens": task.max_tokens, "seed": task.seed}
    client = build_client(cfg.client)
    rows, lacking = answer_questions(questions, client, model=task.model, temperatures=task.temperatures, **settings)
    for question, why in lacking.items():
        print(f"warning: no answer to question {question} ({why}); run the same command again to ask again")
    if not rows:
        raise ValueError(f"none of the {len(questions)} questions was answered; see the warnings above")
    write_jsonl(out / "answers.jsonl", rows)
    same = Counter(text_hash("\n".join(row["choices"][0]["turns"])) for row in rows).most_common(1)[0][1]
    print(f"{len(rows)} of {len(questions)} questions answered by {task.model}: {out / 'answers.jsonl'}")
    counts = {"questions": len(rows), "not_answered": lacking, "same_answer": same}
    return {"model": task.model, **counts, "usage": asdict(client.usage)}
