"""Official scorers and ours on the same outputs: the table of docs/evaluation.md.

    pip download --no-deps alpaca_eval==0.6.6 fschat==0.2.36 rewardbench==0.1.4 -d WHEELS
    git clone https://github.com/lmarena/arena-hard-auto ARENA_HARD
    python experiments/official.py WHEELS ARENA_HARD ../shared/reference

The scoring functions are taken by name from the wheels and the clone, because the packages themselves need servers,
keys, and other versions of installed packages. lm-eval (the dev extra) is imported. Other rows compare with the value
that a benchmark published for the file.
"""

import csv
import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from evals.agreement import by_group, judge_pairs, split_judge  # noqa: E402
from evals.benchmarks.both_orders import order_accuracy  # noqa: E402
from evals.benchmarks.gsm8k import harness_matches  # noqa: E402
from evals.benchmarks.reward_accuracy import SECTIONS, accuracy_table  # noqa: E402
from evals.benchmarks.rewardbench2 import ties_score  # noqa: E402
from evals.lc_weights import predicted_rates, read_weights  # noqa: E402
from evals.ratings import rate  # noqa: E402
from evals.readers import read_votes  # noqa: E402
from evals.top_logprobs import second_share  # noqa: E402
from evals.winrate import win_rate  # noqa: E402
from experiments.official_arena_hard import arena_hard  # noqa: E402
from experiments.official_code import in_wheel, largest, taken  # noqa: E402
from generation.clients import Answer  # noqa: E402


def given_values(folder: Path, section: str) -> dict:
    """The values that the official code computed for these files."""
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
    source = in_wheel(wheels, "alpaca_eval", "alpaca_eval/completion_parsers.py")
    parse = taken(source, ("logprob_parser",))["logprob_parser"]
    rng, shares = np.random.default_rng(0), []
    for _ in range(200):
        likely = {name: float(-rng.exponential(3)) for name in rng.choice(["m", "M", "The", "A"], 3, replace=False)}
        top_logprobs = [{"token": name, "logprob": value} for name, value in likely.items()]
        completion = {"logprobs": {"content": [{"top_logprobs": top_logprobs}]}}
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
    official = taken(in_wheel(wheels, "fschat", "fastchat/llm_judge/compute_agreement.py"), names)
    files = [folder / f"mtbench/{name}.jsonl" for name in ("human", "gpt4_pair")]
    raw = [[json.loads(row) for row in file.read_text().splitlines()] for file in files]
    raw[1] = [row | {"judge": ["gpt-4", "pair-v2"]} for row in raw[1]]  # the name that FastChat expects
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
    """Sections of version 1 and Ties of version 2, on random scores."""
    source = in_wheel(wheels, "rewardbench", "rewardbench/constants.py")
    constants = taken(source, ("EXAMPLE_COUNTS", "SUBSET_MAPPING"))
    names = ("calculate_scores_per_section", "sample_stats", "process_single_model")
    # the last function returns its rows in a Dataset, which is not used here
    rows_of = SimpleNamespace(from_dict=lambda columns: columns)
    official = taken(in_wheel(wheels, "rewardbench", "rewardbench/utils.py"), names, Dataset=rows_of)
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


def gsm8k(folder: Path) -> list[tuple]:
    """lm-eval's two string matches on the test problems, with their solutions in several wordings as answers."""
    import lm_eval
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    config = yaml.safe_load(Path(lm_eval.__file__).with_name("tasks").joinpath("gsm8k/gsm8k.yaml").read_text())
    (metric,) = config["metric_list"]
    ignored = {key: metric[key] for key in ("regexes_to_ignore", "ignore_case", "ignore_punctuation")}
    with gzip.open(folder / "gsm8k/test.jsonl.gz", "rt", encoding="utf-8") as file:
        solutions = [json.loads(line)["answer"] for line in file]
    answers = reworded(solutions)
    official = []
    for chain in config["filter_list"]:
        words = {key: value for key, value in chain["filter"][0].items() if key != "function"}
        found = RegexFilter(**words).apply([[answer] for answer in answers], [{}] * len(answers))
        official.append(
            [
                exact_match_hf_evaluate(predictions=[first], references=[solution], **ignored)["exact_match"]
                for (first,), solution in zip(found, solutions, strict=True)
            ]
        )
    ours = np.array([harness_matches(*pair) for pair in zip(answers, solutions, strict=True)], float).T
    apart = int((np.array(official, float) != ours).sum())
    label = f"{len(answers)} answers, {apart} parsed differently"
    return [
        (f"GSM8K {chain['name']} ({label})", "lm-eval 0.4.13", np.mean(theirs), own.mean())
        for chain, theirs, own in zip(config["filter_list"], official, ours, strict=True)
    ]


ENDINGS = (
    "\n#### {}",
    "\n#### ${}.",
    "\nThe answer is {}.",
    "\nSo it is **${}**",
    "\n#### {}\nDone in 2 steps.",
    "\n\\boxed{{{}}}",
    " ####{}",
)


def reworded(solutions: list[str]) -> list[str]:
    """The solutions in wordings of models: with a wrong number, without ####, in dollars, with a full stop."""
    rng, answers = np.random.default_rng(0), []
    for solution in solutions:
        steps, _, number = solution.partition("\n#### ")
        number = number if rng.random() < 0.7 else str(int(rng.integers(1, 2000)))
        answers.append(steps + str(rng.choice(ENDINGS)).format(number))
    return answers


def published(folder: Path) -> list[tuple]:
    """Benchmarks whose files include their figures: LLMBar, and Bradley-Terry of MT-Bench's people."""
    votes = read_votes([str(folder / "llmbar/vanilla_both_orders.csv.gz")], "llmbar")
    pairs, llmbar = [], given_values(folder, "llmbar_both_orders")
    for key in llmbar:
        subset, judge = key.split("|")
        part = votes[(votes["category"] == subset) & (votes["human"] | (votes["judge"] == judge))]
        pairs.append((llmbar[key]["acc_avg"], order_accuracy(part)["acc_avg"]["value"]))
    rows = [largest("LLMBar accuracy, both orders", "its repository", pairs)]
    people = read_votes([str(folder / "mtbench/human.jsonl")], "mtbench")
    rated = rate(people, method="bradley_terry", interval="clustered", level=0.95, rounds=0, k=4.0, anchor=None)
    ours, theirs = rated["ratings"], given_values(folder, "mtbench_ratings")["human"]["bt"]
    pairs = [(theirs[name], ours[name]["rating"]) for name in theirs]
    return [*rows, largest("Bradley-Terry of MT-Bench's people, points", "fschat", pairs)]


if __name__ == "__main__":
    wheels, clone, reference = map(Path, sys.argv[1:4])
    folder = reference / "evaluation"
    print("| benchmark | official scorer | official value | ours | difference |\n| --- | --- | --- | --- | --- |")
    rows = [*alpaca_eval(wheels, folder), *mt_bench(wheels, folder), *reward_bench(wheels), *published(folder)]
    for benchmark, source, theirs, ours in [*rows, *arena_hard(clone), *gsm8k(reference)]:
        print(f"| {benchmark} | {source} | {theirs:.6f} | {ours:.6f} | {abs(theirs - ours):.1e} |")
