"""Arena-Hard's rows of experiments/official.py, by the functions of a clone of lmarena/arena-hard-auto."""

import glob
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

from evals.benchmarks.arena_hard import controlled, games_of, score, style_of
from evals.readers import read_votes
from experiments.official_code import largest, taken

CLONE = "arena-hard-auto 196f6b8"
VERDICTS = ("A>>B", "A>B", "A=B", "B>A", "B>>A")


def arena_hard(clone: Path) -> list[tuple]:
    """Version 0.1: published answers of three models and random verdicts. Tokens are our words on both sides."""
    category, base = "arena-hard-v0.1", "gpt-4-0314"
    files = sorted(clone.glob(f"data/{category}/model_answer/*.jsonl"))
    style, rows = style_of([str(file) for file in files]), []
    answers = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    names = ("count_markdown_elements", "remove_pattern", "get_element_counts")
    count = taken((clone / "utils/add_markdown_info.py").read_text(), names)["get_element_counts"]
    counted = count(pd.DataFrame(answers), "messages")
    kinds = {"headers": "header_count", "lists": "list_count", "bold": "bold_count"}
    pairs = []
    theirs: dict = {}
    for row, marks in zip(answers, counted, strict=True):
        ours = style[row["model"], row["uid"]]
        pairs += [(sum(marks[key].values()), ours[name]) for name, key in kinds.items()]
        theirs.setdefault(row["model"], {})[row["uid"]] = {"token_len": int(ours["tokens"])} | marks
    rows.append(largest("Arena-Hard headers, lists and bold spans", CLONE, pairs))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "data", category, "model_judgment", "drawn", "all.jsonl")
        file.parent.mkdir(parents=True)
        file.write_text("\n".join(map(json.dumps, drawn_games(theirs, category, base))))
        ours = games_of(read_votes([str(file)], "arena_hard"), {category: base})[0]
        battles, without = arena_hard_scores(clone, folder, theirs, category)
    plain = battles.groupby("model")["scores"].mean()
    rows.append(
        largest(
            "Arena-Hard score, %",
            CLONE,
            [(100 * plain[name], score(own, 0.9)["value"]) for name, own in ours.groupby("model")],
        )
    )
    found = controlled(ours, style, level=0.9, rounds=2)["models"]
    pairs = [(100 * without[name], row["value"]) for name, row in found.items()]
    return [*rows, largest("Arena-Hard score without style, %", CLONE, pairs)]


def drawn_games(style: dict, category: str, base: str) -> list[dict]:
    """A judgment of every answer against the baseline's. It favours the longer one, and some games have no verdict."""
    rng, rows = np.random.default_rng(0), []
    for model in sorted(set(style) - {base}):
        for uid, own in style[model].items():
            likes = np.log(own["token_len"] / max(style[base][uid]["token_len"], 1)) + rng.normal(0, 1, 2)
            first, second = np.digitize(likes, (-1.5, -0.3, 0.3, 1.5))
            games = [
                {"score": None if rng.random() < 0.02 else verdict}
                for verdict in (VERDICTS[first], VERDICTS[4 - second])
            ]
            row = {"uid": uid, "category": category, "judge": "drawn", "model": model, "baseline": base}
            rows.append(row | {"games": games})
    return rows


def arena_hard_scores(clone: Path, folder: str, style: dict, category: str) -> tuple[pd.DataFrame, pd.Series]:
    """The official battles, and {model: score without style} by its fit to all of them instead of to resamples."""
    names = (
        "BTModel",
        "bt_loss",
        "register_loss",
        "register_model",
        "fit_pairwise_model",
        "one_hot_encode",
        "to_winrate_probabilities",
    )
    maths = taken(
        (clone / "utils/math_utils.py").read_text(),
        names,
        torch=torch,
        nn=torch.nn,
        optim=torch.optim,
        F=torch.nn.functional,
        REGISTER_LOSSES={},
        REGISTER_MODELS={},
    )
    constants = taken((clone / "utils/judge_utils.py").read_text(), ("OG_ARENA_HARD_PROMPT", "JUDGE_SETTINGS"))
    fit, kept = maths["fit_pairwise_model"], []

    def keep(scores, lower, upper):
        kept.append(scores)
        return scores

    needs = {
        "torch": torch,
        "glob": glob.glob,
        "tqdm": lambda rows: rows,
        "print": lambda *words: None,
        "os": SimpleNamespace(path=SimpleNamespace(join=lambda *parts: str(Path(folder, *parts)))),
        "get_model_style_metadata": lambda benchmark: style,
        "bootstrap_pairwise_model": lambda features, won, loss_type: (fit(features, won)[0][None], None),
        "format_confidence_interval": keep,
        "JUDGE_SETTINGS": constants["JUDGE_SETTINGS"],
    }
    shown = ("load_judgments", "print_leaderboard_with_style_features")
    official = taken((clone / "show_result.py").read_text(), shown, **maths | needs)
    battles = official["load_judgments"](["drawn"], category)
    official["print_leaderboard_with_style_features"](battles, category, category, ["length", "markdown"])
    return battles, kept[0].set_index("model")["scores"]
