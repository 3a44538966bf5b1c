"""Score and KL of PPO runs over their steps, and one over the other, with dots for held-out prompts (findings.md).

python experiments/ppo_curves.py docs/ppo_coffee.png RUN_DIR RUN_DIR ...
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime.metrics import read_log  # noqa: E402
from runtime.plots import save_figure  # noqa: E402

WINDOW = 5  # steps of a running mean: one rollout of 64 completions has a standard error of 0.1


def smooth(values: list[float], window: int = WINDOW) -> list[float]:
    """Means over the last `window` values."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the picture, a .png")
    parser.add_argument("runs", type=Path, nargs="+", help="run directories")
    args = parser.parse_args()
    figure = Figure(figsize=(12, 3.6))
    score_axis, kl_axis, plane = figure.subplots(1, 3)
    for run in args.runs:
        rows = [row for row in read_log(run / "metrics.jsonl") if "objective/kl" in row]
        steps, scores, kl = ([row[key] for row in rows] for key in ("step", "objective/score", "objective/kl"))
        held_out = [row for row in read_log(run / "metrics.jsonl") if "eval/kl" in row]
        label = run.name
        for axis, curve, dots in ((score_axis, scores, "eval/score"), (kl_axis, kl, "eval/kl")):
            (line,) = axis.plot(steps, smooth(curve), label=label)
            axis.plot([row["step"] for row in held_out], [row[dots] for row in held_out], "o", color=line.get_color())
        plane.plot([max(x, 0) ** 0.5 for x in smooth(kl)], smooth(scores), label=label)
        print(
            f"{label}: score {scores[0]:.3f} -> {smooth(scores)[-1]:.3f}, KL {smooth(kl)[-1]:.2f}, largest "
            f"{max(kl):.2f}"
        )
    score_axis.set(xlabel="step", ylabel="score of the frozen reward model", title=f"score, mean of {WINDOW} rollouts")
    kl_axis.set(xlabel="step", ylabel="nats per completion", title="KL to the reference")
    plane.set(xlabel="sqrt(KL)", ylabel="score", title="score against sqrt(KL)")
    score_axis.legend(fontsize=8)
    save_figure(figure, args.out)


if __name__ == "__main__":
    main()
