"""What a run measures: exact means over every element on every rank, one JSON object a step."""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.files import sync


class Metrics:
    """Exact means over every element on every rank; `flush` is one exchange of ranks and one host read."""

    def __init__(self):
        self.sums: dict[str, Tensor | float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, values: dict[str, Tensor | float]) -> None:
        """A tensor weighs as much as it has elements: pass per-token or per-sequence values, not means.

        A plain number weighs one, on each rank.
        """
        for name, value in values.items():
            value = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
            self.sums[name] = self.sums[name] + value.double().sum()
            self.counts[name] += value.numel()

    def flush(self) -> dict[str, float]:
        """Every mean since the last flush, by name; a name without any element on any rank has none."""
        names = sorted(self.sums)
        if dist.is_initialized():  # a rank without held-out rows, say, has added nothing
            known: list[list[str]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(known, names)
            names = sorted({name for of_rank in known for name in of_rank})
        if not names:
            return {}
        device = next((s.device for s in self.sums.values() if s.device.type != "cpu"), torch.device("cpu"))
        zero = torch.zeros((), dtype=torch.float64, device=device)
        sums = torch.stack([self.sums.pop(name, zero).to(device) for name in names])  # (M,)
        table = torch.stack([sums, sums.new_tensor([self.counts.pop(name, 0) for name in names])])  # (2, M)
        if dist.is_initialized():
            dist.all_reduce(table)
        rows = zip(names, *table.tolist(), strict=True)
        return {name: total / count for name, total, count in rows if count}


def append_row(path: Path, row: dict) -> None:
    """Add one JSON line. Readers never see half a line: it is one write."""
    with open(path, "a", encoding="utf-8") as file:
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
    with open(aside, "w", encoding="utf-8") as file:
        for row in each_row(path):
            if row["step"] <= step:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    sync(aside)
    os.replace(aside, path)
