"""Muon: momentum whose matrices are made orthogonal, for the matrices of layers; AdamW for everything else.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), with the scale of Liu et al. 2025 (arXiv:2502.16982,
Eq. 4), under which it takes AdamW's learning rates and decay.
"""

import math

import torch
from torch import Tensor, nn

from runtime.distributed import own_rows, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.AdamW):
    """Of a group with `parts`, for each weight the rows of the matrices that lie one below the other in it:

    B <- momentum B + G;   O = orthogonal(G + momentum B);   W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) O

    Groups without `parts` take AdamW's step.
    """

    @torch.no_grad()
    def step(self) -> None:
        groups = self.param_groups
        for group in groups:
            for p, parts in zip(group["params"], group["parts"] or (), strict=False):
                if p.grad is not None:
                    self.move(p, parts, group)
        self.param_groups = [group for group in groups if not group["parts"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def init_state(self, p: Tensor) -> None:
        self.state[p]["step"] = torch.zeros(())  # AdamW looks for one when it takes a checkpoint's state
        self.state[p]["momentum"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def move(self, p: Tensor, parts: tuple[int, ...], group: dict) -> None:
        if not self.state[p]:
            self.init_state(p)
        momentum = self.state[p]["momentum"].mul_(group["momentum"]).add_(p.grad)
        ahead = whole(p.grad.add(momentum, alpha=group["momentum"]))  # on every rank: its own rows need all of them
        update = torch.cat([orthogonal(part) * 0.2 * math.sqrt(max(part.shape)) for part in ahead.split(parts)])
        mine, first = own_rows(p)
        mine.mul_(1 - group["lr"] * group["weight_decay"])
        mine.sub_(update[first : first + len(mine)].to(mine), alpha=group["lr"])


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of a matrix U S V^T by Newton and Schulz: p(p(...p(s))) takes the place of each singular value s,
    p(s) = a s + b s^3 + c s^5, between 0.7 and 1.2 after five steps. bf16 on a GPU, as published; else float32."""
    a, b, c = COEFFICIENTS
    x = matrix.to(torch.bfloat16 if matrix.device.type == "cuda" else torch.promote_types(matrix.dtype, torch.float32))
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def matrices_of_layers(model: nn.Module) -> dict[nn.Parameter, tuple[int, ...]]:
    """Each matrix of the layers that learns, and the rows of the ones that lie one below the other in it.

    Raises:
        ValueError: experts in one tensor of three dimensions, whose gates and ups take turns.
    """
    found = {}
    for name, module in model.transformer.layers.named_modules():
        for leaf, parts in getattr(module, "parts", {}).items():
            weight = getattr(module, leaf)
            if weight.requires_grad:
                found[weight] = parts
                if weight.ndim != 2:
                    shape = tuple(weight.shape)
                    raise ValueError(f"optim=muon takes matrices, but {name}.{leaf} is {shape}; say optim=adamw")
    return found
