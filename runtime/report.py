"""Write results: result.json, tables on the screen, self-contained HTML pages.

A page is a title and blocks. Each block is created (and escaped) by a function of this file:

    write_page(run_dir / "report.html", "Agreement", bullets(verdicts), table(rows), picture(run_dir / "agreement.png"))
"""

import json
import math
import sys
from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from runtime.display import printable
from runtime.files import write_whole

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2, p, li, td.text { overflow-wrap: anywhere } .scrolls { overflow-x: auto }
.text { min-width: 9rem } .text:last-child { min-width: 14rem } .text.short { white-space: pre; min-width: 0 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; text-align: right }
.text, td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #ddd }
h3, summary { font-size: 1rem } details { color: #555 } mark { background: #d8efd3; color: inherit }
.exchange { border-left: 3px solid #ddd; padding-left: 1rem; margin: 1.2rem 0 } 
.exchange p { font-weight: 600; margin: 0 }
dl { display: grid; grid-template-columns: 8rem 1fr; gap: .2rem 1rem; margin: .4rem 0 }
dt { color: #666 } dd { margin: 0 }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0 } dd { margin-bottom: .4rem } }
.bad { background: #fde8e6 } .unknown { color: #888 } img { max-width: 100% }
"""


SHORT = 24  # number of characters of a line that is not broken


def write_result(directory: Path, result: dict) -> None:
    """Write result.json. Numbers that are not finite become null."""
    text = json.dumps(plain(result), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(directory / "result.json", text + "\n")


def plain(value):
    """The value with NumPy types converted to Python's, and numbers that are not finite to None."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cell(value) -> str:
    """The text of a table cell: four significant digits, one decimal from 1,000 on, a dash for None."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    return str(value)


def interval_cell(figure: dict | None, key: str = "value") -> str:
    """The text of a table cell for an estimate: 1.2 (1.0 to 1.4); without an interval the value alone."""
    if figure is None or figure.get("lower") is None or not math.isfinite(figure["lower"]):
        return cell(figure and figure[key])
    return f"{cell(figure[key])} ({cell(figure['lower'])} to {cell(figure['upper'])})"


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Print a table, with numbers aligned to the right."""
    shown = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        shown.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*(Text(printable(cell(value))) for value in row))  # brackets in a name are not markup
    # a log has no width limit, so no figure is cut off
    Console(width=None if sys.stdout.isatty() else 250).print(shown)


def write_page(path: Path, title: str, *blocks: str) -> None:
    """Write an HTML page with the title and the blocks."""
    head = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    write_whole(path, "\n".join([head, f"<h1>{escape(title)}</h1>", *blocks, "</html>\n"]))


def heading(text: str) -> str:
    """A heading within the page."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph."""
    return f"<p>{escape(text)}</p>"


def bullets(lines: Iterable[str]) -> str:
    """A list with one item per line."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def links(paths: Iterable[str]) -> str:
    """Files beside the page, by their paths relative to it."""
    return "<p>" + " ".join(f'<a href="{escape(quote(path))}">{escape(path)}</a>' for path in paths) + "</p>"


def folded(title: str, *blocks: str) -> str:
    """Blocks behind a click."""
    return f"<details><summary>{escape(title)}</summary>{''.join(blocks)}</details>"


def table(rows: Sequence[Sequence], *, kinds: Sequence[str] | None = None) -> str:
    """A table. The first row is the header. Texts are aligned to the left, numbers to the right.

    kinds: "bad", "unknown" or "" for each other row. It sets the colour.
    """
    header, *body = rows
    texts = {i for row in body for i, value in enumerate(row) if isinstance(value, str) and " " in value}
    long = {i for row in body for i, value in enumerate(row) if max(map(len, cell(value).split("\n"))) > SHORT}
    columns = ["" if i not in texts else "text" if i in long else "text short" for i in range(len(header))]
    lines = [_tr("", "th", header, columns)]
    lines += [_tr(kind, "td", row, columns) for row, kind in zip(body, kinds or [""] * len(body), strict=True)]
    return '<div class="scrolls"><table>' + "".join(lines) + "</table></div>"


def picture(path: Path) -> str:
    """An embedded PNG, or an empty text if the file does not exist."""
    if not path.exists():
        return ""
    data = b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


def _tr(kind: str, tag: str, row: Sequence, columns: Sequence[str]) -> str:
    cells = (f'<{tag} class="{side}">{escape(cell(v))}</{tag}>' for v, side in zip(row, columns, strict=True))
    return f'<tr class="{kind}">' + "".join(cells) + "</tr>"
