"""Compare training in bf16 and fp32: SFT of the tiny model on coffee orders, three seeds in fp32, the first also in
bf16.

    python experiments/precision.py --out runs/precision

It prints the distance of the bf16 curve from the fp32 curve of the same seed, and the distance between seeds of fp32,
which is the noise. It writes OUT/precision.png.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from runtime.metrics import read_log  # noqa: E402
from runtime.plots import save_figure  # noqa: E402

RUNS = {
    "fp32, seed 0": ("fp32", 0),
    "fp32, seed 1": ("fp32", 1),
    "fp32, seed 2": ("fp32", 2),
    "bf16, seed 0": ("bf16", 0),
}
DATA = "data/embedded/sft_coffee_train.jsonl.gz"


def train(directory: Path, precision: str, seed: int, steps: int) -> list[dict]:
    """The rows of metrics.jsonl of a run, which is executed unless it exists."""
    if not (directory / "model").exists():
        overrides = ["model=tiny", "model.vocab_size=1024", f"data.train=[{DATA}@train]", f"data.eval=[{DATA}@eval]"]
        overrides += [
            f"num_steps={steps}",
            "batch_size=16",
            "micro_batch_size=16",
            "optim.lr=3e-3",
            "optim.warmup_steps=10",
        ]
        overrides += [
            f"eval_every={steps // 5}",
            "sample_every=0",
            "save_every=0",
            "log.wandb=disabled",
            "overwrite=true",
        ]
        overrides += [f"precision={precision}", f"seed={seed}", f"hydra.run.dir={directory}"]
        subprocess.run([sys.executable, "train_sft.py", *overrides], cwd=ROOT, check=True)
    return read_log(directory / "metrics.jsonl")


def series(rows: list[dict], name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in rows if name in row}


def distance(one: dict[int, float], other: dict[int, float]) -> float:
    """Mean absolute difference over the common steps."""
    return statistics.mean(abs(one[step] - other[step]) for step in one.keys() & other.keys())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/precision")
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    rows = {
        name: train((args.out / name.replace(", ", "_").replace(" ", "")).resolve(), *run, args.steps)
        for name, run in RUNS.items()
    }
    figure = Figure(figsize=(9, 3.6))
    for axes, metric in zip(figure.subplots(1, 2), ("objective/loss", "eval/loss"), strict=True):
        curves = {name: series(rows[name], metric) for name in RUNS}
        for name, curve in curves.items():
            axes.plot(list(curve), list(curve.values()), label=name, lw=1, ls="--" if "bf16" in name else "-")
        axes.set(xlabel="step", title=metric, yscale="log")
        base = curves["fp32, seed 0"]
        for name in list(RUNS)[1:]:
            last = max(base)
            print(
                f"{metric}: {name} is {distance(curves[name], base):.4f} from fp32, seed 0; at the end "
                f"{curves[name][last]:.4f} and {base[last]:.4f} nats"
            )
        axes.legend(fontsize=8)
    save_figure(figure, args.out / "precision.png")


if __name__ == "__main__":
    main()
