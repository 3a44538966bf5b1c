"""The report of a recipe: one table on the screen, and one self-contained HTML page.

Every figure is shown with its file. Plots are embedded. Texts are answers to the same prompts before and after a step.
"""

import json
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from runtime.display import printable
from runtime.metrics import read_log
from runtime.report import heading, paragraph, picture, print_table, table, write_page

console = Console(highlight=False)
HEADER = ("step", "figure", "first", "last", "file")


def report(cfg: DictConfig, home: Path, seconds: dict[str, float], commands: dict[str, str]) -> Path:
    """Write home/report.html and print the same.

    Args:
        seconds, commands: of every step by its name.
    """
    figures = {step.name: step_figures(home, step) for step in cfg.steps}
    rows = [row for step in cfg.steps for row in figures[step.name]]
    print_table(f"recipe {cfg.name}", HEADER, rows)
    for step in cfg.steps:
        for sample in before_and_after(home / step.name):
            console.print(f"\n{step.name}, {shorten(sample['prompt'], 400)}", markup=False, soft_wrap=True, style="dim")
            for when in [key for key in ("before", "after", "reference") if sample[key]]:
                console.print(f"  {when}: {shorten(sample[when], 240)}", markup=False, soft_wrap=True)
    minutes = sum(seconds.values()) / 60
    blocks = [
        paragraph(f"{len(cfg.steps)} steps, {minutes:.1f} minutes. Paths are relative to {home}."),
        table([HEADER, *rows]),
    ]
    for step in cfg.steps:
        blocks += step_blocks(home, step, seconds[step.name], commands[step.name])
    write_page(home / "report.html", f"Recipe {cfg.name}", *blocks)
    console.print(f"\nthe whole as one page: {home / 'report.html'}", markup=False, soft_wrap=True)
    return home / "report.html"


def step_figures(home: Path, step: DictConfig) -> list[tuple]:
    """(step, figure, first, last, file) for every figure that the recipe asks for."""
    return [
        (step.name, name, *values, f"{step.name}/{file}")
        for name, values, file in (read_figure(home / step.name, figure) for figure in step.get("figures", []))
    ]


def read_figure(directory: Path, figure: str) -> tuple[str, tuple, str]:
    """Name, (first, last) and file of a metric over the steps, or of FILE.json:KEY.KEY, which has no first.

    Raises:
        ValueError: the step left no such figure.
    """
    if ".json:" in figure:
        file, key = figure.split(":", 1)
        value = json.loads((directory / file).read_text())
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise ValueError(f"the recipe shows {figure!r}, which {directory / file} does not have")
            value = value[part]
        return key, (None, value), file
    values = [row[figure] for row in read_log(directory / "metrics.jsonl") if figure in row]
    if not values:
        raise ValueError(f"the recipe shows {figure!r}, which {directory}/metrics.jsonl does not have")
    return figure, (values[0], values[-1]), "metrics.jsonl"


def step_blocks(home: Path, step: DictConfig, seconds: float, command: str) -> list[str]:
    """A step's part of the page: its command, texts before and after, pictures."""
    blocks = [heading(step.name), paragraph(f"{seconds / 60:.1f} minutes: {command}")]
    samples = before_and_after(home / step.name)
    if samples:
        columns = [key for key in ("prompt", "before", "after", "reference") if any(sample[key] for sample in samples)]
        blocks += [table([columns, *[[shorten(sample[key], 600) for key in columns] for sample in samples]])]
        blocks += [paragraph(f"Texts: {step.name}/samples.jsonl, its first and its last step.")]
    for path in sorted((home / step.name).glob("*.png")):
        blocks += [picture(path), paragraph(f"Picture: {step.name}/{path.name}")]
    return blocks


def shorten(text: str, most: int) -> str:
    """The text on one line, as a terminal may have it; its middle left out where it is long."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def before_and_after(directory: Path, most: int = 2) -> list[dict]:
    """The same prompts answered at the first and at the last sampling."""
    rows = [row for row in read_log(directory / "samples.jsonl") if "completion" in row]
    steps = sorted({row["step"] for row in rows})
    if len(steps) < 2:
        return []
    early = {row["prompt"]: row["completion"] for row in rows if row["step"] == steps[0]}
    late = [row for row in rows if row["step"] == steps[-1] and row["prompt"] in early]
    return [
        {"prompt": row["prompt"], "before": early[row["prompt"]], "after": row["completion"]}
        | {"reference": row.get("reference", "")}
        for row in late[:most]
    ]
