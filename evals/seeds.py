"""Figures with intervals, and their means over the seeds of one training: models NAME_0, NAME_1, ..."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from evals.intervals import t_interval


class Figure(NamedTuple):
    """A figure of a model in a benchmark. `note` is the reason if there is no interval, or a remark for the reader."""

    benchmark: str
    model: str
    value: float
    lower: float | None
    upper: float | None
    n: int | None
    note: str = ""
    least: float = -math.inf  # the figure cannot be less than this
    most: float = math.inf


def seeds_of(model: str, trainings: Sequence[str]) -> str | None:
    """NAME if the model is NAME_0, NAME_1, ... for a NAME in `trainings`, else None."""
    return next((name for name in trainings if re.fullmatch(rf"{re.escape(name)}_\d+", model)), None)


def seeds_among(models: Iterable[str], training: str) -> list[str]:
    """The models that are seeds of a training.

    Raises:
        ValueError: there are fewer than two.
    """
    own = sorted(model for model in models if seeds_of(model, [training]))
    if len(own) < 2:
        raise ValueError(
            f"task.seeds={training} needs results of two or more models called {training}_0, {training}_1, ...; there "
            f"are {', '.join(own) or 'none'}"
        )
    return own


def over_seeds(figures: Sequence[Figure], trainings: Sequence[str]) -> list[Figure]:
    """The mean over the seeds of each training in each benchmark.

    Its interval covers the variation over both seeds and questions. Seeds answer the same questions, so their error
    from the choice of questions is common, and more seeds do not average it out:

        (mean - lower)^2 = (half width of the t interval over seeds)^2 + (mean of the seeds' own value - lower)^2

    (MOVER: Zou & Donner 2008, for a sum of two parts), and likewise for the upper bound. One seed has no such
    interval.

    Raises:
        ValueError: a training with fewer than two seeds among the models.
    """
    groups: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        name = seeds_of(figure.model, trainings)
        if name is not None:
            groups.setdefault((name, figure.benchmark), []).append(figure)
    for name in trainings:
        seeds_among({figure.model for figure in figures}, name)
    return [_mean_of_seeds(name, own) for (name, _), own in groups.items()]


def _mean_of_seeds(name: str, own: list[Figure]) -> Figure:
    mean, low, high = t_interval([figure.value for figure in own])
    sizes = [figure.n for figure in own if figure.n is not None]
    row = own[0]._replace(model=f"{name}, mean of {len(own)} seeds", value=mean, n=min(sizes, default=None))
    if low is None or any(figure.lower is None for figure in own):
        return row._replace(lower=None, upper=None, note="too few seeds, or a seed without an interval")
    below = math.hypot(mean - low, sum(figure.value - figure.lower for figure in own) / len(own))
    above = math.hypot(high - mean, sum(figure.upper - figure.value for figure in own) / len(own))
    notes = "; ".join(dict.fromkeys(note for figure in own for note in figure.note.split("; ") if note))
    return row._replace(lower=max(mean - below, row.least), upper=min(mean + above, row.most), note=notes)
