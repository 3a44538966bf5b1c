"""task=overoptimization: gold reward against sqrt(KL) where a proxy was optimised, by best-of-n and by RL.

Gao et al. 2022 (arXiv:2210.10760), section 3.1, with d = sqrt(KL(policy || initial policy)):

    best of n    gold(d) = d (alpha - beta d)          turns at d = alpha / (2 beta)
    RL           gold(d) = d (alpha - beta log d)      turns at d = exp(alpha / beta - 1)

Scores are in standard deviations of the initial policy's samples, from their mean. The intervals of a fit resample
prompts, with all steps of a prompt together; those of a mean are t intervals over prompts. `task.seeds` averages over
runs NAME_0, NAME_1, ... as task=report does (`evals/seeds.py`).
"""

import math
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from evals.best_of_n import best_of_n_kl, expected_best
from evals.intervals import t_interval
from evals.overoptimization_plots import plot_curves, plot_plane
from evals.seeds import Figure, over_seeds, seeds_among, seeds_of
from rollouts.reward_functions import call_reward
from rollouts.reward_process import RewardProcess
from runtime.config import check_positive
from runtime.metrics import read_log
from runtime.report import bullets, heading, interval_cell, paragraph, picture, print_table, table, write_page

BENT = {"best_of_n": lambda d: d**2, "rl": lambda d: d * np.log(d)}  # the factor of beta in the fit
MEANS = ("best_gold", "best_kl", "last_gold", "last_kl", "last_proxy", "fall")  # of a curve, over prompts
FITTED = ("alpha", "beta", "peak")
PEAK = {"best_of_n": lambda alpha, beta: alpha / (2 * beta), "rl": lambda alpha, beta: math.exp(alpha / beta - 1)}


def fit(d: np.ndarray, gold: np.ndarray, form: str) -> tuple[float, float]:
    """(alpha, beta) by least squares. Both forms are linear in them.

    Args:
        d: (S,) sqrt(nats), > 0. gold: (S,) gold score minus that of d = 0. form: best_of_n | rl.
    """
    columns = np.column_stack([d, -BENT[form](d)])
    alpha, beta = np.linalg.lstsq(columns, gold, rcond=None)[0]
    return float(alpha), float(beta)


def fit_prompts(kl: np.ndarray, gold: np.ndarray, form: str, *, rounds: int, seed: int) -> dict:
    """The fit to the means over prompts, with 95 % intervals from resampled prompts.

    Args:
        kl: (P, S) nats or (S,). gold: (P, S); its first column belongs to KL 0.
    Returns:
        {"alpha", "beta", "peak": {"value", "lower", "upper"}, "r2"}; `peak` in sqrt(nats), None where the fit never
        turns, its interval over the resamples in which it does (`turns`: their share).
    """
    kl = np.broadcast_to(kl, gold.shape)
    rng, num = np.random.default_rng(seed), len(gold)

    def once(rows: np.ndarray) -> tuple[float, float, float]:
        d, score = np.sqrt(np.maximum(kl[rows].mean(0)[1:], 1e-9)), gold[rows].mean(0)
        alpha, beta = fit(d, score[1:] - score[0], form)
        return alpha, beta, peak(alpha, beta, form)

    value, draws = once(np.arange(num)), np.array([once(rng.integers(num, size=num)) for _ in range(rounds)])
    d, score = np.sqrt(np.maximum(kl.mean(0)[1:], 1e-9)), gold.mean(0)
    left = score[1:] - score[0] - value[0] * d + value[1] * BENT[form](d)
    found = {"r2": 1 - left.var() / score[1:].var(), "turns": float(np.isfinite(draws[:, 2]).mean())}
    for i, name in enumerate(("alpha", "beta", "peak")):
        known = draws[np.isfinite(draws[:, i]), i]
        lower, upper = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
        found[name] = {"value": value[i], "lower": lower, "upper": upper}
    return found


def peak(alpha: float, beta: float, form: str) -> float:
    """The d at the maximum of the fitted gold score; nan if there is none."""
    return PEAK[form](alpha, beta) if alpha > 0 and beta > 0 and alpha / beta < 8 else math.nan


def read_run(directory: str, reward_fn) -> dict:
    """{"steps": (S,), "kl", "proxy", "gold": (P, S)} of the held-out answers in a run's samples.jsonl."""
    found = read_gold(directory, reward_fn)
    score = np.array([[row["score"] for row in part] for part in found.pop("answered")]).T
    return found | {"proxy": (score - score[:, 0].mean()) / max(score[:, 0].std(), 1e-9)}  # sd of its start


def read_gold(directory: str, reward_fn) -> dict:
    """{"steps": (S,), "kl", "gold": (P, S), "answered": S lists of rows} of the held-out answers in samples.jsonl.

    Raises:
        ValueError: a step that answers other prompts than the first: num_samples must be num_prompts.
    """
    rows = [row for row in read_log(Path(directory) / "samples.jsonl") if "completion" in row]
    steps = sorted({row["step"] for row in rows})
    answered = [[row for row in rows if row["step"] == step] for step in steps]
    prompts = [[row["prompt"] for row in part] for part in answered]
    if not rows or any(part != prompts[0] for part in prompts):
        raise ValueError(
            f"{directory}/samples.jsonl must answer the same prompts at every step: train_ppo.py with sample_every=0 "
            "num_samples=num_prompts, train_dpo.py with num_samples=num_prompts"
        )
    given = [row.get("columns", {}) for row in answered[0]]
    columns = {name: [row.get(name) for row in given] for name in dict.fromkeys(name for row in given for name in row)}
    gold = [call_reward(reward_fn, prompts[0], [row["completion"] for row in part], columns) for part in answered]
    kl = np.array([[row["kl"] for row in part] for part in answered]).T
    return {"steps": np.array(steps), "kl": kl, "gold": np.array(gold).T, "answered": answered}


def best_of_n_curves(directory: str) -> tuple[dict[str, dict], float, float]:
    """{proxy: {"kl": (S,), "proxy", "gold": (P, S)}} of a best_of_n run; mean and sd of its samples' gold scores.

    The proxy's scores are in sd of its samples, from their mean.
    """
    with np.load(Path(directory) / "scores.npz") as file:
        scores = {name: file[name].astype(float) for name in file.files}
    sizes = 2 ** np.arange(int(np.log2(scores["gold"].shape[1])) + 1)
    curves = {}
    for name in sorted(scores.keys() - {"gold"}):
        proxy = (scores[name] - scores[name].mean()) / scores[name].std()
        best = {key: expected_best(proxy, by, sizes) for key, by in (("proxy", proxy), ("gold", scores["gold"]))}
        curves[name] = {"kl": best_of_n_kl(sizes), **best}
    return curves, scores["gold"].mean(), scores["gold"].std()


def run(cfg: DictConfig, out: Path) -> dict:
    """task=overoptimization: result.json, two pictures, and a page with both."""
    task = cfg.task
    check_positive(task__reward_timeout=task.reward_timeout)
    chosen, mean, sd = best_of_n_curves(task.best_of_n)
    for name in task.seeds:
        seeds_among([*chosen, *(Path(path).name for path in (*task.input, *task.plane))], name)
    reward_fn = RewardProcess(task.reward_fn, seconds=task.reward_timeout, key="task.reward_fn")
    curves = {"best_of_n": chosen, "rl": {Path(path).name: read_run(path, reward_fn) for path in task.input}}
    plane = {Path(path).name: read_run(path, reward_fn) for path in task.plane}
    for one in [*chosen.values(), *curves["rl"].values(), *plane.values()]:
        one["gold"] = (one["gold"] - mean) / sd
    draws = {"rounds": task.rounds, "seed": cfg.seed}
    fits = {
        form: {name: fit_prompts(one["kl"], one["gold"], form, **draws) for name, one in named.items()}
        for form, named in curves.items()
    }
    summaries = {form: {name: summary(one, fits[form][name]) for name, one in c.items()} for form, c in curves.items()}
    ends = {name: summary(one, None) for name, one in plane.items()}
    means = {form: seed_means(named, list(task.seeds)) for form, named in (summaries | {"plane": ends}).items()}
    plot_curves(out / "overoptimization.png", curves, fits)
    if plane:
        plot_plane(out / "plane.png", plane)
    page(out, summaries | {"plane": ends}, means)
    return {"gold_mean": mean, "gold_sd": sd, **summaries, "plane": ends, "seeds": means}


def summary(one: dict, fitted: dict | None) -> dict:
    """The means of a curve at every step, the measured best gold score and the last with intervals, and the fit.

    A figure of MEANS is {"value", "lower", "upper"}. The KL of best of n is exact, without an interval.
    """
    gold, proxy = one["gold"], one["proxy"]
    best = int(gold.mean(0).argmax())
    kl = np.broadcast_to(one["kl"], gold.shape)
    columns = (gold[:, best], kl[:, best], gold[:, -1], kl[:, -1], proxy[:, -1], gold[:, best] - gold[:, -1])
    result = {"kl": kl.mean(0), "gold": gold.mean(0), "proxy": proxy.mean(0), "num_prompts": len(gold), "fit": fitted}
    figures = {name: over_prompts(column) for name, column in zip(MEANS, columns, strict=True)}
    if one["kl"].ndim == 1:
        figures |= {key: figures[key] | {"lower": None, "upper": None} for key in ("best_kl", "last_kl")}
    return result | figures


def over_prompts(values: np.ndarray) -> dict:
    """{"value", "lower", "upper"}: mean and t interval of one value a prompt."""
    return dict(zip(("value", "lower", "upper"), t_interval(values.astype(float).tolist()), strict=True))


def seed_means(curves: dict[str, dict], trainings: list[str]) -> dict[str, dict]:
    """{NAME: {figure: {"value", "lower", "upper", "note"}}} over the curves NAME_0, NAME_1, ... of each training.

    A fit that does not turn in every seed has no mean peak.
    """
    found: dict[str, dict] = {}
    for name in trainings:
        own = {key: c for key, c in curves.items() if seeds_of(key, [name])}
        if not own:
            continue
        rows = [
            Figure(key, model, c[key]["value"], c[key]["lower"], c[key]["upper"], c["num_prompts"])
            for model, c in own.items()
            for key in MEANS
        ]
        rows += [
            Figure(key, model, fit[key]["value"], fit[key]["lower"], fit[key]["upper"], c["num_prompts"])
            for model, c in own.items()
            if (fit := c["fit"])
            for key in FITTED
            if all(math.isfinite(other["fit"][key]["value"]) for other in own.values())
        ]
        found[name] = {"num_seeds": len(own), "num_prompts": min(c["num_prompts"] for c in own.values())}
        found[name] |= {
            f.benchmark: {k: getattr(f, k) for k in ("value", "lower", "upper", "note")}
            for f in over_seeds(rows, [name])
        }
    return found


def page(out: Path, summaries: dict, means: dict) -> None:
    """Write overoptimization.html and print its tables."""
    head = ("", "best gold", "at KL", "last gold", "its KL", "its proxy", "fall from best", "prompts")
    fits = ("", "alpha", "beta", "turns at sqrt(KL)", "R2", "prompts")
    blocks = [paragraph("Scores in standard deviations of the initial policy's samples.")]
    for form, curves in summaries.items():
        rows = [(name, *(interval_cell(c[key]) for key in MEANS), c["num_prompts"]) for name, c in curves.items()]
        rows += [
            (f"{name}, mean of {m['num_seeds']} seeds", *(interval_cell(m[key]) for key in MEANS), m["num_prompts"])
            for name, m in means[form].items()
        ]
        fitted = [
            (name, *(interval_cell(c["fit"][key]) for key in FITTED), c["fit"]["r2"], c["num_prompts"])
            for name, c in curves.items()
            if c["fit"]
        ]
        fitted += [
            (
                f"{name}, mean of {m['num_seeds']} seeds",
                *(interval_cell(m.get(key)) for key in FITTED),
                None,
                m["num_prompts"],
            )
            for name, m in means[form].items()
            if "alpha" in m
        ]
        print_table(form, head, rows)
        blocks += [heading(form), table([head, *rows])]
        if fitted:
            print_table(f"{form}: fit", fits, fitted)
            blocks.append(table([fits, *fitted]))
    blocks += [picture(out / "overoptimization.png"), picture(out / "plane.png")]
    lines = [
        "Intervals are at 95 %, over prompts; a mean over seeds adds, in squares, what other seeds would change.",
        "The best is the largest of several means, so chance raises it, and the fall from it to the last.",
        "The KL of best of n is exact. R2 describes a fit to the means and has no interval.",
        "A fit has no turning point where its beta is not above 0, and no mean of it where that is so for one seed.",
    ]
    write_page(out / "overoptimization.html", "Over-optimisation", *blocks, bullets(lines))
