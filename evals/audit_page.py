"""The audit as one HTML page that needs nothing else: a verdict a line, then the pictures, then the table."""

from base64 import b64encode
from html import escape
from pathlib import Path

from evals.report import cell, write_text

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 } td, th { padding: .3rem .6rem; text-align: right }
td:first-child, th:first-child, td:last-child, th:last-child { text-align: left } tr { border-bottom: 1px solid #ddd }
.bias { background: #fde8e6 } .unknown { color: #888 } img { max-width: 100% } small { color: #666 }
"""
TITLES = {
    "position": "Order shown",
    "length": "Length",
    "unique_tokens": "Unique words",
    "self_preference": "Own family",
    "agreement": "Agreement",
    "unreadable": "Unreadable verdicts",
    "low_entropy": "Questions with one right answer",
    "degenerate": "Degenerate answers",
}


def write_page(path: Path, result: dict, names: list[str]) -> None:
    """Write the page; the pictures that lie beside it are embedded."""
    figures = "".join(_row(name, result[name]) for name in names)
    named = ", ".join(TITLES[name].lower() for name in result["named"]) or "none"
    pictures = "".join(_picture(path.with_name(name)) for name in ("audit.png", "agreement.png"))
    body = f"""<!doctype html><meta charset="utf-8"><title>Audit of {escape(result["judge"])}</title>
<style>{STYLE}</style><h1>Audit of {escape(result["judge"])}</h1>
<p><b>Named:</b> {escape(named)}</p>
<table><tr><th></th><th>value</th><th>interval</th><th>n</th><th>verdict</th></tr>{figures}</table>
<p><small>Intervals hold together: each covers with probability {100 * result["level"]:.2f} %, resampled or clustered by
question; biases are named by Holm-adjusted p values. <i>Detectable</i> in result.json is the smallest departure that
these votes show with the asked power.</small></p>
{pictures}{_categories(result["categories"])}"""
    write_text(path, body)


def _row(name: str, figure: dict) -> str:
    verdict = figure["verdict"]
    kind = "bias" if verdict.startswith("BIAS") else "unknown" if figure["value"] is None else ""
    interval = f"{cell(figure['lower'])} to {cell(figure['upper'])}" if figure["value"] is not None else "-"
    cells = (TITLES[name], cell(figure["value"]), interval, str(figure["n"]), verdict.removeprefix("BIAS: "))
    return f'<tr class="{kind}">' + "".join(f"<td>{escape(text)}</td>" for text in cells) + "</tr>"


def _picture(path: Path) -> str:
    if not path.exists():
        return ""
    return f'<p><img alt="{path.stem}" src="data:image/png;base64,{b64encode(path.read_bytes()).decode()}"></p>'


def _categories(categories: dict) -> str:
    if not categories:
        return ""
    rows = ""
    for name, row in categories.items():
        people = row["people"]["agreement"] if row["people"] else None
        lower, upper = row["agreement_interval"]
        figures = (row["agreement"], lower, upper, people, row["spearman"], row["n"])
        rows += "<tr>" + "".join(f"<td>{escape(cell(value))}</td>" for value in (name, *figures)) + "</tr>"
    head = "".join(f"<th>{name}</th>" for name in ("", "agreement", "lower", "upper", "people", "rank corr.", "n"))
    return f"<h2>By category</h2><table><tr>{head}</tr>{rows}</table>"
