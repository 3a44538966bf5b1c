"""The two plots of task=overoptimization."""

from pathlib import Path

import numpy as np

from runtime.plots import pyplot, save_figure

TITLES = {"best_of_n": "best of n", "rl": "PPO"}
FORMS = {"best_of_n": lambda d, a, b: d * (a - b * d), "rl": lambda d, a, b: d * (a - b * np.log(d))}


def plot_curves(path: Path, curves: dict[str, dict], fits: dict[str, dict]) -> None:
    """A panel for best-of-n, one for RL: gold points with their fit, the proxy's own score dashed; a colour a proxy."""
    figure, panels = pyplot().subplots(1, 2, figsize=(11, 4.4))
    for axes, (form, named) in zip(panels, curves.items(), strict=True):
        for name, one in named.items():
            d = np.sqrt(np.maximum(np.atleast_2d(one["kl"]).mean(0), 0))
            gold, error = one["gold"].mean(0), one["gold"].std(0, ddof=1) / len(one["gold"]) ** 0.5
            dots = axes.errorbar(d, gold, yerr=1.96 * error, fmt="o", markersize=3, linewidth=0.8, label=name)
            colour = dots[0].get_color()
            axes.plot(d, one["proxy"].mean(0), "--", color=colour, linewidth=1)
            line = np.linspace(0.02, d.max(), 200)
            a, b = (fits[form][name][key]["value"] for key in ("alpha", "beta"))
            axes.plot(line, gold[0] + FORMS[form](line, a, b), color=colour, linewidth=1.2)
        axes.set(title=TITLES[form], xlabel="sqrt(KL to the initial policy), sqrt(nats)")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("score, sd of the initial policy\ndots: gold, line: its fit, dashed: proxy")
    save_figure(figure, path)


def plot_plane(path: Path, runs: dict[str, dict]) -> None:
    """Plot gold and proxy score over sqrt(KL) of every run, with the last evaluation as a large dot."""
    figure, panels = pyplot().subplots(1, 2, figsize=(11, 4.4), sharex=True)
    for axes, key in zip(panels, ("gold", "proxy"), strict=True):
        for name, one in runs.items():
            d, score = np.sqrt(np.maximum(one["kl"].mean(0), 0)), one[key].mean(0)
            style = "o-" if "ppo" in name else "s--"
            (line,) = axes.plot(d, score, style, markersize=2, linewidth=1, label=name)
            axes.plot(d[-1], score[-1], style[0], color=line.get_color(), markersize=7)
        axes.set(title=f"{key} score", xlabel="sqrt(KL to the initial policy), sqrt(nats)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("score, sd of the initial policy")
    panels[0].legend(fontsize=7)
    save_figure(figure, path)
