"""task=kl_frontier: the reward over the KL of runs, their Pareto frontier, and the KL with the largest gold score.

A row of metrics.jsonl is a mean without its spread, so a run alone has no interval. `task.seeds` averages over runs
NAME_0, NAME_1, ..., with t intervals over seeds. What other prompts would change is not in them: task=gains and
task=overoptimization read every answer.
"""

import json
import math
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from evals.intervals import t_interval
from evals.overoptimization import BENT, peak
from evals.seeds import seeds_among, seeds_of
from runtime.plots import pyplot, save_figure
from runtime.report import print_table


def read_curve(directory: str, *, kl: str, score: str, gold: str | None) -> list[dict]:
    """[{"step", "kl", "score", "gold"}] of a run, from its metrics.jsonl.

    Raises:
        ValueError: no such file, or no row with both figures.
    """
    path = Path(directory) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"no {path}; task.input takes run directories of train_ppo.py or train_dpo.py")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    points = [
        {"step": row["step"], "kl": row[kl], "score": row[score], "gold": row.get(gold) if gold else None}
        for row in rows
        if kl in row and score in row
    ]
    if not points:
        known = sorted({name for row in rows for name in row})
        raise ValueError(f"{path} has no row with {kl} and {score}; it has {', '.join(known)}")
    return points


def mean_curve(name: str, curves: dict[str, list[dict]]) -> list[dict]:
    """The points of the seeds of a training, averaged step by step, with the ends of t intervals: `kl_lower`, ...

    Raises:
        ValueError: fewer than two seeds, or seeds whose points are of different steps.
    """
    seeds = {directory: points for directory, points in curves.items() if seeds_of(Path(directory).name, [name])}
    seeds_among([Path(directory).name for directory in seeds], name)
    steps = {directory: [point["step"] for point in points] for directory, points in seeds.items()}
    first = next(iter(steps))
    for directory, own in steps.items():
        if own != steps[first]:
            raise ValueError(
                f"task.seeds={name}: {directory} has its figures at steps {own}, {first} at {steps[first]}; a mean "
                "over seeds needs the same steps"
            )
    means = []
    for row in zip(*seeds.values(), strict=True):
        point = {"step": row[0]["step"], "seeds": len(row), "gold": None}
        for key in ("kl", "score", *(["gold"] if all(one["gold"] is not None for one in row) else [])):
            bounds = t_interval([one[key] for one in row])
            point |= dict(zip((key, f"{key}_lower", f"{key}_upper"), bounds, strict=True))
        means.append(point)
    return means


def frontier(points: list[dict]) -> list[dict]:
    """The Pareto frontier: the points for which no other has a higher score at the same or a smaller KL."""
    best, kept = -math.inf, []
    for point in sorted(points, key=lambda p: (p["kl"], -p["score"])):
        if point["score"] > best:
            best = point["score"]
            kept.append(point)
    return kept


def gold_fit(points: list[dict]) -> dict | None:
    """Fit of the gold score, start + d * (alpha - beta * log d) with d = sqrt(KL): see evals/overoptimization.py.

    `start` is the score of the reference. `peak_kl` is the KL at the maximum of the fit, None if there is no maximum.
    The result is None with fewer than three gold scores.
    """
    known = [(math.sqrt(p["kl"]), p["gold"]) for p in points if p["gold"] is not None and p["kl"] > 0]
    if len(known) < 3:
        return None
    d, gold = np.array(known).T
    columns = np.column_stack([d, -BENT["rl"](d), np.ones(len(d))])
    (alpha, beta, start), *_ = np.linalg.lstsq(columns, gold, rcond=None)
    turns = peak(alpha, beta, "rl") ** 2
    params = {"alpha": float(alpha), "beta": float(beta), "start": float(start)}
    return params | {"peak_kl": turns if math.isfinite(turns) else None}


def run(cfg: DictConfig, out: Path) -> dict:
    """task=kl_frontier: result.json, kl_frontier.png."""
    task = cfg.task
    names = {"kl": task.kl, "score": task.score, "gold": task.gold}
    curves = {directory: read_curve(directory, **names) for directory in task.input}
    for name in task.seeds:
        mean = mean_curve(name, curves)
        curves = {key: points for key, points in curves.items() if not seeds_of(Path(key).name, [name])} | {name: mean}
    everyone = [point | {"run": directory} for directory, points in curves.items() for point in points]
    best = frontier(everyone)
    keys = ("step", "kl", "kl_lower", "kl_upper", "score", "score_lower", "score_upper", "gold", "gold_lower",
            "gold_upper", "seeds")  # fmt: skip
    head = ("run", *("lower" if key.endswith("lower") else "upper" if key.endswith("upper") else key for key in keys))
    print_table(
        "frontier, t intervals over seeds (one run has none: task.seeds)",
        head,
        [(point["run"], *(point.get(key) for key in keys)) for point in best],
    )
    plot_curves(out / "kl_frontier.png", curves, best)
    runs = {directory: {"points": points, "gold": gold_fit(points)} for directory, points in curves.items()}
    return {"frontier": best, "runs": runs}


def plot_curves(path: Path, curves: dict[str, list[dict]], best: list[dict]) -> None:
    """Plot score, and gold score (dashed), over sqrt(KL), one colour per run, with the frontier in black."""
    figure, axes = pyplot().subplots(figsize=(7, 5))
    for directory, points in curves.items():
        d = [math.sqrt(max(point["kl"], 0.0)) for point in points]
        (line,) = axes.plot(d, [point["score"] for point in points], "o-", markersize=3, label=Path(directory).name)
        if "seeds" in points[0]:
            low, high = ([point[f"score_{end}"] for point in points] for end in ("lower", "upper"))
            axes.fill_between(d, low, high, color=line.get_color(), alpha=0.15)
        if any(point["gold"] is not None for point in points):
            axes.plot(d, [point["gold"] for point in points], "--", color=line.get_color())
    axes.plot([math.sqrt(max(p["kl"], 0.0)) for p in best], [p["score"] for p in best], "k.", markersize=4)
    axes.set(xlabel="sqrt(KL), nats per sequence", ylabel="score (dashed: gold)")
    axes.legend()
    save_figure(figure, path)
