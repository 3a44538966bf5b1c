"""The verdict parsers of published benchmarks: `judge.rule=fastchat | arena_hard | alpaca_eval`.

Our own parser (`judge.rule=last`, evals/judge_output.py) is meant to be right. These reproduce the originals.
"""

import ast
import re

from evals.judge_output import Reading

ARENA_HARD = {"A>>B": ("a", 3.0), "A>B": ("a", 1.0), "A=B": ("tie", 1.0), "B>A": ("b", 1.0), "B>>A": ("b", 3.0)}
ARENA_HARD |= {"B<<A": ("a", 3.0), "B<A": ("a", 1.0), "B=A": ("tie", 1.0), "A<B": ("b", 1.0), "A<<B": ("b", 3.0)}


def fastchat_pair(text: str) -> Reading:
    """FastChat 0e6d3e4b, `run_judge_pair`: the first of [[A]], [[B]], [[C]], in this order, that occurs anywhere."""
    for mark, verdict in (("[[A]]", "a"), ("[[B]]", "b"), ("[[C]]", "tie")):
        if mark in text:
            return Reading(verdict)
    return Reading("error", why="no verdict")


def fastchat_scores(text: str) -> Reading:
    """FastChat's [[rating_a,rating_b]]: the first two numbers in double brackets; less than 0.1 apart is a tie."""
    match = re.search(r"\[\[(\d+\.?\d*),\s?(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*),\s?(\d+\.?\d*)\]", text)
    if match is None:
        return Reading("error", why="no verdict")
    a, b = map(float, match.groups())
    return Reading("tie" if abs(a - b) <= 0.1 else "a" if a > b else "b")


def fastchat_grade(text: str) -> float | None:
    """FastChat's grade: the first number in [[ ]], else the first in [ ]."""
    match = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    return float(match[1]) if match else None


def arena_hard(text: str) -> Reading:
    """arena-hard-auto 196f6b82, `get_score`: the last [[..]] of A, B, <, >, =, else the last [..], in upper case."""
    for pattern in (r"\[\[([AB<>=]+)\]\]", r"\[([AB<>=]+)\]"):
        found = re.findall(pattern, text.upper())
        if found:
            known = ARENA_HARD.get(found[-1])
            return Reading(*known) if known else Reading("error", why=f"unknown verdict {found[-1]}")
    return Reading("error", why="no verdict")


def alpaca_eval_ranking(text: str) -> Reading:
    """alpaca_eval cd543a14, `ranking_parser`: the text is a Python list whose model_1 has rank 1 or 2."""
    try:
        rank = next(row for row in ast.literal_eval(text) if row["model"] == "model_1")["rank"]
    except Exception as error:  # as in the original, any failure means that there is no verdict
        return Reading("error", why=f"not a ranking: {type(error).__name__}")
    return Reading({1: "a", 2: "b"}[rank]) if rank in (1, 2) else Reading("error", why=f"rank {rank}")


def alpaca_eval_identifier(text: str) -> Reading:
    """alpaca_eval's one-token verdict: m is the first answer, M the second."""
    return Reading(
        {"m": "a", "M": "b"}.get(text.strip(), "error"), why="" if text.strip() in ("m", "M") else "no verdict"
    )
