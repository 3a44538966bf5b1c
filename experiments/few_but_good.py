"""Compare selections of check=quality with random rows: SFT of the tiny model on equally many coffee orders.

    python experiments/few_but_good.py --out runs/few_but_good

Every model takes the same number of steps with the same tokenizer. Three seeds draw other rows and other weights. Loss:
per assistant token on held-out dialogues. Win rate: against the model of random rows of the same size and seed; the
greedy completion that is closer (ROUGE-L) to the barista's answer wins. Intervals are over seeds.
"""

import argparse
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from data import formats  # noqa: E402
from data.records import BadRows, read_jsonl, read_records  # noqa: E402
from evals.intervals import t_interval  # noqa: E402
from generation.filters import rouge_l  # noqa: E402
from runtime.files import write_whole  # noqa: E402
from runtime.plots import plot_intervals  # noqa: E402

COFFEE = "data/embedded/sft_coffee_train.jsonl.gz"
SELECTIONS = {  # `policy` is the model of all dialogues
    "random": ["check.by=random", "check.diversity=none"],
    "plain": ["check.by=plain"],
    "length": ["check.by=length", "check.diversity=none"],
    "difficulty": ["check.by=difficulty", "check.diversity=none", "policy=POLICY"],
    "embeddings": ["check.by=plain", "check.diversity=embeddings", "policy=POLICY"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/few_but_good")
    parser.add_argument("--sizes", type=int, nargs="+", default=[200])
    parser.add_argument("--kinds", nargs="+", default=list(SELECTIONS), choices=SELECTIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    args.out = args.out.resolve()  # the scripts run in the project's directory
    if "random" not in args.kinds:
        parser.error("--kinds needs random, which the others are compared with")

    held_out = read_records(f"{ROOT / COFFEE}@eval", formats.examples, BadRows("error"))
    wanted = {record.columns["id"]: record.messages for record in held_out}
    found = [measure(args, "all", 0, 0, f"{COFFEE}@train", [])]
    policy = args.out / "all_0_0/model"
    for size, seed, kind in product(args.sizes, args.seeds, args.kinds):
        words = [word.replace("POLICY", str(policy)) for word in SELECTIONS[kind]]
        chosen = args.out / f"select_{kind}_{size}_{seed if kind == 'random' else 0}"
        run(
            "check_data.py",
            "check=quality",
            f"check.input=[{COFFEE}@train]",
            f"check.num={size}",
            f"seed={seed}",
            *words,
            f"hydra.run.dir={chosen}",
        )
        found.append(measure(args, kind, size, seed, chosen / "selected.jsonl", [f"tokenizer={policy}"]))

    texts = {(one["kind"], one["size"], one["seed"]): one.pop("completions") for one in found}
    for one in found[1:]:
        others = texts["random", one["size"], one["seed"]]
        one["win_rate"] = win_rate(texts[one["kind"], one["size"], one["seed"]], others, wanted)
    table = [
        summary([one for one in found if (one["kind"], one["size"]) == key])
        for key in dict.fromkeys((one["kind"], one["size"]) for one in found)
    ]
    for row in table:
        print(row)
    write_whole(args.out / "few_but_good.json", json.dumps({"runs": found, "table": table}, indent=2) + "\n")
    if len(args.seeds) > 1:  # one seed has no interval
        plot(table, args.out / "few_but_good.png")


def summary(runs: list[dict]) -> dict:
    """Mean over seeds and its t interval of the last loss, the best loss, and the win rate."""
    summary = {"kind": runs[0]["kind"], "size": runs[0]["size"], "seeds": len(runs)}
    for name in ("loss", "best_loss", "win_rate"):
        values = [one[name] for one in runs if name in one]
        summary[name] = t_interval(values)
    return summary


def measure(args, kind: str, size: int, seed: int, file: str | Path, more: list[str]) -> dict:
    """Train, evaluate, and complete the held-out dialogues."""
    home = args.out / f"{kind}_{size}_{seed}"
    run("train_sft.py", "model=tiny", "model.vocab_size=1024", f"data.train=[{file}]", f"data.eval=[{COFFEE}@eval]",
        f"num_steps={args.steps}", "batch_size=16", "micro_batch_size=16", "optim.lr=3e-3", "optim.schedule=cosine",
        "optim.warmup_steps=20", "eval_every=50", "sample_every=0", "save_every=0", "log.wandb=disabled",
        f"seed={seed}", f"hydra.run.dir={home}", *more)  # fmt: skip
    run(
        "generate.py",
        f"policy={home / 'model'}",
        f"data.prompts=[{COFFEE}@eval]",
        "sampling.temperature=0",
        "sampling.max_new_tokens=64",
        f"hydra.run.dir={home / 'completions'}",
    )
    losses = [row["eval/loss"] for row in read_jsonl(home / "metrics.jsonl") if "eval/loss" in row]
    completions = {row["id"]: row["completion"] for row in read_jsonl(home / "completions/completions.jsonl")}
    return {
        "kind": kind,
        "size": size,
        "seed": seed,
        "loss": losses[-1],
        "best_loss": min(losses),
        "completions": completions,
    }


def win_rate(completions: dict, others: dict, wanted: dict) -> float:
    """Share of wins plus half the ties, over the held-out dialogues."""
    points = []
    for key, text in completions.items():
        last = next(m["content"] for m in reversed(wanted[key]) if m["role"] == "assistant")
        ours, theirs = rouge_l(text, last), rouge_l(others[key], last)
        points.append(0.5 if ours == theirs else float(ours > theirs))
    return sum(points) / len(points)


def run(*overrides: str) -> None:
    """Run one script. A step that its directory shows as done is not repeated."""
    home = Path(next(word for word in overrides if word.startswith("hydra.run.dir=")).partition("=")[2])
    done = {"train_sft.py": "model/config.json", "generate.py": "completions.jsonl", "check_data.py": "result.json"}[
        overrides[0]
    ]
    if not (home / done).exists():
        subprocess.run([sys.executable, *overrides, "overwrite=true"], cwd=ROOT, check=True)


def plot(table: list[dict], path: Path) -> None:
    """A dot and its interval over seeds for each selection and size."""
    rows = [
        (f"{row['kind']}, {row['size']} dialogues", *(100 * value for value in row["win_rate"]))
        for row in table
        if row["kind"] not in ("all", "random")
    ]
    plot_intervals(path, "% won against random rows of the same number", rows, null=50)


if __name__ == "__main__":
    main()
