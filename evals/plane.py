"""task=plane: trainings by several methods in one plot, the gold reward over the exact KL, with best of n.

The samples.jsonl of a run must answer the same held-out prompts at every evaluation. Runs named METHOD_0, METHOD_1, ...
are seeds of one method. Best of n uses the samples of task=best_of_n, chosen by the gold reward.
"""

from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from evals.best_of_n import best_of_n_kl, expected_best
from evals.intervals import t_interval
from evals.overoptimization import read_gold
from evals.trainings import runs_by_training
from rollouts.reward_process import RewardProcess
from runtime.config import check_positive
from runtime.plots import pyplot, save_figure
from runtime.report import print_table


def run(cfg: DictConfig, out: Path) -> dict:
    """task=plane: plane.png, and result.json with the end point of each run and the value of best of n at its KL."""
    task = cfg.task
    check_positive(task__reward_timeout=task.reward_timeout)
    reward_fn = RewardProcess(task.reward_fn, seconds=task.reward_timeout, key="task.reward_fn")
    best, methods = best_of_n(task.best_of_n), {}
    for name, directories in runs_by_training(task.input).items():
        found = [read_gold(directory, reward_fn) for directory in directories]
        methods[name] = [(one["kl"].mean(0), one["gold"].mean(0)) for one in found]
    rows, ends = [], {}
    for name, seeds in methods.items():
        ends[name] = [
            {"kl": kl[-1], "gold": gold[-1], "best_of_n": float(np.interp(kl[-1], *best))} for kl, gold in seeds
        ]
        kl, gold, beyond = (t_interval(column) for column in zip(*(_end(end) for end in ends[name]), strict=True))
        rows.append((name, len(seeds), *kl, *gold, *beyond))
    head = (
        "method",
        "seeds",
        "KL, nats",
        "lower",
        "upper",
        "gold",
        "lower",
        "upper",
        "minus best of n",
        "lower",
        "upper",
    )
    print_table("end point of each method, with t intervals over seeds", head, rows)
    draw(out / "plane.png", methods, best)
    columns = (
        "seeds",
        "kl",
        "kl_lower",
        "kl_upper",
        "gold",
        "lower",
        "upper",
        "minus_best_of_n",
        "minus_lower",
        "minus_upper",
    )
    means = {name: dict(zip(columns, row, strict=True)) for name, *row in rows}
    return {"ends": ends, "means": means, "best_of_n": {"kl": best[0], "gold": best[1]}}


def _end(end: dict[str, float]) -> tuple[float, float, float]:
    return end["kl"], end["gold"], end["gold"] - end["best_of_n"]


def best_of_n(directory: str) -> tuple[np.ndarray, np.ndarray]:
    """KL and mean gold reward of the best of n = 1, 2, 4, ...

    by the gold reward, from scores.npz of a best_of_n run.
    """
    with np.load(Path(directory) / "scores.npz") as file:
        gold = file["gold"].astype(float)
    sizes = 2 ** np.arange(int(np.log2(gold.shape[1])) + 1)
    return best_of_n_kl(sizes), expected_best(gold, gold, sizes).mean(0)


def draw(path: Path, methods: dict[str, list], best: tuple[np.ndarray, np.ndarray]) -> None:
    """A thin line along each training and a marker at its end, with one colour per method."""
    figure, axes = pyplot().subplots(figsize=(8, 5))
    axes.plot(*best, color="gray", linestyle="--", marker=".", label="best of n")
    for number, (name, seeds) in enumerate(methods.items()):
        for seed, (kl, gold) in enumerate(seeds):
            axes.plot(kl, gold, color=f"C{number % 10}", linewidth=0.7, alpha=0.6)
            axes.plot(
                kl[-1], gold[-1], "os^vD"[number // 10 % 5], color=f"C{number % 10}", label=None if seed else name
            )
    axes.set(xlabel="exact KL to the initial policy, nats", ylabel="gold reward")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)
