"""The metrics of a run: exact means over all elements on all ranks, one JSON object per step."""

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.devices import widest
from runtime.files import named_in_errors, sync


class Mean(NamedTuple):
    """A mean as sum and count, both on the device, so that masking needs no host synchronisation."""

    total: Tensor  # () float64
    count: Tensor  # ()

    def mean(self) -> Tensor:
        return self.total / self.count


def masked(values: Tensor, mask: Tensor) -> Mean:
    """The mean of the values where the mask is True. Indexing by the mask would make the host wait for a GPU."""
    return Mean(wide(torch.where(mask, values.detach(), 0)).sum(), mask.sum())


def wide(values: Tensor) -> Tensor:
    """The values in float64, for sums of many values; in float32 on Apple's GPUs."""
    return values.to(widest(values.device))


class Metrics:
    """Exact means over all elements on all ranks. `flush` needs one all-reduce and one host read."""

    def __init__(self):
        self.sums: dict[str, Tensor | float] = defaultdict(float)
        self.counts: dict[str, Tensor | int] = defaultdict(int)

    def add(self, values: Mapping[str, Tensor | Mean | float]) -> None:
        """Add values. The weight of a tensor is its number of elements, so pass one per token or sequence, not means.

        The weight of a `Mean` is its count. The weight of a plain number is 1 on each rank.
        """
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = Mean(wide(value.detach()).sum(), value.numel())
            elif not isinstance(value, Mean):
                value = Mean(float(value), 1)
            self.sums[name] = self.sums[name] + value.total
            self.counts[name] = self.counts[name] + value.count

    def flush(self) -> dict[str, float]:
        """name -> mean since the last flush. Names without any element on any rank are left out."""
        names = sorted(self.sums)
        if dist.is_initialized():  # a rank may have added nothing, for example without held-out rows
            known: list[list[str]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(known, names)
            names = sorted({name for of_rank in known for name in of_rank})
        if not names:
            return {}
        cells = [column.pop(name, 0) for column in (self.sums, self.counts) for name in names]
        rows = zip(names, *read_once(cells).view(2, -1).tolist(), strict=True)
        return {name: total / count for name, total, count in rows if count}


def read_once(cells: list[Tensor | float]) -> Tensor:
    """The numbers, summed over ranks, as float64 on the host. Those on the device are read together."""
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


def each_log_row(path: Path) -> Iterator[dict]:
    """Yield the rows of a run's metrics.jsonl or samples.jsonl, one at a time, so that memory does not grow.

    An incomplete last line is left out. Without a file there are no rows. Raises ValueError where a row is damaged.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:  # only \n ends a line, because texts may contain U+2028
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


def read_log(path: Path) -> list[dict]:
    """All rows of a run's metrics.jsonl or samples.jsonl, see `each_log_row`."""
    return list(each_log_row(path))


def drop_rows_after(path: Path, step: int) -> None:
    """Delete the rows whose step is larger: an interrupted run logged them after its checkpoint."""
    if not path.exists():
        return
    tmp_path = path.with_suffix(".tmp")
    with named_in_errors(path), open(tmp_path, "w", encoding="utf-8") as file:
        for row in each_log_row(path):
            if row["step"] <= step:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    sync(tmp_path)
    os.replace(tmp_path, path)
