"""Official scorers and ours on the same outputs: the table of docs/evaluation.md.

    pip download --no-deps alpaca_eval==0.6.6 fschat==0.2.36 rewardbench==0.1.4 -d WHEELS
    python bench/official.py WHEELS ../shared/reference/evaluation

The scoring functions are taken from the wheels by name: the packages themselves ask for servers, keys and other
versions of what is installed here. Rows without a wheel compare with the value that a benchmark published for the file.
"""

import ast
import csv
import gzip
import json
import math
import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from scipy.special import logsumexp

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.clients import Answer  # noqa: E402
from evals.agreement import by_group, judge_pairs, split_judge  # noqa: E402
from evals.benchmarks.both_orders import order_accuracy  # noqa: E402
from evals.benchmarks.reward_accuracy import SECTIONS, accuracy_table  # noqa: E402
from evals.benchmarks.rewardbench2 import ties_score  # noqa: E402
from evals.lc_weights import predicted_rates, read_weights  # noqa: E402
from evals.ratings import rate  # noqa: E402
from evals.readers import read_votes  # noqa: E402
from evals.top_logprobs import second_share  # noqa: E402
from evals.winrate import win_rate  # noqa: E402


def taken(wheels: Path, package: str, module: str, names: tuple[str, ...], **needs) -> dict:
    """The functions and constants of these names in a wheel's module, with what they need of others."""
    (wheel,) = wheels.glob(f"{package}-*.whl")
    tree = ast.parse(zipfile.ZipFile(wheel).read(module).decode())
    wanted = [node for node in tree.body if _name(node) in names]
    space = {"np": np, "pd": pd, "math": math, "re": re, "logsumexp": logsumexp, **needs}
    source = "from __future__ import annotations\n" + "\n".join(map(ast.unparse, wanted))
    exec(compile(source, module, "exec"), space)
    return space


def _name(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Assign):
        return getattr(node.targets[0], "id", None)
    return getattr(node, "name", None)


def given_values(folder: Path, section: str) -> dict:
    """What the official code said of these files."""
    return json.loads((folder / "reference_given.json").read_text())["given"][section]


def alpaca_eval(wheels: Path, folder: Path) -> list[tuple]:
    """Raw rates, the log-prob verdict, and length-controlled rates from published weights."""
    rows, weights = [], read_weights(str(folder / "alpaca_eval/ae2_lc_glm_weights.csv"))
    votes = pd.read_csv(folder / "alpaca_eval/ae2_weighted_annotations.csv.gz")
    board = pd.read_csv(folder / "alpaca_eval/ae2_leaderboard.csv", index_col=0)
    with gzip.open(folder / "alpaca_eval/instruction_difficulty_recovered.csv.gz", "rt") as file:
        difficulty = np.array([float(row["instruction_difficulty"]) for row in csv.DictReader(file)])
    models = sorted(set(votes["model"]) & set(board.index))
    raw, controlled = [], []
    for model in models:
        p = votes.loc[votes["model"] == model, "preference"].to_numpy(float)
        raw.append((board["win_rate"][model], win_rate(np.where(p == 0, 0.5, p - 1))["win_rate"]))
    for model, official in given_values(folder, "lc_from_published_weights").items():
        ours = 100 * predicted_rates(weights[model], {"difficulty": 0.0, "model": 0.0}, difficulty).mean()
        controlled.append((official["lc"], ours))
    rows.append(largest("AlpacaEval 2 win rate, %", "leaderboard", raw))
    rows.append(largest("AlpacaEval 2 length-controlled, % (published weights)", "alpaca_eval 0.6.6", controlled))
    module = "alpaca_eval/completion_parsers.py"
    parse = taken(wheels, "alpaca_eval", module, ("logprob_parser",))["logprob_parser"]
    rng, shares = np.random.default_rng(0), []
    for _ in range(200):
        likely = {name: float(-rng.exponential(3)) for name in rng.choice(["m", "M", "The", "A"], 3, replace=False)}
        told = [{"token": name, "logprob": value} for name, value in likely.items()]
        completion = {"logprobs": {"content": [{"top_logprobs": told}]}}
        (official,) = parse(completion, "m", ["m", "M"], is_binarize=False)
        ours, _ = second_share(Answer("", "length", 1, 1, top_logprobs=json.dumps(likely)))
        shares.append((official, float("nan") if ours is None else ours + 1))
    return [*rows, largest("AlpacaEval 2 verdict by log-probs", "alpaca_eval 0.6.6", shares)]


def mt_bench(wheels: Path, folder: Path) -> list[tuple]:
    """Agreement of GPT-4 and of people with people, first turns."""
    names = (
        "get_judge_name",
        "revert",
        "get_mt_bench_votes_data",
        "convertvote",
        "equalvote",
        "get_mt_bench_agreement",
    )
    official = taken(wheels, "fschat", "fastchat/llm_judge/compute_agreement.py", names)
    files = [folder / f"mtbench/{name}.jsonl" for name in ("human", "gpt4_pair")]
    raw = [[json.loads(row) for row in file.read_text().splitlines()] for file in files]
    raw[1] = [row | {"judge": ["gpt-4", "pair-v2"]} for row in raw[1]]  # the name that FastChat looks for
    data = official["get_mt_bench_votes_data"](raw)
    people, judge = split_judge(read_votes(list(map(str, files)), "mtbench"), judge=None, humans="expert_*")
    ours = by_group(judge_pairs(people, judge), symmetric=False, level=0.95, rounds=2)
    rows = []
    for turn in (1, 2):
        for name, ban in (("agreement", []), ("agreement_no_ties", ["tie"])):
            agree, total = official["get_mt_bench_agreement"](data[turn - 1], "gpt4-pair", "human", ban)
            label = f"MT-Bench {name.replace('_', ' ')}, turn {turn}"
            rows.append((label, "fschat 0.2.36", agree / total, ours["turns"][str(turn)][name]))
    return rows


def reward_bench(wheels: Path) -> list[tuple]:
    """Sections of version 1 and Ties of version 2, on scores that are drawn."""
    constants = taken(wheels, "rewardbench", "rewardbench/constants.py", ("EXAMPLE_COUNTS", "SUBSET_MAPPING"))
    names = ("calculate_scores_per_section", "sample_stats", "process_single_model")
    # the last wants a Dataset to return its rows with their scores, which are not looked at here
    rows_of = SimpleNamespace(from_dict=lambda columns: columns)
    official = taken(wheels, "rewardbench", "rewardbench/utils.py", names, Dataset=rows_of)
    rng = np.random.default_rng(0)
    subsets = [subset for own in SECTIONS.values() for subset in own for _ in range(7)]
    scores = rng.normal(size=(len(subsets), 2)) + [0.7, 0]
    table = accuracy_table(subsets, scores)
    accuracy = {name: row["accuracy"] for name, row in table["subsets"].items()}
    theirs = official["calculate_scores_per_section"](
        constants["EXAMPLE_COUNTS"], constants["SUBSET_MAPPING"], accuracy
    )
    pairs = [(theirs[name], table["sections"][name]["accuracy"]) for name in SECTIONS]
    rows = [largest("RewardBench sections", "rewardbench 0.1.4", pairs)]
    groups = []
    for number in range(60):
        for kind, right in (("ref", 1), ("tied", int(rng.integers(2, 6)))):
            drawn = np.r_[rng.normal(1.5, 0.5, right), rng.normal(0, 0.5, 4)]
            groups.append({"id": f"{kind}:{number}", "num_correct": right, "scores": drawn.tolist()})
    _, overall = official["process_single_model"](groups)
    return [*rows, ("RewardBench 2 Ties", "rewardbench 0.1.4", overall, ties_score(groups)["score"])]


def published(folder: Path) -> list[tuple]:
    """Benchmarks whose files came with their figures: LLMBar, and Bradley-Terry of MT-Bench's people."""
    votes = read_votes([str(folder / "llmbar/vanilla_both_orders.csv.gz")], "llmbar")
    pairs, llmbar = [], given_values(folder, "llmbar_both_orders")
    for key in llmbar:
        subset, judge = key.split("|")
        part = votes[(votes["category"] == subset) & (votes["human"] | (votes["judge"] == judge))]
        pairs.append((llmbar[key]["acc_avg"], order_accuracy(part)["acc_avg"]["value"]))
    rows = [largest("LLMBar accuracy, both orders", "its repository", pairs)]
    people = read_votes([str(folder / "mtbench/human.jsonl")], "mtbench")
    settings = {
        "method": "bradley_terry",
        "interval": "clustered",
        "level": 0.95,
        "rounds": 0,
        "k": 4.0,
        "anchor": None,
    }
    ours, theirs = rate(people, **settings)["ratings"], given_values(folder, "mtbench_ratings")["human"]["bt"]
    pairs = [(theirs[name], ours[name]["rating"]) for name in theirs]
    return [*rows, largest("Bradley-Terry of MT-Bench's people, points", "fschat", pairs)]


def largest(benchmark: str, source: str, pairs: list[tuple]) -> tuple:
    """The row with the largest difference of many."""
    values = np.array(pairs, float)
    values = values[~np.isnan(values).all(axis=1)]  # no verdict on both sides
    worst = int(np.abs(values[:, 0] - values[:, 1]).argmax())
    return f"{benchmark} ({len(values)} values, the farthest)", source, *values[worst]


if __name__ == "__main__":
    wheels, folder = map(Path, sys.argv[1:3])
    print("| benchmark | official scorer | official value | ours | difference |\n| --- | --- | --- | --- | --- |")
    for row in [*alpaca_eval(wheels, folder), *mt_bench(wheels, folder), *reward_bench(wheels), *published(folder)]:
        benchmark, source, theirs, ours = row
        print(f"| {benchmark} | {source} | {theirs:.6f} | {ours:.6f} | {abs(theirs - ours):.1e} |")
