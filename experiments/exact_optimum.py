"""Distance in nats of PPO, RLOO, GRPO, DPO and IPO to the optimum in closed form, over steps and over beta.

    python experiments/exact_optimum.py docs/exact_optimum.png        5 losses x 4 coefficients x 3 seeds, 4 minutes

The task and the loops are those of the tests (completions of 3 tokens over 6 symbols, a random reward and reference):
tests/enumerable_training.py calls the trainers' own functions on tables. beta is PPO's kl_coef.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime.plots import pyplot, save_figure  # noqa: E402
from tests.enumerable_task import TabularPolicy, ipo_optimum, kl_to, make_task, optimum  # noqa: E402
from tests.enumerable_training import DPO_STEPS, PPO_STEPS, train_dpo, train_ppo  # noqa: E402

BETAS, SEEDS, SHOWN = (0.1, 0.2, 0.5, 1.0), (0, 1, 2), 0.5
EVERY = 20  # steps between two measurements
LOSSES = {
    "PPO": lambda seed, beta, on_step: train_ppo(seed, kl_coef=beta, on_step=on_step),
    "RLOO": lambda seed, beta, on_step: train_ppo(
        seed, kl_coef=beta, kind="rloo", samples_per_prompt=4, on_step=on_step
    ),
    "GRPO": lambda seed, beta, on_step: train_ppo(
        seed, kl_coef=beta, kind="grpo", samples_per_prompt=4, on_step=on_step
    ),
    "DPO": lambda seed, beta, on_step: train_dpo(seed, beta=beta, on_step=on_step),
    "IPO": lambda seed, beta, on_step: train_dpo(seed, beta=beta, loss="ipo", on_step=on_step),
}


def curve(name: str, beta: float, seed: int) -> list[float]:
    """KL(policy || optimum) at every measurement."""
    logits, rewards = make_task(seed)
    target = (ipo_optimum if name == "IPO" else optimum)(TabularPolicy(logits), rewards, beta)
    distances = []

    def measure(step: int, policy: TabularPolicy) -> None:
        if step % EVERY == 0:
            distances.append(kl_to(policy, target))

    LOSSES[name](seed, beta, measure)
    return distances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the picture, a .png")
    out = parser.parse_args().out
    torch.set_num_threads(1)  # tables are small, so more threads do not help
    curves = {}
    for name in LOSSES:
        for beta in BETAS:
            curves[name, beta] = np.array([curve(name, beta, seed) for seed in SEEDS])  # (seeds, measurements)
            first, last = curves[name, beta][:, 0], curves[name, beta][:, -1]
            shown = {"loss": name, "beta": beta, "first": first.round(3).tolist(), "last": last.round(5).tolist()}
            print(json.dumps(shown), flush=True)
    draw(out, curves)


def draw(out: Path, curves: dict) -> None:
    """Distance over the steps at one beta, and at the end over beta: the median, and a band over all seeds."""
    figure, (over_steps, over_beta) = pyplot().subplots(1, 2, figsize=(11, 4.2))
    for name in LOSSES:
        steps = np.arange(curves[name, SHOWN].shape[1]) * EVERY / (DPO_STEPS if name in ("DPO", "IPO") else PPO_STEPS)
        ends = np.array([curves[name, beta][:, -1] for beta in BETAS]).T
        for axes, x, y in ((over_steps, steps, curves[name, SHOWN]), (over_beta, BETAS, ends)):
            (line,) = axes.plot(x, np.median(y, 0), marker="o", markersize=3, label=name)
            axes.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.15)
    over_steps.set(xlabel=f"share of the training ({PPO_STEPS} or {DPO_STEPS} steps)", title=f"beta {SHOWN}")
    over_beta.set(xlabel="beta (kl_coef)", xscale="log", title="after the last step", xticks=BETAS, xticklabels=BETAS)
    over_beta.minorticks_off()
    for axes in (over_steps, over_beta):
        axes.set(yscale="log", ylabel="KL(policy || optimum), nats")
        axes.grid(alpha=0.3)
    over_steps.legend(fontsize=8)
    save_figure(figure, out)


if __name__ == "__main__":
    main()
