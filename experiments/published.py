"""Published numbers compared with ours on local data, in one table.

    python -m experiments.published

Each row has its source, the published value, ours, the largest difference and its bound. If many values belong to one
row (all models of a leaderboard), the table shows one of them and the number of all. Some of the data may not be
distributed (CC BY-NC). Rows that need missing files are left out, and the command names these files. --fast leaves out
the rows that train, which take minutes.
"""

import argparse
import csv
import gzip
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from advantages import kl_estimate, missing_eos, whiten  # noqa: E402
from evals.agreement import agreement_of, human_pairs, judge_pairs, kappa, majority_agreement, split_judge, vote_tables  # noqa: E402, E501
from evals.benchmarks.both_orders import order_accuracy  # noqa: E402
from evals.best_of_n import best_of_n_kl, expected_best  # noqa: E402
from evals.lc_weights import predicted_rates, read_weights  # noqa: E402
from evals.overoptimization import fit  # noqa: E402
from evals.ratings import rate  # noqa: E402
from evals.readers import read_votes  # noqa: E402
from evals.winrate import win_rate  # noqa: E402
from kernels.gae import gae  # noqa: E402
from kernels.logprob import linear_logprob, linear_logprob_ref  # noqa: E402
from losses import ppo_value_loss, token_rewards  # noqa: E402
from runtime.report import print_table  # noqa: E402

REFERENCE = ROOT.parent / "shared" / "reference" / "evaluation"
REFITTED = ("dbrx-instruct", "llama-2-70b-chat-hf", "alpaca-7b_concise", "alpaca-7b_verbose")  # of AlpacaEval 2. The
# published weights of these four do not give their published rate, also by alpaca_eval's own formula
FILES = """alpaca_eval/: annotations of the leaderboards without texts, leaderboard CSVs, weights of the length control
  (github.com/tatsu-lab/alpaca_eval, results/; CC BY-NC 4.0)
mtbench/: human and GPT-4 votes (huggingface.co/datasets/lmsys/mt_bench_human_judgments, CC BY 4.0)
pandalm/, llmbar/, llmfao/: the test sets of PandaLM, LLMBar and LLMFAO with people's and judges' labels
reference_given.json: the values of the official programs for these files"""


class Row(NamedTuple):
    """Pairs of published value and ours, by name."""

    topic: str
    source: str
    pairs: dict[str, tuple[float, float]]
    bound: float  # largest difference that counts as equal

    @property
    def difference(self) -> float:
        return max(float(abs(theirs - ours)) for theirs, ours in self.pairs.values())

    @property
    def holds(self) -> bool:
        return self.difference <= self.bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, default=REFERENCE)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "published")
    parser.add_argument("--fast", action="store_true", help="without what trains")
    args = parser.parse_args()
    started, missing = time.monotonic(), []
    rows: list[Row] = []
    for job in [*OWN, *FROM_FILES, *([] if args.fast else TRAINED)]:
        print(f"{job.__name__} ...", file=sys.stderr)
        try:
            rows += job(args.reference)
        except FileNotFoundError as error:
            missing.append(f"{job.__name__}: {error.filename}")
    args.out.mkdir(parents=True, exist_ok=True)
    write(rows, missing, args.out)
    shown = [(row.topic, row.source, *example(row), verdict(row)) for row in rows]
    print_table("published numbers", ("what", "source", "published", "ours", "differs by", "verdict"), shown)
    if missing:
        print("left out, as files are missing:", *missing, f"Put them into {args.reference}:\n{FILES}", sep="\n  ")
    print(f"{sum(row.holds for row in rows)} of {len(rows)} rows hold, {time.monotonic() - started:.0f} s: {args.out}")
    raise SystemExit(0 if all(row.holds for row in rows) else 1)


def example(row: Row) -> tuple[str, str, str]:
    """The pair with the largest difference, and this difference."""
    name, (theirs, ours) = max(row.pairs.items(), key=lambda item: abs(item[1][0] - item[1][1]))
    count = "" if len(row.pairs) == 1 else f" ({name}, the largest difference of {len(row.pairs)})"
    return f"{theirs:.6g}{count}", f"{ours:.6g}", f"{row.difference:.1e}"


def verdict(row: Row) -> str:
    return f"holds (bound {row.bound:g})" if row.holds else f"DIFFERS (bound {row.bound:g})"


def write(rows: list[Row], missing: list[str], out: Path) -> None:
    """Write published.json and published.md."""
    found = [row._asdict() | {"difference": row.difference, "holds": row.holds} for row in rows]
    (out / "published.json").write_text(
        json.dumps({"rows": found, "missing": missing}, indent=1, default=float), encoding="utf-8"
    )
    lines = ["| what | source | published | ours | differs by | |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [f"| {' | '.join((row.topic, row.source, *example(row), verdict(row)))} |" for row in rows]
    (out / "published.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---- rows without files


def best_of_n(reference: Path) -> Iterator[Row]:
    """KL of best of n by enumeration: the best of n independent draws out of 5,000 equally likely texts."""
    m, pairs = 5000, {}
    for n in (2, 4, 16):
        share = np.diff((np.arange(m + 1) / m) ** n)
        pairs[f"n = {n}"] = float(best_of_n_kl(np.array([n]))[0]), float((share * np.log(share * m)).sum())
    yield Row(
        "KL of best of n", "log n - (n - 1) / n, Stiennon et al. 2020, App. G.3; exact over 5,000 texts", pairs, 2e-3
    )
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(2, 50, 64))
    chosen = rng.random((2000, 50, 64)).argsort(2)[..., :8]  # 2,000 subsets of each prompt's completions
    rows = np.arange(50)[:, None]
    best = np.take_along_axis(chosen, proxy[rows, chosen].argmax(2)[..., None], 2)[..., 0]
    drawn = gold[np.arange(50), best]
    ours = float(expected_best(proxy, gold, np.array([8])).mean())
    yield Row("reward of best of 8", "100,000 subsets drawn", {"mean": (float(np.mean(drawn)), ours)}, 0.02)


def gao(reference: Path) -> Iterator[Row]:
    """Coefficients recovered from curves of Gao et al.'s two forms."""
    d = np.linspace(0.1, 4, 12)
    pairs: dict[str, tuple] = {}
    for form, bent in (("best_of_n", d**2), ("rl", d * np.log(d))):
        alpha, beta = fit(d, 1.5 * d - 0.4 * bent, form)
        pairs |= {f"{form}: alpha": (1.5, alpha), f"{form}: beta": (0.4, beta)}
    yield Row("fits of over-optimisation", "Gao et al. 2023, Eq. 1 and 2, on curves of known coefficients", pairs, 1e-6)


def krippendorff(reference: Path) -> Iterator[Row]:
    """Four observers, twelve units, to the third decimal."""
    from data.checks.agreement import alpha_of

    lines = ("1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 .")
    units = list(zip(*(line.split() for line in lines), strict=True))
    counts = np.array([[unit.count(str(label)) for label in range(1, 6)] for unit in units])  # (units, labels)
    published = {"nominal": 0.743, "ordinal": 0.815, "interval": 0.849}
    pairs = {level: (value, alpha_of(counts, level, range(1, 6))) for level, value in published.items()}
    yield Row("Krippendorff's alpha", "Krippendorff 2011, his own example", pairs, 6e-4)


def trl_ppo(reference: Path) -> Iterator[Row]:
    """One rollout's rewards, advantages and losses as TRL computed them (tests/trl_ppo_step.json)."""
    golden = json.loads((ROOT / "tests" / "trl_ppo_step.json").read_text())
    of, theirs = ({k: torch.tensor(v) for k, v in golden[name].items()} for name in ("rollout", "theirs"))
    mask, states, values = of["mask"], of["value_mask"], of["values"]
    scores = missing_eos(of["scores"], of["finished"], mode="subtract", value=1.0)
    kl = kl_estimate(of["logprobs"] - of["ref_logprobs"], "k1")
    rewards = token_rewards(scores, kl, mask, states, kl_coef=0.05)
    advantages = gae(rewards, values, states, gamma=1.0, gae_lambda=0.95)
    bessel = ((mask.sum() - 1) / mask.sum()).sqrt()  # TRL uses the unbiased variance
    loss, _ = ppo_value_loss(values, values, advantages + values, states, clip_range=0.2, num_tokens=states.sum())
    white = whiten(advantages, mask, lambda x: x, shift_mean=True) * bessel
    ours = {
        "rewards": rewards,
        "advantages": advantages,
        "value loss": loss,
        "whitened advantages": white,
        "KL per sequence": kl.sum(1).mean(),
    }
    pairs = {name: farthest(theirs[name], value) for name, value in ours.items()}
    yield Row("a PPO step", f"TRL {golden['trl']}, tests/parity/trl_ppo.py", pairs, 2e-5)


def farthest(theirs: torch.Tensor, ours: torch.Tensor) -> tuple[float, float]:
    """The pair of elements with the largest difference."""
    place = (theirs - ours).abs().flatten().argmax()
    return theirs.flatten()[place].item(), ours.flatten()[place].item()


def logprobs(reference: Path) -> Iterator[Row]:
    """The kernel's log-probs and gradients in float32, compared with the definition in float64."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(129, 64), torch.randn(5001, 64) / 8, torch.randint(0, 5001, (129,))

    def run(function, dtype):
        given = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        out = function(*given, targets)
        return out.detach(), *torch.autograd.grad(out.sum(), given)

    exact, ours = run(linear_logprob_ref, torch.float64), run(linear_logprob, torch.float32)
    names = ("log-prob", "gradient of hidden states", "gradient of the weight")
    pairs = {name: farthest(a, b.double()) for name, a, b in zip(names, exact, ours, strict=True)}
    yield Row("log-probs without logits", "the definition in float64", pairs, 5e-6)


# ---- rows that read files


def alpaca_eval(reference: Path) -> Iterator[Row]:
    """Win rates of every model of both leaderboards, and length-controlled rates from the published weights."""
    folder = reference / "alpaca_eval"
    for version, name in ((1, "ae1_gpt4_annotations"), (2, "ae2_weighted_annotations")):
        rows = pd.read_csv(folder / f"{name}.csv.gz")
        board = pd.read_csv(folder / f"ae{version}_leaderboard.csv", index_col=0)["win_rate"]
        pairs = {}
        for model, own in rows[rows["model"].isin(board.index)].groupby("model"):
            preference = np.where(own["preference"] == 0, 0.5, own["preference"] - 1)
            pairs[model] = float(board[model]), win_rate(preference)["win_rate"]
        yield Row(f"AlpacaEval {version}, win rates", "alpaca_eval's leaderboard, its annotations", pairs, 1e-6)
    with gzip.open(folder / "instruction_difficulty_recovered.csv.gz", "rt") as file:
        difficulty = np.array([float(row["instruction_difficulty"]) for row in csv.DictReader(file)])
    weights = read_weights(str(folder / "ae2_lc_glm_weights.csv"))
    board = pd.read_csv(folder / "ae2_leaderboard.csv", index_col=0)["length_controlled_winrate"].dropna()
    baseline = {"difficulty": 0.0, "model": 0.0}
    pairs = {
        model: (float(board[model]), float(100 * predicted_rates(own, baseline, difficulty).mean()))
        for model, own in weights.items()
        if model in board.index
    }
    apart = {model: pairs.pop(model) for model in REFITTED}
    source = "its leaderboard, from its published weights"
    yield Row("AlpacaEval 2, length-controlled rates", source, pairs, 1e-6)
    yield Row("the same, weights and rate of two fits", source, apart, 0.2)


def mt_bench(reference: Path) -> Iterator[Row]:
    """Agreement of GPT-4 with people and of people with each other; ratings of the people's votes."""
    folder = reference / "mtbench"
    files = existing(folder / "human.jsonl", folder / "gpt4_pair.jsonl")
    votes, known = read_votes(files, "mtbench"), given(reference)
    people, judge = split_judge(votes, judge=None, humans="expert_*")
    pairs, rounded = {}, {}
    paper = {"gpt4-pair|human": (0.66, 0.85), "human|human": (0.63, 0.81)}
    for name, both in (("gpt4-pair|human", judge_pairs(people, judge)), ("human|human", human_pairs(people))):
        first = agreement_of(both[both["turn"] == 1], symmetric=False, level=0.95, rounds=2)
        ours = first["agreement"], first["agreement_no_ties"]
        for kind, value, printed in zip(("with_tie", "no_tie"), ours, paper[name], strict=True):
            pairs[f"{name}, {kind}"] = known["mtbench_official_agreement"][f"turn1|{name}|{kind}"]["ratio"], value
            rounded[f"{name}, {kind}"] = printed, value
    yield Row("MT-Bench agreement, turn 1", "Zheng et al. 2023, Table 5 (two digits)", rounded, 5.1e-3)
    yield Row("MT-Bench agreement, turn 1", "FastChat's notebook on the same votes", pairs, 1e-9)
    people = read_votes(files[:1], "mtbench")
    ratings = known["mtbench_ratings"]
    how: dict[str, Any] = {"level": 0.95, "rounds": 100, "k": 4.0, "anchor": None}
    fitted = rate(people, method="bradley_terry", interval="sandwich", **how)["ratings"]
    online = rate(people, method="elo", interval="bootstrap", **how | {"rounds": 2})["ratings"]
    of = lambda table, name: {model: row[name] for model, row in table.items()}  # noqa: E731
    yield Row(
        "Bradley-Terry of people's votes",
        "FastChat, MT-Bench",
        zipped(ratings["human"]["bt"], of(fitted, "rating")),
        0.05,
    )
    yield Row(
        "Elo in the order of the file",
        "FastChat, MT-Bench",
        zipped(ratings["human"]["elo_online_file_order"], of(online, "rating")),
        1e-6,
    )
    ends: dict[str, tuple] = {}
    for model, row in ratings["human_arena_rank_sandwich_ci"].items():
        ends |= {f"{model}: {name}": (value, fitted[model][name]) for name, value in row.items()}
    yield Row("intervals of Bradley-Terry", "arena-rank 0.1.1, MT-Bench", ends, 0.01)


def pandalm(reference: Path) -> Iterator[Row]:
    """People's agreement and PandaLM-7B's accuracy on its test set."""
    votes = read_votes(existing(reference / "pandalm" / "testset_v1_labels.csv.gz"), "pandalm")
    known = given(reference)["pandalm"]
    one, two = (votes[votes["judge"] == f"annotator{i}"] for i in (1, 2))
    tables = vote_tables(judge_pairs(one, two), symmetric=False)
    judge = votes[(votes["judge"] == "pandalm7b") & (votes["verdict"] != "error")]
    ours = majority_agreement(votes[votes["human"]], judge)["agreement"]
    yield Row("PandaLM-7B's accuracy, %", "Wang et al. 2023, Table 3", {"accuracy": (66.77, 100 * ours)}, 5.1e-3)
    pairs = {"kappa of people": (known["annotator1|annotator2 cohen"], kappa(tables.sum(0)))}
    yield Row("PandaLM's people", "scikit-learn on its test set; the paper prints .85", pairs, 1e-9)


def llmbar(reference: Path) -> Iterator[Row]:
    """Accuracies of five judges over both orders."""
    votes = read_votes(existing(reference / "llmbar" / "vanilla_both_orders.csv.gz"), "llmbar")
    pairs: dict[str, tuple] = {}
    for key, row in given(reference)["llmbar_both_orders"].items():
        subset, judge = key.split("|")
        own = order_accuracy(votes[(votes["category"] == subset) & (votes["human"] | (votes["judge"] == judge))])
        pairs |= {
            f"{key}: {n}": (100 * row[n], 100 * own[n]["value"]) for n in ("acc_avg", "acc_both", "agreement_rate")
        }
    yield Row("LLMBar, accuracy over both orders, %", "Zeng et al. 2024, its result files", pairs, 1e-6)


def existing(*paths: Path) -> list[str]:
    """The paths as text. Raises FileNotFoundError for the first that is missing."""
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(2, "no such file", str(path))
    return [str(path) for path in paths]


def given(reference: Path) -> dict:
    """The values of the official programs for the same files."""
    return json.loads(Path(*existing(reference / "reference_given.json")).read_text())["given"]


def zipped(theirs: dict[str, float], ours: dict[str, float]) -> dict[str, tuple[float, float]]:
    return {name: (value, ours[name]) for name, value in theirs.items()}


# ---- rows that train: the optimum in closed form, pi*(y) ~ pi_ref(y) exp(r(y) / beta)


def closed_form(reference: Path) -> Iterator[Row]:
    """KL of each trained policy to the optimum, three seeds. The published optimum is at 0 nats."""
    from tests.enumerable_task import TabularPolicy, kl_to, make_task, optimum
    from tests.enumerable_training import train_dpo, train_ppo
    from tests.test_exact_optimum import FAMILY

    def distance(seed: int, train: Callable, coefficient: float) -> float:
        logits, rewards = make_task(seed)
        return kl_to(train(seed), optimum(TabularPolicy(logits), rewards, coefficient))

    family = {"ppo": {"samples_per_prompt": 1}}
    family |= {name: {"samples_per_prompt": 1 if name == "reinforce_pp" else 4} | how for name, how in FAMILY.items()}
    for name, how in family.items():
        train = lambda seed, how=how: train_ppo(seed, kl_coef=0.5, **how)  # noqa: E731
        pairs = {f"seed {seed}": (0.0, distance(seed, train, 0.5)) for seed in (0, 1, 2)}
        yield Row(f"{name}: nats to the optimum", "closed form, KL coefficient .5", pairs, 2e-3)
    pairs = {f"seed {seed}": (0.0, distance(seed, lambda s: train_dpo(s, beta=0.5), 0.5)) for seed in (0, 1, 2)}
    yield Row("dpo: nats to the optimum", "closed form, beta .5", pairs, 1e-2)


OWN = (best_of_n, gao, krippendorff, trl_ppo, logprobs)
FROM_FILES = (alpaca_eval, mt_bench, pandalm, llmbar)
TRAINED = (closed_form,)

if __name__ == "__main__":
    main()
