"""Read votes from files of other projects into one table. Each reader in `FORMATS` yields the fields of `Verdict`."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from data.files import read_rows
from evals.published_parsers import ARENA_HARD
from evals.verdicts import COLUMNS, OTHER, OUTCOMES, text_hash, votes_table

WINNERS = {
    "model_a": "a",
    "model_b": "b",
    "model_1": "a",
    "model_2": "b",
    "left": "a",
    "right": "b",
    "tie": "tie",
    "tie (bothbad)": "tie",
    "tie (inconsistent)": "tie",
    "both_bad": "tie",
    "bothbad": "tie",
    "both bad": "tie",
    "tie (both bad)": "tie",
}
BOTH_BAD = ("tie (bothbad)", "both_bad", "bothbad", "both bad", "tie (both bad)")
VERDICTS = ("winner", "winner_ab", "winner_ba", "g1_winner", "g2_winner", "label", "preference", "verdict")
NUMBERED = {0.0: "tie", 1.0: "a", 2.0: "b", 1.5: "tie"}


def read_votes(files: Sequence[str], format: str) -> pd.DataFrame:
    """The votes of all files, in file order, as the table of `evals.verdicts`.

    Raises:
        ValueError: the format is unknown, a file is missing or malformed (with its line), or there is no vote.
    """
    if format not in FORMATS:
        raise ValueError(f"task.format={format!r} is unknown; known formats: {', '.join(FORMATS)}")
    if isinstance(files, str) or not len(files):
        raise ValueError(f"task.input takes a list of files, got {files!r}; write task.input=[a.jsonl,b.jsonl]")
    votes = votes_table(FORMATS[format](files))
    if not len(votes):
        raise ValueError(f"no vote in {', '.join(map(str, files))}; task.input takes files with one vote per row")
    return votes


def content_text(where: str, name: str, value) -> str:
    """The text of a turn: a text, {"content": ..}, {"answer": ..} (Arena-Hard's), or a list of text parts.

    Raises:
        ValueError: any other value, such as null or an image.
    """
    if isinstance(value, dict):
        key = next((key for key in ("content", "answer", "text") if key in value), None)
        if key is not None:
            return content_text(where, f"{name}.{key}", value[key])
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a text, got {json.dumps(value, default=str)[:80]}")
    return value


def _need(where: str, row: dict, *names: str) -> list:
    missing = [name for name in names if name not in row]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)} (it has {', '.join(map(str, row))}); see task.format")
    empty = [name for name in names if row[name] is None and name not in VERDICTS]
    if empty:
        raise ValueError(f"{where}: {', '.join(empty)} is null; only a verdict may be missing")
    return [row[name] for name in names]


def _winner(label) -> str:
    """a, b or tie. Every other label is an error."""
    return WINNERS.get(str(label).strip().lower(), "error")


def _numbered(label) -> str:
    """The outcome of a label that is 0 (tie), 1 or 2, or the word for a tie."""
    if str(label).strip().lower() in ("tie", "draw"):
        return "tie"
    return NUMBERED.get(_number(label), "error")


def _number(value) -> float:
    """The number in a field. NaN if it is empty."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def read_alpaca_eval(files: Sequence[str]) -> Iterator[dict]:
    """annotations.json of alpaca_eval: generator_1 is the baseline, preference in [1, 2], 0 = tie."""
    for file in files:
        for where, row in read_rows(file):
            instruction, baseline, model, preference = _need(
                where, row, "instruction", "generator_1", "generator_2", "preference"
            )
            answers = {side: row.get(f"output_{n}") for side, n in (("a", 1), ("b", 2))}
            value = 0.0 if str(preference).strip().lower() in ("tie", "draw") else _number(preference)
            value = 0.5 if value == 0 else value - 1
            readable = 0 <= value <= 1
            yield {
                "question": instruction,
                "index": None if row.get("index") is None else int(row["index"]),
                "category": row.get("dataset"),
                "model_a": baseline,
                "model_b": model,
                "judge": row.get("annotator") or "annotator",
                "verdict": ("tie" if value == 0.5 else "b" if value > 0.5 else "a") if readable else "error",
                "preference": value if readable else None,
                "text": _text(row.get("raw_completion")),
                **{f"length_{side}": None if text is None else len(text) for side, text in answers.items()},
                **{f"hash_{side}": None if text is None else text_hash(text) for side, text in answers.items()},
            }


def _text(value) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def read_mtbench(files: Sequence[str]) -> Iterator[dict]:
    """FastChat's human votes and GPT-4 pair files. A row of a pair file with both verdicts gives two votes."""
    for file in files:
        for where, row in read_rows(file):
            question, judge = _need(where, row, "question_id", "judge")
            judge = judge if isinstance(judge, str) else "/".join(judge)
            vote = {
                "question": str(question),
                "turn": int(row.get("turn", 1)),
                "category": row.get("category"),
                "judge": judge,
                "human": judge.startswith(("expert", "author")),
            }
            if "g1_winner" in row:
                model_a, model_b, first, second = _need(where, row, "model_1", "model_2", "g1_winner", "g2_winner")
                vote |= {"model_a": model_a, "model_b": model_b}
                # g2 got the answers exchanged, and its verdict is already mapped back
                yield vote | {"shown": "a", "verdict": _winner(first), "text": row.get("g1_judgment")}
                yield vote | {"shown": "b", "verdict": _winner(second), "text": row.get("g2_judgment")}
            else:
                model_a, model_b, winner = _need(where, row, "model_a", "model_b", "winner")
                folded = None if vote["human"] else "both"
                verdict = {"verdict": _winner(winner), "text": winner, "shown": folded}
                yield vote | {"model_a": model_a, "model_b": model_b} | verdict


def read_arena(files: Sequence[str]) -> Iterator[dict]:
    """Chatbot Arena's battles and LMSYS's sets: the answer of model_a was on the left.

    Columns: `winner`, or winner_model_a, winner_model_b and winner_tie. If a conversation has an answer without text,
    its row is not a vote on two answers: the verdict is an error with the reason in its text.
    """
    for file in files:
        for where, row in read_rows(file):
            model_a, model_b = _need(where, row, "model_a", "model_b")
            winner = _winner_column(where, row)
            lengths, lacking = _answer_lengths(row)
            yield {
                "question": str(row.get("question_id", where)),
                "category": row.get("category") if isinstance(row.get("category"), str) else None,
                "turn": row["turn"] if isinstance(row.get("turn"), int) else 1,
                "model_a": model_a,
                "model_b": model_b,
                "judge": row.get("judge", "arena_user"),
                "human": True,
                "shown": "a",
                "verdict": "error" if lacking else _winner(winner),
                "both_bad": str(winner).strip().lower() in BOTH_BAD,
                "text": f"{where}: {lacking}" if lacking else None,
                **lengths,
            }


def _winner_column(where: str, row: dict) -> str | None:
    if "winner" not in row and "winner_model_a" in row:
        named = [label for label in ("model_a", "model_b", "tie") if _number(row.get(f"winner_{label}")) == 1]
        return named[0] if len(named) == 1 else None
    return _need(where, row, "winner")[0]


def _answer_lengths(row: dict) -> tuple[dict, str]:
    """(characters of both sides' answers, the reason if an answer has no text)."""
    lengths, lacking = {}, ""
    for side in "ab":
        messages = row.get(f"conversation_{side}")
        if isinstance(messages, list):
            try:
                texts = [content_text("", "content", m) for m in messages if m["role"] == "assistant"]
            except ValueError:
                lacking = lacking or f"an answer of {row[f'model_{side}']} in conversation_{side} has no text"
            else:
                lengths[f"length_{side}"] = sum(map(len, texts))
    return lengths, lacking


def read_arena_hard(files: Sequence[str]) -> Iterator[dict]:
    """arena-hard-auto's model_judgment: the baseline is shown first in the first game, the model in the second."""
    for file in files:
        for where, row in read_rows(file):
            number = row.get("uid", row.get("question_id"))
            model, games = _need(where, row, "model", "games")
            if number is None or not isinstance(games, list) or len(games) != 2:
                raise ValueError(f"{where} needs uid (or question_id) and two games")
            vote = {"question": str(number), "category": row.get("category"), "judge": row.get("judge", "judge")}
            vote |= {"model_a": row.get("baseline", "baseline"), "model_b": model}
            for shown, game in zip("ab", games, strict=True):
                verdict, weight = ARENA_HARD.get((game or {}).get("score"), ("error", 1.0))
                verdict = {"a": "b", "b": "a"}.get(verdict, verdict) if shown == "b" else verdict
                yield vote | {"shown": shown, "verdict": verdict, "weight": weight}


def read_pandalm(files: Sequence[str]) -> Iterator[dict]:
    """PandaLM's test set: one column per judge (0 tie, 1, 2). The people are annotator1 .. annotator3."""
    known = {"idx", "motivation_app", "cmp_key", "len_1", "len_2", "instruction", "input", "response1", "response2"}
    for file in files:
        for where, row in read_rows(file):
            question, models = _need(where, row, "idx", "cmp_key")
            model_a, _, model_b = models.partition("_")
            if not model_a or not model_b or "_" in model_b:
                raise ValueError(f"{where}: cmp_key must be two model names with one _ between them, got {models!r}")
            lengths = [row.get(f"len_{n}", len(row.get(f"response{n}", ""))) for n in (1, 2)]
            for judge in (name for name in row if name not in known):
                yield {
                    "question": str(question),
                    "category": row.get("motivation_app"),
                    "model_a": model_a,
                    "model_b": model_b,
                    "judge": judge,
                    "human": judge.startswith("annotator"),
                    "verdict": _numbered(row[judge]),
                    "length_a": int(lengths[0]),
                    "length_b": int(lengths[1]),
                }


def read_llmbar(files: Sequence[str]) -> Iterator[dict]:
    """LLMBar's results in both orders. The second verdict is already mapped back. The label is a person's vote."""
    for file in files:
        labelled = set()
        for where, row in read_rows(file):
            subset, index, judge, label = _need(where, row, "subset", "index", "judge", "label")
            vote = {"question": f"{subset}/{index}", "category": subset, "model_a": "output_1", "model_b": "output_2"}
            vote |= {"length_a": row.get("len_1"), "length_b": row.get("len_2")}
            if vote["question"] not in labelled:
                labelled.add(vote["question"])
                yield vote | {"judge": "label", "human": True, "verdict": _numbered(label)}
            for shown, winner in zip("ab", _need(where, row, "winner_ab", "winner_ba"), strict=True):
                verdict = _numbered(winner)
                yield vote | {"judge": judge, "shown": shown, "verdict": verdict}


JUDGEBENCH = {"A>B": "a", "B>A": "b", "A=B": "tie"}


def read_judgebench(files: Sequence[str]) -> Iterator[dict]:
    """JudgeBench's results in both orders. The second decision refers to the answers in the exchanged order.

    The label is a person's vote. A judgment that is null or has no decision is an error.
    """
    for file in files:
        labelled = set()
        for where, row in read_rows(file):
            question, source, label, judgments = _need(where, row, "pair_id", "source", "label", "judgments")
            if label not in ("A>B", "B>A") or not isinstance(judgments, list) or len(judgments) not in (1, 2):
                raise ValueError(f"{where} needs label A>B or B>A and one or two judgments, it has {label!r}")
            vote = {"question": str(question), "category": source, "model_a": "response_A", "model_b": "response_B"}
            vote |= {f"length_{s}": len(row[f"response_{s.upper()}"]) for s in "ab" if f"response_{s.upper()}" in row}
            if vote["question"] not in labelled:
                labelled.add(vote["question"])
                yield vote | {"judge": "label", "human": True, "verdict": JUDGEBENCH[label]}
            for shown, judgment in zip("ab", judgments, strict=False):
                verdict = JUDGEBENCH.get((judgment or {}).get("decision"), "error")
                verdict = OTHER.get(verdict, verdict) if shown == "b" else verdict
                yield vote | {"judge": row.get("judge_name") or "judge", "shown": shown, "verdict": verdict}


def read_llmfao(files: Sequence[str]) -> Iterator[dict]:
    """llmfao's crowd and GPT votes. A file without `winner` but with result_x, result_y gives lengths and types."""
    tables = {file: list(read_rows(file)) for file in files}
    pairs = {row["id"]: row for rows in tables.values() for _, row in rows if "result_x" in row}
    for file, rows in tables.items():
        for where, row in rows:
            if "result_x" in row:
                continue
            prompt, left, right, winner = _need(where, row, "prompt", "left", "right", "winner")
            pair = pairs.get(row.get("id"), {})
            yield {
                "question": str(prompt),
                "category": pair.get("type"),
                "model_a": left,
                "model_b": right,
                "judge": f"worker_{row['worker']}" if "worker" in row else Path(file).name.split("-")[0],
                "human": "worker" in row,
                "shown": "a",
                "verdict": _winner(winner),
                # x and y are the models in the order of left and right
                "length_a": pair.get("result_x"),
                "length_b": pair.get("result_y"),
            }


def read_verdicts(files: Sequence[str]) -> Iterator[dict]:
    """Our own verdicts.jsonl: the fields of `Verdict`."""
    for file in files:
        for where, row in read_rows(file):
            _need(where, row, "question", "model_a", "model_b", "verdict", "judge")
            unknown = [name for name in row if name not in COLUMNS]
            if unknown or row["verdict"] not in OUTCOMES:
                raise ValueError(
                    f"{where}: verdict={row['verdict']!r} must be one of {', '.join(OUTCOMES)}, "
                    f"and the fields those of Verdict; unknown here: {', '.join(unknown) or 'none'}"
                )
            yield row


FORMATS = {
    "verdicts": read_verdicts,
    "alpaca_eval": read_alpaca_eval,
    "mtbench": read_mtbench,
    "arena": read_arena,
    "arena_hard": read_arena_hard,
    "pandalm": read_pandalm,
    "llmbar": read_llmbar,
    "judgebench": read_judgebench,
    "llmfao": read_llmfao,
}
