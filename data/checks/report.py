"""What every check leaves: result.json, pictures, and a page that shows them. Written aside, then renamed."""

import base64
import html
import json
import math
import os
from pathlib import Path

import numpy as np

from runtime.plots import save_figure


def write_result(directory: Path, result: dict) -> None:
    """result.json; numpy numbers become plain ones, not-a-number becomes null."""
    _replace(directory / "result.json", json.dumps(_plain(result), indent=2, ensure_ascii=False) + "\n")


def write_page(
    directory: Path, title: str, lines: list[str], tables: dict[str, list[list]], pictures: list[str]
) -> None:
    """report.html: the verdicts in a line each, then tables (first row: header), then the pictures, all in one file."""
    parts = [f"<h1>{html.escape(title)}</h1>", "<ul>", *(f"<li>{html.escape(line)}</li>" for line in lines), "</ul>"]
    for name, rows in tables.items():
        cells = [[html.escape(_shown(cell)) for cell in row] for row in rows]
        header = "".join(f"<th>{cell}</th>" for cell in cells[0])
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells[1:])
        parts.append(f"<h2>{html.escape(name)}</h2><table><tr>{header}</tr>{body}</table>")
    for picture in pictures:
        data = base64.b64encode((directory / picture).read_bytes()).decode()
        parts.append(f'<p><img alt="{html.escape(picture)}" src="data:image/png;base64,{data}"></p>')
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}img{max-width:100%}"
        "table{border-collapse:collapse}td,th{border-bottom:1px solid #ccc;padding:.2em .8em;text-align:right}"
        "td:first-child,th:first-child{text-align:left}"
    )
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    _replace(directory / "report.html", f"{page}<style>{style}</style>{''.join(parts)}</html>\n")


def plot_intervals(estimates: dict[str, dict], threshold: float, what: str, path: Path) -> None:
    """A dot and its interval for each {value, lower, upper}, a line at the threshold."""
    names = list(estimates)[::-1]
    figure, axis = pyplot().subplots(figsize=(7, 1.2 + 0.3 * len(names)))
    for y, name in enumerate(names):
        one = estimates[name]
        axis.plot([one["lower"], one["upper"]], [y, y], color="tab:blue", linewidth=2)
        axis.plot(one["value"], y, "o", color="tab:blue")
    axis.axvline(threshold, color="tab:red", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel(what)
    axis.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def pyplot():
    """Matplotlib without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _shown(cell) -> str:
    if isinstance(cell, float):
        return "-" if math.isnan(cell) else f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:,.0f}"
    return str(cell)


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(one) for one in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
