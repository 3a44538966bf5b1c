"""What an evaluation leaves behind: result.json, a table on the screen, pictures."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend is chosen first


def write_text(path: Path, text: str) -> None:
    """Write aside, then rename: a reader never sees half a file."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_result(out: Path, result: dict) -> None:
    """result.json; a number that is not finite is null."""
    write_text(out / "result.json", json.dumps(plain(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value):
    """The value with numpy's types turned into Python's and what is not finite into None."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cell(value) -> str:
    """A table cell: four significant digits, a dash where there is nothing."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:.1f}"
        if isinstance(value, float)
        else str(value)
    )


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """A table on the screen, numbers to the right."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(cell(value) for value in row))
    Console().print(table)


def plot_intervals(path: Path, title: str, rows: Sequence[tuple], *, null: float | None) -> None:
    """One line a row (name, value, lower, upper): a dot and its interval; `null` is drawn as a vertical line."""
    rows = [row for row in rows if row[1] is not None][::-1]
    figure, axes = plt.subplots(figsize=(7, 1 + 0.28 * max(len(rows), 2)), layout="constrained")
    for y, (_, value, lower, upper) in enumerate(rows):
        if lower is not None:
            axes.plot([lower, upper], [y, y], color="tab:blue", linewidth=2)
        axes.plot(value, y, "o", color="tab:blue", markersize=5)
    if null is not None:
        axes.axvline(null, color="gray", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
