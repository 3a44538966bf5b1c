"""Apply functions to a rollout in parts of a few rows."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from rollouts.trajectory import Part

Output = TypeVar("Output")


def of_actions(function: Callable[..., Output], parts: list[Part], **settings) -> Output:
    """function(*rows, **settings) of all parts, joined: one tensor, or a tuple if it returns several."""
    return joined([function(*part.rows, **settings) for part in parts])


def of_states(function: Callable[..., Output], parts: list[Part], **settings) -> Output:
    """The same on the states that have a value."""
    return joined([function(*part.states, **settings) for part in parts])


def joined(outputs: list) -> Any:
    """One tensor of all parts, or a tuple of tensors."""
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs)
    return tuple(torch.cat(column) for column in zip(*outputs, strict=True))
