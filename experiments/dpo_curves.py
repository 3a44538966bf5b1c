"""Accuracy, margin and both implicit rewards of DPO runs over their steps, with dots for held-out values (findings.md).

python experiments/dpo_curves.py docs/dpo_smollm2.png RUN_DIR ...
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.ppo_curves import smooth  # noqa: E402
from runtime.metrics import read_log  # noqa: E402
from runtime.plots import save_figure  # noqa: E402

WINDOW = 12  # steps of a running mean: at 8 pairs a step the accuracy of 96 pairs has a standard error of 0.05
HELD_OUT = {"rewards/accuracy": "eval/accuracy", "rewards/margin": "eval/margin", "rewards/chosen": "eval/chosen"}
PANELS = {"rewards/accuracy": "accuracy", "rewards/margin": "margin", "rewards/chosen": "chosen, rejected (dashed)"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the picture, a .png")
    parser.add_argument("runs", type=Path, nargs="+", help="run directories")
    args = parser.parse_args()
    figure = Figure(figsize=(12, 3.6))
    for axis, (name, title) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        for run in args.runs:
            rows = [row for row in read_log(run / "metrics.jsonl") if name in row][1:]  # at first all values are 0
            steps, values = ([row[key] for row in rows] for key in ("step", name))
            (line,) = axis.plot(steps, smooth(values, WINDOW), label=run.name)
            held_out = [row for row in read_log(run / "metrics.jsonl") if HELD_OUT[name] in row and row["step"]]
            dots = [row[HELD_OUT[name]] for row in held_out]
            axis.plot([row["step"] for row in held_out], dots, "o", color=line.get_color())
            if name == "rewards/chosen":
                others = smooth([row["rewards/rejected"] for row in rows], WINDOW)
                axis.plot(steps, others, "--", color=line.get_color())
            halves = [values[: len(values) // 2], values[len(values) // 2 :]]
            means = " -> ".join(f"{sum(half) / len(half):.3f}" for half in halves)
            print(f"{run.name} {name}: {means}; held out {', '.join(f'{dot:.3f}' for dot in dots)}")
        axis.set(xlabel="step", title=f"{title}, mean of {WINDOW} steps")
        axis.grid(alpha=0.3)
    save_figure(figure, args.out)


if __name__ == "__main__":
    main()
