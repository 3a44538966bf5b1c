"""The audit as one self-contained HTML page: one verdict per line, then the plots, then the table."""

from pathlib import Path

from evals.agreement import estimate
from evals.families import short
from runtime.report import bullets, cell, heading, interval_cell, paragraph, picture, table, write_page

TITLES = {
    "position": "Order shown",
    "length": "Length",
    "unique_tokens": "Unique words",
    "self_preference": "Own family",
    "agreement": "Agreement",
    "unreadable": "Unreadable verdicts",
    "low_entropy": "Questions with one right answer",
    "left_share": "First of one order",
    "degenerate": "Degenerate answers",
}


def write_audit(path: Path, result: dict, names: list[str]) -> None:
    """Write the page. The plots in its directory are embedded."""
    named = ", ".join(TITLES[name].lower() for name in result["named"]) or "none"
    figures = [("", "value", "interval", "n", "verdict")] + [_row(name, result[name]) for name in names]
    kinds = [_kind(result[name]) for name in names]
    notes = (
        f"Intervals hold simultaneously: each covers with probability {100 * result['level']:.2f} %, resampled or "
        "clustered "
        "by question. Biases are significant by Holm-adjusted p values. `detectable` in result.json is the smallest "
        "bias that these votes detect with the required power."
    )
    pictures = [picture(path.with_name(name)) for name in ("audit.png", "agreement.png")]
    blocks = [bullets([f"named: {named}"]), table(figures, kinds=kinds), paragraph(notes), *pictures]
    if result["categories"]:
        blocks += [heading("Agreement by category"), table(_categories(result["categories"]))]
    orders = _orders(result["position_by_category"])
    if len(orders) > 1:
        blocks += [heading("Order by category"), table(orders)]
    write_page(path, f"Audit of {short(result['judge'])}", *blocks)


def _row(name: str, figure: dict) -> tuple:
    interval = f"{cell(figure['lower'])} to {cell(figure['upper'])}" if figure["value"] is not None else "-"
    return TITLES[name], figure["value"], interval, figure["n"], figure["verdict"].removeprefix("BIAS: ")


def _kind(figure: dict) -> str:
    return "bad" if figure["verdict"].startswith("BIAS") else "unknown" if figure["value"] is None else ""


def _orders(categories: dict) -> list[tuple]:
    """Rows on position bias: shares of verdicts that change with the order, and of wins of the answer shown first."""
    rows = [("", "verdict changes", "lower", "upper", "items", "names the first", "lower", "upper", "verdicts")]
    for name, row in categories.items():
        if row["value"] is not None:
            changed = row["flips"]["changed"]
            rows.append(
                (
                    name,
                    *(changed[key] for key in ("value", "lower", "upper", "n")),
                    *(row[key] for key in ("value", "lower", "upper", "n")),
                )
            )
    return rows


def _categories(categories: dict) -> list[tuple]:
    rows = [("", "agreement", "lower", "upper", "n", "people among themselves", "n")]
    for name, row in categories.items():
        people = (
            (interval_cell(estimate(row["people"], "agreement")), row["people"]["n"]) if row["people"] else (None,) * 2
        )
        rows.append((name, row["agreement"], *row["agreement_interval"], row["n"], *people))
    return rows
