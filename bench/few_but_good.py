"""How much data is enough: train the tiny model on more and more coffee orders, drawn at random or selected.

    python bench/few_but_good.py --out runs/few_but_good

Every model takes the same number of steps with the same tokenizer. Loss: per assistant token on held-out dialogues. Win
rate: against the model of all dialogues, the completion nearer to what the person at the bar answered (ROUGE-L) wins.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from data import formats  # noqa: E402
from data.methods.filters import rouge_l  # noqa: E402
from data.records import BadRows, read_jsonl, read_records, write_jsonl  # noqa: E402
from runtime.plots import pyplot, save_figure  # noqa: E402

COFFEE = "data/embedded/sft_coffee_train.jsonl.gz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/few_but_good")
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 200, 800])
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()

    parts = [read_records(f"{ROOT / COFFEE}@{part}", formats.examples, BadRows("error")) for part in ("train", "eval")]
    train = [formats.as_row(record) for record in parts[0]]
    wanted = {record.columns["id"]: record.messages for record in parts[1]}
    found = [measure(args, "all", len(train), f"{COFFEE}@train", [], wanted)]
    tokenizer = [f"tokenizer={args.out / 'all/model'}"]
    for size in args.sizes:
        files = {"random": args.out / f"random_{size}.jsonl", "selected": args.out / f"select_{size}/selected.jsonl"}
        write_jsonl(files["random"], random.Random(size).sample(train, size))
        run(
            "check_data.py",
            "check=quality",
            f"check.input=[{COFFEE}@train]",
            f"check.num={size}",
            f"hydra.run.dir={files['selected'].parent}",
        )
        found += [measure(args, kind, len(read_jsonl(file)), file, tokenizer, wanted) for kind, file in files.items()]

    best = found[0]["completions"]
    for one in found:
        one["win_rate"], one["standard_error"] = win_rate(one.pop("completions"), best, wanted)
        print(one)
    (args.out / "few_but_good.json").write_text(json.dumps(found, indent=2) + "\n")
    plot(found, args.out / "few_but_good.png")


def measure(args, kind: str, size: int, file: str | Path, more: list[str], wanted: dict) -> dict:
    """Train, evaluate, complete the held-out dialogues."""
    name = kind if kind == "all" else f"{kind}_{size}_sft"
    home = args.out / name
    run("train_sft.py", "model=tiny", "model.vocab_size=1024", f"data.train=[{file}]", f"data.eval=[{COFFEE}@eval]",
        f"num_steps={args.steps}", "batch_size=16", "micro_batch_size=16", "optim.lr=3e-3", "optim.schedule=cosine",
        "optim.warmup_steps=20", "eval_every=50", "sample_every=0", "save_every=0", "log.wandb=disabled",
        f"hydra.run.dir={home}", *more)  # fmt: skip
    run("generate.py", f"policy={home / 'model'}", f"data.prompts=[{COFFEE}@eval]", "sampling.temperature=0",
        "sampling.max_new_tokens=64", f"hydra.run.dir={home / 'completions'}")  # fmt: skip
    losses = [row["eval/loss"] for row in read_jsonl(home / "metrics.jsonl") if "eval/loss" in row]
    completions = {row["id"]: row["completion"] for row in read_jsonl(home / "completions/completions.jsonl")}
    return {"kind": kind, "size": size, "loss": losses[-1], "best_loss": min(losses), "completions": completions}


def win_rate(completions: dict, others: dict, wanted: dict) -> tuple[float, float]:
    """(share of wins plus half the ties, its standard error), over the held-out dialogues."""
    points = []
    for key, text in completions.items():
        last = next(m["content"] for m in reversed(wanted[key]) if m["role"] == "assistant")
        mine, theirs = rouge_l(text, last), rouge_l(others[key], last)
        points.append(0.5 if mine == theirs else float(mine > theirs))
    mean = sum(points) / len(points)
    variance = sum((p - mean) ** 2 for p in points) / (len(points) - 1)
    return mean, (variance / len(points)) ** 0.5


def run(*overrides: str) -> None:
    """One door; resumable by its directory: a step that is done is not done again."""
    home = Path(next(word for word in overrides if word.startswith("hydra.run.dir=")).partition("=")[2])
    done = {"train_sft.py": "model/config.json", "generate.py": "completions.jsonl", "check_data.py": "result.json"}[
        overrides[0]
    ]
    if not (home / done).exists():
        subprocess.run([sys.executable, *overrides, "overwrite=true"], cwd=ROOT, check=True)


def plot(found: list[dict], path: Path) -> None:
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 3.6))
    everything = found[0]
    for kind, colour in (("random", "tab:gray"), ("selected", "tab:blue")):
        points = sorted((f for f in found if f["kind"] == kind), key=lambda f: f["size"])
        sizes = [f["size"] for f in points]
        left.plot(sizes, [f["best_loss"] for f in points], "o-", color=colour, label=f"{kind}, best step")
        left.plot(sizes, [f["loss"] for f in points], "o--", color=colour, alpha=0.5, label=f"{kind}, last step")
        rates, errors = [100 * f["win_rate"] for f in points], [196 * f["standard_error"] for f in points]
        right.errorbar(sizes, rates, yerr=errors, fmt="o-", color=colour, capsize=3, label=kind)
    left.axhline(everything["best_loss"], color="black", linestyle=":", label=f"all {everything['size']}")
    right.axhline(50, color="black", linestyle=":")
    left.set_ylabel("nats per assistant token, held out")
    right.set_ylabel("% won against the model of all")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(sizes, sizes)
        axis.set_xlabel("dialogues")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
