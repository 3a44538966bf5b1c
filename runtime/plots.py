"""The pictures that a run leaves behind."""

import math
from pathlib import Path


def plot_metrics(rows: list[dict], path: Path) -> None:
    """One panel per metric, against the step."""
    names = sorted({name for row in rows for name in row} - {"step"})
    if not names:
        return
    plt = pyplot()
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns, 2.4 * lines), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None, linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    """Written aside and renamed, then closed."""
    figure.tight_layout()
    aside = path.with_name(f".{path.name}.tmp")
    figure.savefig(aside, dpi=110, format="png")
    pyplot().close(figure)
    aside.replace(path)


def pyplot():
    """Matplotlib without a screen; imported late, because it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
