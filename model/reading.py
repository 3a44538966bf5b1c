"""Models that are only read (judges, evaluations, scorers, speakers): one way to load them and to feed them rows."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.build import load_policy, load_reward_model
from model.heads import Policy, RewardModel
from model.packing import make_rows
from runtime.devices import choose_precision, own_device


def read_policy(path: str | Path, *, precision: str) -> Policy:
    """A frozen policy on this process's device. precision: auto | fp32 | bf16."""
    device = own_device()
    return load_policy(path, precision=choose_precision(precision, device), frozen=True).to(device)


def read_reward_model(path: str | Path, *, precision: str) -> RewardModel:
    """A frozen reward model, likewise."""
    device = own_device()
    return load_reward_model(path, precision=choose_precision(precision, device), frozen=True).to(device)


@torch.no_grad()
def in_batches(
    function: Callable[..., Tensor], rows: Sequence[dict], *, pad_id: int, batch_size: int, device: torch.device,
    together: int = 1,
) -> Tensor:  # fmt: skip
    """(n, ...) float64 on the CPU: what `function(*Rows)` says of each row, in the rows' order.

    Args:
        function: (b, ...) of b rows, like `RewardModel.score`.
        rows: {"input_ids", "completion_mask"}; like lengths share a forward.
        batch_size: rows of a forward. together: rows that stand next to each other and share a prompt stay together.
    """
    groups = range(0, len(rows), together)
    order = sorted(groups, key=lambda start: len(rows[start]["input_ids"]), reverse=True)  # the largest comes first
    order = [start + i for start in order for i in range(together)]
    size, told = max(1, batch_size // together) * together, []
    for start in range(0, len(order), size):
        batch = make_rows([rows[i] for i in order[start : start + size]], pad_id).to(device)
        told.append(function(*batch).cpu().double())
    places = torch.empty(len(order), dtype=torch.int64)
    places[order] = torch.arange(len(order))
    return torch.cat(told)[places]
