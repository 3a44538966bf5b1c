"""task=sweep: compare the jobs of a sweep: their settings, their last value of a metric, and the best job."""

import math
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from evals.intervals import t_interval
from runtime.config import flat
from runtime.metrics import read_log
from runtime.plots import pyplot, save_figure
from runtime.report import print_table

NOT_SETTINGS = ("run_dir", "name")  # keys that differ between jobs and are not settings


def read_jobs(directory: Path, key: str) -> list[dict]:
    """[{"job", "settings", "points"}]: the settings that differ between jobs, and [(step, figure)] of `key`.

    Raises:
        ValueError: there is no job, or no job that logged `key`.
    """
    paths = sorted(directory.glob("*/metrics.jsonl"), key=lambda p: (len(p.parent.name), p.parent.name))
    if not paths:
        raise ValueError(f"{directory} has no job with a metrics.jsonl; task.input is the directory of a sweep")
    configs = [flat(OmegaConf.load(path.parent / "config.yaml")) for path in paths]
    names = sorted({name for config in configs for name in config} - set(NOT_SETTINGS))
    differ = [name for name in names if len({repr(config.get(name)) for config in configs}) > 1]
    jobs = []
    for path, config in zip(paths, configs, strict=True):
        points = [(row["step"], row[key]) for row in read_log(path) if key in row]
        jobs.append({"job": path.parent.name, "settings": {n: config.get(n) for n in differ}, "points": points})
    if not any(job["points"] for job in jobs):
        known = sorted({name for path in paths for row in read_log(path) for name in row})
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
    print_table(
        "sweep (a job is one value, without an interval; intervals are over seeds)",
        ["job", *settings, task.key],
        [[job["job"], *(job["settings"][name] for name in settings), job["last"]] for job in order],
    )
    usual = usual_settings(done)
    groups = over_seeds(done, usual)
    if len(groups) < len(done):
        head = ("mean over seeds", "runs", task.key, "lower", "upper", "minus usual", "lower", "upper")
        text = ", ".join(f"{name}={value}" for name, value in usual.items())
        print_table(f"usual: {text}", head, [tuple(group.values()) for group in groups])
    plot_jobs(out / "sweep.png", jobs, task.key)
    best = {"best": order[0]["last"], "best_job": order[0]["job"], "key": task.key}
    return best | {"jobs": order, "usual": usual, "settings": groups}


def usual_settings(jobs: list[dict]) -> dict:
    """The most common value of each setting. Of equally common ones, that of the first job."""
    values_of = {name: [job["settings"][name] for job in jobs] for name in jobs[0]["settings"] if name != "seed"}
    return {name: max(values, key=values.count) for name, values in values_of.items()}


def over_seeds(jobs: list[dict], usual: dict) -> list[dict]:
    """Groups of jobs that differ only by their seed: mean with 95 % t interval, and the same for a difference.

    The difference is to the jobs with the usual settings, seed by seed. These come first. The other groups are named by
    the settings that differ. An interval is None with fewer than two seeds.
    """
    groups: dict[str, dict] = {}
    for job in jobs:
        changed = {name: value for name, value in job["settings"].items() if name != "seed" and value != usual[name]}
        label = ", ".join(f"{name}={value}" for name, value in changed.items()) or "(usual)"
        groups.setdefault(label, {})[job["settings"].get("seed")] = job["last"]
    first = groups.get("(usual)", {})
    rows = []
    for label in sorted(groups, key=lambda label: (label != "(usual)", label)):
        values = groups[label]
        both = [values[seed] - first[seed] for seed in values if seed in first] if label != "(usual)" else []
        mean, difference = t_interval(list(values.values())), t_interval(both)
        rows.append({"settings": label, "runs": len(values)} | dict(zip(("mean", "lower", "upper"), mean, strict=True)))
        rows[-1] |= dict(zip(("difference", "difference_lower", "difference_upper"), difference, strict=True))
    return rows


def plot_jobs(path: Path, jobs: list[dict], key: str) -> None:
    """Plot the metric over the step: one line per job, one colour per setting, whose seeds share it."""
    figure, axes = pyplot().subplots(figsize=(7, 5))
    settings: dict[str, list[dict]] = {}
    for job in jobs:
        given = [f"{name}={value}" for name, value in job["settings"].items() if name != "seed"]
        settings.setdefault(", ".join(given) or "every job", []).append(job)
    for number, (label, members) in enumerate(settings.items()):
        for job in filter(lambda job: job["points"], members):
            axes.plot(*zip(*job["points"], strict=True), color=f"C{number % 10}", marker=".", linewidth=1, label=label)
            label = "_" + label.lstrip("_")  # the legend names a setting once
    axes.set(xlabel="step", ylabel=key)
    axes.legend(fontsize=7)
    save_figure(figure, path)
