"""The plots of a run."""

import math
import warnings
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

POINTS = 1000  # number of points of a curve, in a panel of 400 pixels


def plot_metrics(rows: Iterable[dict], path: Path) -> None:
    """Plot one panel per metric over the step. A long curve has every k-th point, counted from the last."""
    curves: dict[str, tuple[array, array]] = {}  # 16 bytes per point, so that plotting a long run needs little memory
    for row in rows:
        for name in row.keys() - {"step"}:
            steps, values = curves.setdefault(name, (array("d"), array("d")))
            steps.append(row["step"])
            values.append(row[name])
    if not curves:
        return
    names = sorted(curves)
    plt = pyplot()
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns, 2.4 * lines), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        length = len(curves[name][0])
        steps, values = (column[:: -length // POINTS] for column in curves[name])
        axis.plot(steps, values, marker="." if length < 30 else None, linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def plot_intervals(path: Path, title: str, rows: Sequence[tuple], *, null: float | None) -> None:
    """Plot each row (name, value, lower, upper) as a dot with its interval, and `null` as a vertical line."""
    rows = [row for row in rows if row[1] is not None][::-1]
    width = min(12.0, 5.5 + 0.07 * max((len(str(row[0])) for row in rows), default=0))
    figure, axes = pyplot().subplots(figsize=(width, 1 + 0.28 * max(len(rows), 2)))
    for y, (_, value, lower, upper) in enumerate(rows):
        if lower is not None:
            axes.plot([lower, upper], [y, y], color="tab:blue", linewidth=2)
        axes.plot(value, y, "o", color="tab:blue", markersize=5)
    if null is not None:
        axes.axvline(null, color="gray", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    figure.suptitle(title, fontsize=12)
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def plot_against_kl(path: Path, rows: Sequence[dict], watched: Sequence[str]) -> None:
    """Plot one panel per watched reward: the reward and the score over the KL, with 95 % intervals.

    rows: of each evaluation (mean, half of the interval) under "kl", "score" and every watched name.
    """
    figure, axes = pyplot().subplots(1, len(watched), figsize=(5 * len(watched), 3.6), squeeze=False)
    for axis, name in zip(axes.flat, watched, strict=True):
        for side, of, color in ((axis, "score", "tab:blue"), (axis.twinx(), name, "tab:red")):
            kl, values, errors = ([row["kl"][0] for row in rows], *zip(*(row[of] for row in rows), strict=True))
            side.errorbar(kl, values, yerr=errors, color=color, marker=".", capsize=2, linewidth=1)
            side.set_ylabel(of, color=color)
        axis.set_xlabel("KL to the reference, nats")
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    """Save the figure to a temporary file, rename it, and close the figure."""
    tmp_path = path.with_name(f".{path.name}.tmp")
    with warnings.catch_warnings():  # a name in a script that the font lacks is drawn as boxes; not worth four lines
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.tight_layout()
        figure.savefig(tmp_path, dpi=110, format="png")
    pyplot().close(figure)
    tmp_path.replace(path)


def pyplot():
    """Matplotlib without a screen; imported late, because it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
