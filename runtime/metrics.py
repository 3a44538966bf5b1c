"""What a run measures: exact means over every element on every rank, one JSON object a step."""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.devices import widest
from runtime.files import named_in_errors, sync


class Mean(NamedTuple):
    """A mean that stays on the device: what a mask leaves of (B, T) values, without asking how many there are."""

    total: Tensor  # () float64
    count: Tensor  # ()

    def mean(self) -> Tensor:
        return self.total / self.count


def masked(values: Tensor, mask: Tensor) -> Mean:
    """The mean of the values where the mask is True. An index by a mask would make the host wait for a GPU."""
    return Mean(wide(torch.where(mask, values.detach(), 0)).sum(), mask.sum())


def wide(values: Tensor) -> Tensor:
    """In float64, which sums of many values need; Apple's GPUs have float32 at most."""
    return values.to(widest(values.device))


class Metrics:
    """Exact means over every element on every rank; `flush` is one exchange of ranks and one host read."""

    def __init__(self):
        self.sums: dict[str, Tensor | float] = defaultdict(float)
        self.counts: dict[str, Tensor | int] = defaultdict(int)

    def add(self, values: dict[str, Tensor | Mean | float]) -> None:
        """A tensor weighs as much as it has elements: pass per-token or per-sequence values, not means.

        A `Mean` weighs as much as its count, a plain number one, on each rank.
        """
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = Mean(wide(value.detach()).sum(), value.numel())
            elif not isinstance(value, Mean):
                value = Mean(float(value), 1)
            self.sums[name] = self.sums[name] + value.total
            self.counts[name] = self.counts[name] + value.count

    def flush(self) -> dict[str, float]:
        """Every mean since the last flush, by name; a name without any element on any rank has none."""
        names = sorted(self.sums)
        if dist.is_initialized():  # a rank without held-out rows, say, has added nothing
            known: list[list[str]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(known, names)
            names = sorted({name for of_rank in known for name in of_rank})
        if not names:
            return {}
        cells = [column.pop(name, 0) for column in (self.sums, self.counts) for name in names]
        rows = zip(names, *read_once(cells).view(2, -1).tolist(), strict=True)
        return {name: total / count for name, total, count in rows if count}


def read_once(cells: list[Tensor | float]) -> Tensor:
    """The numbers, summed over ranks, as float64 of the host; those of the device are read together."""
    known = torch.tensor([0.0 if isinstance(x, Tensor) else float(x) for x in cells], dtype=torch.float64)
    places = defaultdict(list)  # by device: that of the run, and the host's own tensors
    for place, x in enumerate(cells):
        if isinstance(x, Tensor):
            places[x.device].append(place)
    for some in places.values():
        known[some] = torch.stack([wide(cells[place]) for place in some]).cpu().double()
    if dist.is_initialized():
        dist.all_reduce(known)
    return known


def append_row(path: Path, row: dict) -> None:
    """Add one JSON line. Readers never see half a line: it is one write."""
    with named_in_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def each_row(path: Path) -> Iterator[dict]:
    """The rows of a file that a run wrote, one at a time, so that no reader grows with the length of the run.

    A last line cut by a kill is left out. No file, no rows. Raises ValueError where a row is damaged.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:  # no other line end than \n: texts may hold U+2028
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n") and line != b"\n":
                yield _row(line, f"{path}:{number}")


def _row(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged ({error}); delete that line, or move the file away") from None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError(f"{where} is damaged (no object with a `step`); delete that line, or move the file away")
    return row


def read_rows(path: Path) -> list[dict]:
    """All of them."""
    return list(each_row(path))


def drop_rows_after(path: Path, step: int) -> None:
    """Forget what an interrupted run logged after its checkpoint: rows whose `step` is larger."""
    if not path.exists():
        return
    aside = path.with_suffix(".tmp")
    with named_in_errors(path), open(aside, "w", encoding="utf-8") as file:
        for row in each_row(path):
            if row["step"] <= step:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    sync(aside)
    os.replace(aside, path)
