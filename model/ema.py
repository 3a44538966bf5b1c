"""An exponential moving average of a model's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """average = decay * average + (1 - decay) * weights, after every optimizer step. InstructGPT (2203.02155): 0.992.

    With decay=None there is no copy, and the exported weights are the trained ones.
    """

    def __init__(self, model: nn.Module, decay: float | None):
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"ema_decay={decay} must lie between 0 and 1, or be null")
        self.decay = decay
        self.average = (
            {}
            if decay is None
            else {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        )

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        if self.decay is None:
            return
        for name, parameter in model.named_parameters():
            if name in self.average:
                self.average[name].lerp_(parameter.detach(), 1 - self.decay)

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the model has the averaged weights."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name in self.average:
                own = parameter.detach().clone()
                parameter.copy_(self.average[name])
                self.average[name].copy_(own)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.average.items():
            tensor.copy_(state[name])
