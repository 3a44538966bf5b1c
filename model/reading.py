"""Load models for inference (judges, evaluations, scorers, chats), and run them on rows in batches."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.build import load_policy, load_reward_model
from model.heads import Policy, RewardModel
from model.packing import make_rows
from runtime.devices import choose_precision, own_device


def read_policy(path: str | Path, *, precision: str) -> Policy:
    """A frozen policy on this process's device. precision: auto | fp32 | bf16, where auto depends on the device."""
    device = own_device()
    return load_policy(path, precision=choose_precision(precision, device), frozen=True).to(device)


def read_reward_model(path: str | Path, *, precision: str) -> RewardModel:
    """A frozen reward model on this process's device. precision: auto | fp32 | bf16."""
    device = own_device()
    return load_reward_model(path, precision=choose_precision(precision, device), frozen=True).to(device)


@torch.no_grad()
def in_batches(
    function: Callable[..., Tensor],
    rows: Sequence[dict],
    *,
    pad_id: int,
    batch_size: int,
    device: torch.device,
    together: int = 1,
) -> Tensor:
    """(n, ...) float64 on the CPU: `function(*Rows)` of each row, in the order of the rows.

    Args:
        function: returns (b, ...) for b rows, like `RewardModel.score`.
        rows: {"input_ids", "completion_mask"}. Rows of similar length share a forward.
        batch_size: rows of a forward.
        together: number of consecutive rows that share a prompt and must share a forward.
    """
    groups = range(0, len(rows), together)
    order = sorted(groups, key=lambda start: len(rows[start]["input_ids"]), reverse=True)  # longest first
    order = [start + i for start in order for i in range(together)]
    size, results = max(1, batch_size // together) * together, []
    for start in range(0, len(order), size):
        batch = make_rows([rows[i] for i in order[start : start + size]], pad_id).to(device)
        results.append(function(*batch).cpu().double())
    places = torch.empty(len(order), dtype=torch.int64)
    places[order] = torch.arange(len(order))
    return torch.cat(results)[places]
