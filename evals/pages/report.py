"""task=report: many results on two self-contained pages: report.html (a comparison) and leaderboard.html."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from data.records import read_jsonl
from evals.families import short
from evals.intervals import mean_estimate, share_estimate
from evals.pages.figures import figures_of
from evals.readers import read_votes
from evals.seeds import Figure, over_seeds, seeds_of
from evals.verdicts import PAIR, fold_orders, points
from runtime.plots import plot_intervals, pyplot, save_figure
from runtime.report import bullets, cell, heading, paragraph, picture, table, write_page


def load_runs(folders: list[str]) -> dict[str, dict]:
    """{folder: result.json}.

    Raises:
        ValueError: a folder without a result.
    """
    results = {}
    for folder in folders:
        file = Path(folder) / "result.json"
        if not file.is_file():
            raise ValueError(f"{folder} has no result.json; task.input takes directories of evaluate.py")
        results[folder] = json.loads(file.read_text(encoding="utf-8"))
    return results


def names_of(folders: Sequence[str]) -> dict[str, str]:
    """{folder: its name on the pages}: the folder's name, with as many parents as make it unique."""
    parts = {folder: Path(folder).absolute().parts for folder in folders}
    names = {}
    for folder, own in parts.items():
        size = next(
            n
            for n in range(1, len(own) + 1)
            if n == len(own) or sum(other[-n:] == own[-n:] for other in parts.values()) == 1
        )
        names[folder] = "/".join(own[-size:])
    return names


def with_run_names(figures: list[tuple[str, Figure]]) -> list[Figure]:
    """The figures of (run, figure). If runs measured the same benchmark of one model, the benchmark names its run."""
    runs: dict[tuple[str, str], set[str]] = {}
    for run, figure in figures:
        runs.setdefault((figure.model, figure.benchmark), set()).add(run)
    return [
        figure
        if len(runs[figure.model, figure.benchmark]) == 1
        else figure._replace(benchmark=f"{figure.benchmark} (run {run})")
        for run, figure in figures
    ]


def interval(figure: Figure) -> str:
    """The interval as text, or the reason why there is none."""
    return figure.note if figure.lower is None else f"{cell(figure.lower)} to {cell(figure.upper)}"


def grades_by_category(folders: Sequence[str]) -> list[Figure]:
    """The mean grade of each model in each category (`benchmark`) of every grades.jsonl. Judges are separate."""
    rows = [
        row
        for folder in folders
        if (Path(folder) / "grades.jsonl").is_file()
        for row in read_jsonl(Path(folder) / "grades.jsonl")
    ]
    known = pd.DataFrame([row for row in rows if row["grade"] is not None and row["category"]])
    figures, several = [], len(known) and known["judge"].nunique() > 1
    for (model, judge, category), own in known.groupby(["model", "judge", "category"]) if len(known) else ():
        found = mean_estimate(own["grade"], own["question"], null=5.5, level=0.95, max_deviation=4.5)
        low, high = found["lower"], found["upper"]  # a grade is from 1 to 10, also with few questions
        bounds = (None, None) if low is None else (max(low, 1.0), min(high, 10.0))
        name = f"{model} by {short(judge)}" if several else model
        why = found.get("reason", "")
        figures.append(Figure(category, name, own["grade"].mean(), *bounds, len(own), why, 1.0, 10.0))
    return figures


def plot_radar(path: Path, grades: Sequence[Figure]) -> bool:
    """MT-Bench's radar plot: one spoke per category, one line per model. False with fewer than three categories."""
    categories = sorted({figure.benchmark for figure in grades})
    if len(categories) < 3:
        return False
    angles = np.linspace(0, 2 * np.pi, len(categories), endpoint=False)
    figure, axes = pyplot().subplots(figsize=(6, 5), subplot_kw={"projection": "polar"})
    for model in dict.fromkeys(grade.model for grade in grades):
        found = {grade.benchmark: grade.value for grade in grades if grade.model == model}
        values = np.array([found.get(category, np.nan) for category in categories])
        axes.plot(np.r_[angles, angles[0]], np.r_[values, values[0]], marker="o", label=model)
    axes.set_xticks(angles, categories)
    axes.set_ylim(0, 10)
    axes.legend(loc="lower right", bbox_to_anchor=(1.3, -0.1), fontsize=8)
    save_figure(figure, path)
    return True


def votes_of(folders: list[str]) -> pd.DataFrame | None:
    """The verdicts of all runs, each judge's two orders folded."""
    files = [str(Path(folder) / "verdicts.jsonl") for folder in folders if (Path(folder) / "verdicts.jsonl").is_file()]
    return fold_orders(read_votes(files, "verdicts")) if files else None


def wins_by_length(votes: pd.DataFrame) -> list[tuple]:
    """(bin, share, lower, upper, n): the share of wins of the longer answer, by judge and by length difference."""
    known = votes[(votes["verdict"] != "error") & votes["length_a"].notna() & votes["length_b"].notna()]
    rows = []
    for judge, own in known.groupby("judge", sort=True):
        gap = own["length_a"] - own["length_b"]
        longer = points(own["verdict"]).where(gap > 0, 1 - points(own["verdict"]))
        by = f"{short(judge)}: " if known["judge"].nunique() > 1 else ""
        for low, high in ((1, 100), (100, 300), (300, 1000), (1000, np.inf)):
            part = (gap.abs() >= low) & (gap.abs() < high)
            if part.sum() > 1:
                estimate = share_estimate(longer[part], own["question"][part], null=0.5, level=0.95)
                name = f"{low} to {high:.0f} characters longer" if high < np.inf else f"{low} characters longer or more"
                rows.append((by + name, *(estimate[key] for key in ("value", "lower", "upper", "n"))))
    return rows


def disagreements(votes: pd.DataFrame, limit: int) -> list[tuple]:
    """Items on which judges name different winners: question, models, and the verdict of each judge."""
    named = votes[votes["verdict"].isin(["a", "b"])]
    rows = []
    for (question, turn, a, b), part in named.groupby(PAIR, sort=False):
        winners = {"a": a, "b": b}
        if part["judge"].nunique() > 1 and part["verdict"].nunique() > 1:
            verdicts = ", ".join(f"{short(row.judge)}: {winners[row.verdict]}" for row in part.itertuples())
            rows.append((str(question)[:80], turn, f"{a} or {b}", verdicts))
    return rows[:limit]


def leaderboard(figures: Sequence[Figure]) -> list[str]:
    """Tables with one row per benchmark and one column per model. Models without a common benchmark are separated."""
    models: dict[str, set[str]] = {}
    for figure in figures:
        models.setdefault(figure.benchmark, set()).add(figure.model)
    groups: list[tuple[list[str], set[str]]] = []  # (benchmarks, models)
    for benchmark, own in models.items():
        near = [group for group in groups if group[1] & own]
        groups = [group for group in groups if group not in near]
        groups.append((sum((names for names, _ in near), []) + [benchmark], own.union(*(group[1] for group in near))))
    cells = {(figure.model, figure.benchmark): figure for figure in figures}
    tables = []
    for benchmarks, own in groups:
        order = sorted(own, key=lambda model: (-sum((model, name) in cells for name in benchmarks), model))
        rows = [(name, *(board_cell(cells.get((model, name))) for model in order)) for name in benchmarks]
        tables.append(table([("", *order), *rows]))
    return tables


def board_cell(figure: Figure | None) -> str:
    """The value, its interval and n, each on one line."""
    return "-" if figure is None else f"{cell(figure.value)}\n{interval(figure)}\nn {cell(figure.n)}"


def notes_of(figures: list[Figure]) -> list[str]:
    """Remarks that readers need to interpret the figures, each once."""
    notes: dict[str, list[str]] = {}
    for figure in figures:
        for note in filter(None, figure.note.split("; ")):
            notes.setdefault(note, []).append(figure.benchmark)
    return [f"{', '.join(dict.fromkeys(benchmarks))}: {note}" for note, benchmarks in notes.items()]


def figure_table(figures: Sequence[Figure]) -> str:
    """A row per figure: the measure (once for all models), the model, the value, its interval and n."""
    rows: list[tuple] = [("benchmark", "model", "value", "interval", "n")]
    for benchmark in dict.fromkeys(figure.benchmark for figure in figures):
        own = [(f.model, f.value, interval(f), f.n) for f in figures if f.benchmark == benchmark]
        rows += [(name, *row) for name, row in zip([benchmark] + [""] * len(own), own, strict=False)]
    return table(rows)


def without_seeds(means: list[Figure], figures: list[Figure], trainings: Sequence[str]) -> list[Figure]:
    """The means over seeds, and the figures of models that are not seeds of these trainings."""
    return means + [figure for figure in figures if seeds_of(figure.model, trainings) is None]


def run(cfg: DictConfig, out: Path) -> dict:
    """task=report: report.html, leaderboard.html and the pictures in them."""
    task = cfg.task
    results = load_runs(list(task.input))
    names, seeds = names_of(list(results)), list(task.seeds)
    figures = with_run_names(
        [(names[f], figure) for f, result in results.items() for figure in figures_of(result, names[f])]
    )
    means = over_seeds(figures, seeds)
    out.mkdir(parents=True, exist_ok=True)
    blocks = [
        paragraph(
            f"{len(results)} runs. Intervals are at 95 % unless a run's config.yaml says otherwise; "
            "where there is none, the cell gives the reason."
        ),
        figure_table(means + figures),
        bullets(notes_of(figures)),
    ]
    grades = grades_by_category(list(results))
    of_seeds = over_seeds(grades, seeds) if seeds and grades else []
    if plot_radar(out / "radar.png", without_seeds(of_seeds, grades, seeds)):
        blocks += [heading("Grades by category"), picture(out / "radar.png"), *leaderboard(of_seeds + grades)]
    votes = votes_of(list(results))
    if votes is not None:
        by_length = wins_by_length(votes)
        plot_intervals(out / "length.png", "share of wins of the longer answer", [r[:4] for r in by_length], null=0.5)
        head = ("", "longer wins", "lower", "upper", "n")
        blocks += [heading("Win rate against length"), picture(out / "length.png"), table([head, *by_length])]
        apart = disagreements(votes, task.samples)
        sentence = (
            table([("question", "turn", "models", "winner"), *apart])
            if apart
            else paragraph("None: one judge, or all agree.")
        )
        blocks += [heading("Where judges disagree"), sentence]
    people = [f for f in figures if f.benchmark.startswith(("agreement", "audit"))]
    if people:
        blocks += [
            heading("Judges against people"),
            bullets(f"{f.model}, {f.benchmark}: {f.note}" for f in people if f.note),
        ]
    write_page(out / "report.html", task.title, *blocks)
    board = [*leaderboard(without_seeds(means, figures, seeds)), bullets(notes_of(figures))]
    write_page(out / "leaderboard.html", f"{task.title}: leaderboard", *board)
    print(f"{len(figures)} figures of {len({f.model for f in figures})} models: {out / 'report.html'}")
    return {"num_figures": len(figures), "figures": [f._asdict() for f in means + figures]}
