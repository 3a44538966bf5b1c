"""The report of a recipe: one table on the screen, and one self-contained HTML page.

The page begins with the `question` of the recipe and its answer, step by step if a step measured gains (task=gains).
Then come the answers to the same prompts before and after, with changes marked. Then come all steps, each with one
picture, its figures, and links to its files. Paths are relative to the page.
"""

import difflib
import json
import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from runtime.display import printable
from runtime.metrics import read_log
from runtime.plots import plot_metrics
from runtime.report import bullets, cell, folded, heading, links, paragraph, picture, print_table, table, write_page

console = Console(highlight=False)
HEADER = ("step", "figure", "first", "last", "file")
NO_INTERVALS = (
    "Figures of a step are those of one run. They have no intervals unless a lower and an upper end are listed. "
    "A step that reads every answer (task=gains) measures the variation over prompts and seeds."
)
SHOWN = 6  # number of prompts shown with their answers


def report(
    home: Path,
    steps: Sequence[DictConfig],
    seconds: dict[str, float],
    commands: dict[str, str],
    *,
    name: str,
    question: str | None,
) -> Path:
    """Write home/report.html and print the same.

    Args:
        seconds, commands: seconds and command of each step, by its name. name, question: of the recipe.
    """
    figures = {step.name: step_figures(home, step) for step in steps}
    rows = [row for step in steps for row in figures[step.name]]
    print_table(f"recipe {name}", HEADER, rows)
    for step in steps:
        for sample in before_and_after(home / step.name)[:2]:
            console.print(f"\n{step.name}, {shorten(sample['prompt'], 400)}", markup=False, soft_wrap=True, style="dim")
            for when in [key for key in ("before", "after", "reference") if sample[key]]:
                console.print(f"  {when}: {shorten(sample[when], 240)}", markup=False, soft_wrap=True)
    minutes, cores = sum(seconds.values()) / 60, os.cpu_count()
    verdicts = [line for step in steps for line in gains_of(home / step.name)]
    for line in verdicts:
        console.print(f"\n{line}", markup=False, soft_wrap=True, style="bold")
    blocks = [
        *([] if question is None else [paragraph(question)]),
        bullets([*verdicts, f"Cost: {minutes:.1f} minutes in {len(steps)} steps, on a machine with {cores} cores."]),
        *(picture(home / step.name / "gains.png") for step in steps),
        *answers_block(home, steps),
        heading("Steps"),
        paragraph(NO_INTERVALS),
    ]
    for step in steps:
        blocks += step_blocks(home, step, figures[step.name], seconds[step.name], commands[step.name])
    write_page(home / "report.html", f"Recipe {name}", *blocks)
    console.print(f"\nthe whole as one page: {home / 'report.html'}", markup=False, soft_wrap=True)
    return home / "report.html"


def gains_of(directory: Path) -> list[str]:
    """A sentence for each method that a task=gains measured. Empty if the step did something else."""
    path = directory / "result.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    lines = []
    for name, method in result.get("methods", {}).items() if result.get("task") == "gains" else ():
        gain, first, last = method["gain"], *(method["runs"][0]["looks"][at] for at in (0, -1))
        value, lower, upper = (gain[key] for key in ("value", "lower", "upper"))
        sure = "no sure change" if lower is None or lower <= 0 <= upper else "better" if value > 0 else "worse"
        within = "" if lower is None else f", 95 % interval {cell(lower)} to {cell(upper)}"
        lines.append(
            f"{name}: {sure} by {result['reward_fn']}: {cell(first['gold']['value'])} before, "
            f"{cell(last['gold']['value'])} after ({value:+.3f}{within}, {gain['n']} "
            f"{'prompts' if method['seeds'] == 1 else 'seeds'}), {cell(last['kl'])} nats from its start."
        )
    return lines


def step_figures(home: Path, step: DictConfig) -> list[tuple]:
    """(step, figure, first, last, file) for every figure that the recipe asks for."""
    return [
        (step.name, name, *values, f"{step.name}/{file}")
        for name, values, file in (read_figure(home / step.name, figure) for figure in step.get("figures", []))
    ]


def read_figure(directory: Path, figure: str) -> tuple[str, tuple, str]:
    """Name, (first, last) and file of a metric over the steps, or of FILE.json:KEY.KEY, which has no first value.

    Raises:
        ValueError: the step wrote no such figure.
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


def step_blocks(home: Path, step: DictConfig, figures: list[tuple], seconds: float, command: str) -> list[str]:
    """The page's part on a step: its figures, one picture, and a folded part with its command and files."""
    directory, blocks = home / step.name, [heading(f"{step.name}, {seconds / 60:.1f} minutes")]
    if step.get("about"):
        blocks.append(paragraph(step.about))
    names = [figure for figure in step.get("figures", []) if ".json:" not in figure]
    if figures:
        blocks.append(table([HEADER[1:4], *(row[1:4] for row in figures)]))
    if names:
        rows = [
            {k: v for k, v in row.items() if k in (*names, "step")} for row in read_log(directory / "metrics.jsonl")
        ]
        (home / "pictures").mkdir(exist_ok=True)
        plot_metrics(rows, home / "pictures" / f"{step.name}.png")
        blocks.append(picture(home / "pictures" / f"{step.name}.png"))
    elif not (directory / "gains.png").exists():
        blocks += [picture(path) for path in sorted(directory.glob("*.png"))[:1]]
    files = sorted(path for path in directory.glob("*") if path.is_file() and not path.name.startswith("."))
    command = re.sub(r"(?<![^\s=\[,'\"({:])/(?:[^\s/,\]'\"]+/)*", "", command.replace(str(home), home.name))
    return [*blocks, folded("command and files", paragraph(command), links([f"{step.name}/{f.name}" for f in files]))]


def answers_block(home: Path, steps: Sequence[DictConfig]) -> list[str]:
    """The answers to the same prompts before and after each step that wrote samples, with changes marked."""
    samples_of = {step.name: before_and_after(home / step.name) for step in steps}
    samples_of = {name: samples for name, samples in samples_of.items() if samples}
    prompts = list(dict.fromkeys(sample["prompt"] for samples in samples_of.values() for sample in samples))
    prompts.sort(key=lambda prompt: -sum(sample["prompt"] == prompt for s in samples_of.values() for sample in s))
    if not prompts:
        return []
    blocks = [heading("Answers"), paragraph("Words that the answer before did not have are marked.")]
    for prompt in prompts[:SHOWN]:
        lines = []
        for name, samples in samples_of.items():
            for sample in [sample for sample in samples if sample["prompt"] == prompt][:1]:
                before, after = (shorten(sample[key], 400) for key in ("before", "after"))
                lines += [(f"before {name}", escape(before)), (f"after {name}", marked(before, after))]
        blocks.append(exchange(shorten(spoken(prompt), 400), list(dict.fromkeys(lines))))
    return blocks


def exchange(prompt: str, lines: list[tuple[str, str]]) -> str:
    """A prompt and its answers, each a pair of name and HTML."""
    answers = "".join(f"<dt>{escape(who)}</dt><dd>{what}</dd>" for who, what in lines)
    return f'<div class="exchange"><p>{escape(prompt)}</p><dl>{answers}</dl></div>'


def spoken(prompt: str) -> str:
    """A prompt as the model gets it, with each message's role as a word."""
    text = re.sub(r"<\|end\|>|<\|assistant\|>\s*$|<s>", " ", prompt)
    return re.sub(r"\s*<\|(user|assistant|system)\|>\s*", r" \1: ", text).strip()


def marked(before: str, after: str) -> str:
    """`after` as HTML. Words that `before` does not have at their place are marked."""
    old, new = before.split(), after.split()
    parts = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        words = escape(" ".join(new[start:end]))
        parts += [words if kind == "equal" else f"<mark>{words}</mark>"] if words else []
    return " ".join(parts)


def shorten(text: str, most: int) -> str:
    """The text on one line without control characters. The middle of a long text is left out."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def before_and_after(directory: Path) -> list[dict]:
    """The answers to the same prompts at the first and at the last sampling."""
    rows = [row for row in read_log(directory / "samples.jsonl") if "completion" in row]
    steps = sorted({row["step"] for row in rows})
    if len(steps) < 2:
        return []
    early = {row["prompt"]: row["completion"] for row in rows if row["step"] == steps[0]}
    late = [row for row in rows if row["step"] == steps[-1] and row["prompt"] in early]
    return [
        {"prompt": row["prompt"], "before": early[row["prompt"]], "after": row["completion"]}
        | {"reference": row.get("reference", "")}
        for row in late
    ]
