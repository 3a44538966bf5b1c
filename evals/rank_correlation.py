"""task=rank_correlation: compare a benchmark's ranking of models with a reference, such as Arena's ratings.

Spearman's, Kendall's and Pearson's correlations over the models of both sides. Intervals are Fisher's z with the
standard errors sqrt(1 / (n - 3)) for Pearson, sqrt((1 + r^2 / 2) / (n - 3)) for Spearman (Bonett & Wright 2000) and
sqrt(0.437 / (n - 4)) for Kendall (Fieller, Hartley & Pearson 1957). The units are models, independent of the number of
prompts.
"""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from scipy.stats import kendalltau, norm, pearsonr, spearmanr

from data.files import read_rows
from evals.intervals import unknown
from evals.pages.figures import figures_of
from runtime.plots import pyplot, save_figure
from runtime.report import print_table

FEWEST = 5  # models: with fewer the intervals are not defined


def read_scores(file: str, column: str | None) -> dict[str, float]:
    """{model: score} of result.json (column: one of its benchmarks) or of a table whose first column names models.

    Raises:
        ValueError: the column does not exist, or there are several and none is named, or a model occurs twice.
    """
    if not Path(file).is_file():
        raise ValueError(f"no file {file}; relative paths start at {Path.cwd()}")
    if file.endswith("result.json"):
        result = json.loads(Path(file).read_text(encoding="utf-8"))
        found = [(f.benchmark, f.model, f.value) for f in figures_of(result, Path(file).absolute().parent.name)]
        columns = list(dict.fromkeys(benchmark for benchmark, *_ in found))
        column = _choose(file, column, columns)
        rows = [(model, value) for benchmark, model, value in found if benchmark == column]
    else:
        table = [{" ".join(str(name).split()): value for name, value in row.items()} for row in _rows(file)]
        first, *columns = table[0] if table else [""]
        column = _choose(file, column, columns)
        rows = [(row[first], _number(row[column])) for row in table]
    rows = [(str(model), value) for model, value in rows if value is not None and isinstance(model, str)]
    twice = sorted({model for model, _ in rows if [m for m, _ in rows].count(model) > 1})
    if twice:
        raise ValueError(f"{file}: {', '.join(twice[:5])} occur more than once; keep one row per model")
    return dict(rows)


def _rows(file: str) -> list[dict]:
    """The rows of a table. Rows of a CSV may end early, as in published leaderboards; then cells are empty."""
    if ".csv" in Path(file).suffixes:
        return pd.read_csv(file, dtype=str).to_dict("records")
    return [row for _, row in read_rows(file)]


def _choose(file: str, column: str | None, columns: list[str]) -> str:
    if column is None and len(columns) == 1:
        return columns[0]
    if column not in columns:
        raise ValueError(f"{file}: choose a score, got {column!r}; it has {'; '.join(columns)}")
    return column


def _number(value) -> float | None:
    """The number in a cell. None for an empty cell or a dash."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def correlations(x: np.ndarray, y: np.ndarray, *, level: float) -> dict[str, dict]:
    """Spearman, Kendall and Pearson of (n,) scores, each with its interval and n."""
    n = len(x)
    if n < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        reason = f"both sides have {n} models in common; {FEWEST} whose scores differ are needed"
        return {name: unknown(reason, n=n) for name in ("spearman", "kendall", "pearson")}
    values = {"spearman": spearmanr(x, y), "kendall": kendalltau(x, y), "pearson": pearsonr(x, y)}
    figures = {}
    for name, found in values.items():
        r = float(found.statistic)
        variance = {"spearman": (1 + r * r / 2) / (n - 3), "kendall": 0.437 / (n - 4), "pearson": 1 / (n - 3)}[name]
        half = norm.ppf((1 + level) / 2) * math.sqrt(variance)
        z = math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12))
        figures[name] = {"value": r, "lower": math.tanh(z - half), "upper": math.tanh(z + half), "n": n}
    return figures


def run(cfg: DictConfig, out: Path) -> dict:
    """task=rank_correlation: the correlations, and the models that only one side has."""
    task = cfg.task
    own, reference = read_scores(task.input, task.score), read_scores(task.reference, task.reference_score)
    names = dict(task.names or {})
    unknown_names = [name for name in names if name not in own]
    if unknown_names:
        raise ValueError(f"task.names has {', '.join(unknown_names)}, which are not in {task.input}")
    own = {names.get(model, model): value for model, value in own.items()}
    shared = [model for model in own if model in reference]
    x, y = (np.array([scores[model] for model in shared], float) for scores in (own, reference))
    result: dict = correlations(x, y, level=task.level)
    result |= {
        "models": shared,
        "only_here": [model for model in own if model not in reference],
        "only_in_reference": [model for model in reference if model not in own],
    }
    rows = [
        (name, *(result[name][key] for key in ("value", "lower", "upper", "n")))
        for name in ("spearman", "kendall", "pearson")
    ]
    print_table("correlation over models", ("", "value", "lower", "upper", "models"), rows)
    print(
        f"left out: {len(result['only_here'])} models that only {task.input} has, "
        f"{len(result['only_in_reference'])} that only {task.reference} has"
    )
    if result["spearman"]["value"] is None:
        print(f"no correlation: {result['spearman']['reason']}")
    out.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot().subplots(figsize=(5, 4))
    axes.plot(y, x, "o")
    axes.set_xlabel(task.reference_score or "reference")
    axes.set_ylabel(task.score or "score")
    save_figure(figure, out / "rank_correlation.png")
    return result
