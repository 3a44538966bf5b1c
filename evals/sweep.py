"""task=sweep: the jobs of a sweep side by side: what each changed, where it ended, which was best."""

import math
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from evals.report import print_table
from runtime.config import flat
from runtime.metrics import read_rows
from runtime.plots import pyplot, save_figure

NOT_SETTINGS = ("run_dir", "name")  # of a job, not of what it tries


def read_jobs(directory: Path, key: str) -> list[dict]:
    """[{"job", "settings", "points"}]: what sets a job apart from the others, and [(step, figure)] of `key`.

    Raises:
        ValueError: no job there, or none that logged `key`.
    """
    paths = sorted(directory.glob("*/metrics.jsonl"), key=lambda p: (len(p.parent.name), p.parent.name))
    if not paths:
        raise ValueError(f"{directory} holds no job with a metrics.jsonl; task.input is the directory of a sweep")
    configs = [flat(OmegaConf.load(path.parent / "config.yaml")) for path in paths]
    names = sorted({name for config in configs for name in config} - set(NOT_SETTINGS))
    differ = [name for name in names if len({repr(config.get(name)) for config in configs}) > 1]
    jobs = []
    for path, config in zip(paths, configs, strict=True):
        points = [(row["step"], row[key]) for row in read_rows(path) if key in row]
        jobs.append({"job": path.parent.name, "settings": {n: config.get(n) for n in differ}, "points": points})
    if not any(job["points"] for job in jobs):
        known = sorted({name for path in paths for row in read_rows(path) for name in row})
        raise ValueError(f"no job of {directory} logged task.key={key}; they have {', '.join(known)}")
    return jobs


def run(cfg: DictConfig, out: Path) -> dict:
    """task=sweep: result.json, sweep.png. Jobs that failed before the first figure count as missing."""
    task = cfg.task
    jobs, sign = read_jobs(Path(task.input), task.key), 1 if task.larger_is_better else -1
    for job in jobs:
        job["last"] = job["points"][-1][1] if job["points"] else None
    done = [job for job in jobs if job["last"] is not None and math.isfinite(job["last"])]
    if not done:
        raise ValueError(f"every job of {task.input} ended with a {task.key} that is not finite")
    order = sorted(done, key=lambda job: -sign * job["last"]) + [job for job in jobs if job not in done]
    settings = list(jobs[0]["settings"])
    print_table("sweep", ["job", *settings, task.key], [
        [job["job"], *(job["settings"][name] for name in settings), job["last"]] for job in order
    ])  # fmt: skip
    plot_jobs(out / "sweep.png", jobs, task.key)
    return {"best": order[0]["last"], "best_job": order[0]["job"], "key": task.key, "jobs": order}


def plot_jobs(path: Path, jobs: list[dict], key: str) -> None:
    """The figure against the step, one line a job."""
    figure, axes = pyplot().subplots(figsize=(7, 5))
    for job in jobs:
        told = ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in job["settings"].items())
        if job["points"]:
            axes.plot(*zip(*job["points"], strict=True), marker=".", linewidth=1, label=f"{job['job']}: {told}")
    axes.set(xlabel="step", ylabel=key)
    axes.legend(fontsize=7)
    save_figure(figure, path)
