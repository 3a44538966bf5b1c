"""task=gains: the gains of trainings by a measure that they did not train on, beside the reward and the KL.

A run is a directory whose samples.jsonl answers the same held-out prompts before the first step and after the last
(train_ppo.py and train_dpo.py with num_samples=num_prompts). Runs called METHOD_0, METHOD_1, ... are seeds of one
method. The gain of a run is the mean over prompts of the measure after minus before, with an interval over prompts. The
gain of a method with several seeds is the mean over seeds, with an interval over seeds.
"""

from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from evals.intervals import mean_estimate, t_interval
from evals.overoptimization import read_gold
from evals.trainings import runs_by_training
from rollouts.reward_process import RewardProcess
from runtime.config import check_positive
from runtime.plots import pyplot, save_figure
from runtime.report import print_table

BOUNDS = ("value", "lower", "upper", "n")


def run(cfg: DictConfig, out: Path) -> dict:
    """task=gains: gains.png and result.json: {"methods": {METHOD: {"gain", "seeds", "runs": [...]}}}."""
    task = cfg.task
    check_positive(task__reward_timeout=task.reward_timeout, task__spread=task.spread)
    reward_fn = RewardProcess(task.reward_fn, seconds=task.reward_timeout, key="task.reward_fn")
    methods: dict[str, list[dict]] = {}
    for name, directories in runs_by_training(task.input).items():
        methods[name] = [measure(directory, reward_fn, spread=task.spread) for directory in directories]
    rows = [
        (
            name,
            number,
            *(run["looks"][at]["gold"][key] for at in (0, -1) for key in BOUNDS[:3]),
            *(run["gain"][key] for key in BOUNDS),
            run["looks"][-1]["kl"],
        )
        for name, runs in methods.items()
        for number, run in enumerate(runs)
    ]
    print_table(
        f"{task.reward_fn}, before and after",
        (
            "method",
            "seed",
            "before",
            "lower",
            "upper",
            "after",
            "lower",
            "upper",
            "gain",
            "lower",
            "upper",
            "prompts",
            "mean KL",
        ),
        rows,
    )
    draw(out / "gains.png", methods, task.reward_fn)
    result = {}
    for name, runs in methods.items():
        mean, lower, upper = t_interval([run["gain"]["value"] for run in runs])
        over = {"value": mean, "lower": lower, "upper": upper, "n": len(runs)}
        result[name] = {"gain": runs[0]["gain"] if len(runs) == 1 else over, "seeds": len(runs), "runs": runs}
    return {"reward_fn": task.reward_fn, "methods": result}


def measure(directory: str, reward_fn, *, spread: float) -> dict:
    """{"gain": its estimate, "looks": [{"step", "kl", "gold": its estimate, "proxy": mean or None}]} of one run.

    Args:
        spread: the largest distance of one answer's measure from the mean.
    """
    found = read_gold(directory, reward_fn)
    prompts, gold = np.arange(len(found["gold"])), found["gold"]

    def estimate(values: np.ndarray) -> dict:
        estimate = mean_estimate(values, prompts, null=0.0, level=0.95, max_deviation=spread)
        return {"value": float(values.mean())} | {name: estimate[name] for name in BOUNDS[1:]}

    looks = []
    for i, step in enumerate(found["steps"].tolist()):
        scores = [row.get("score") for row in found["answered"][i]]
        proxy = None if None in scores else float(np.mean(scores))
        looks.append({"step": step, "kl": found["kl"][:, i].mean(), "gold": estimate(gold[:, i]), "proxy": proxy})
    return {"run": Path(directory).name, "gain": estimate(gold[:, -1] - gold[:, 0]), "looks": looks}


def draw(path: Path, methods: dict[str, list[dict]], name: str) -> None:
    """Two panels over the KL: the reward (proxy) and the gold measure. A colour per method; bars are 95 % intervals."""
    figure, axes = pyplot().subplots(2, 1, figsize=(6.5, 6.5), sharex=True)
    for number, (method, runs) in enumerate(methods.items()):
        for seed, run in enumerate(runs):
            kl, label = [look["kl"] for look in run["looks"]], None if seed else method
            gold = [look["gold"] for look in run["looks"]]
            style = {"color": f"C{number}", "marker": "o", "markersize": 3, "linewidth": 1, "label": label}
            if None not in (proxy := [look["proxy"] for look in run["looks"]]):
                axes[0].plot(kl, proxy, **style)
            values = np.array([row["value"] for row in gold])
            errors = [0.0 if row["lower"] is None else row["value"] - row["lower"] for row in gold]
            axes[1].errorbar(kl, values, yerr=errors, capsize=2, elinewidth=0.6, **style)
    for axis, title in zip(axes, ("proxy: what trained", f"gold: {name}, never trained on"), strict=True):
        axis.set(xlabel="KL to SFT, nats a reply", title=title)
        axis.grid(alpha=0.3)
    axes[1].legend()
    save_figure(figure, path)
