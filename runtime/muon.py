"""Muon, momentum with orthogonalised updates, for the matrices of the layers. All other weights use AdamW.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), with the scale of Liu et al. 2025 (arXiv:2502.16982,
Eq. 4), so that AdamW's learning rates and weight decay can be used.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from runtime.distributed import own_rows, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.AdamW):
    """In a parameter group with `parts` (per weight, the numbers of rows of the matrices stacked in it):

    B <- momentum B + G;   O = orthogonal(G + momentum B);   W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) O

    Parameter groups without `parts` use AdamW.
    """

    param_groups: list[dict]

    @torch.no_grad()
    def step(self) -> None:
        groups = self.param_groups
        matrices = [
            (p, parts, group)
            for group in groups
            for p, parts in zip(group["params"], group["parts"] or (), strict=False)
            if p.grad is not None
        ]
        if matrices:
            ranks, rank, among = sharers(matrices[0][0])
            for start in range(0, len(matrices), 2 * ranks):  # so that a rank has only few whole matrices at a time
                self.move(matrices[start : start + 2 * ranks], ranks, rank, among)
        self.param_groups = [group for group in groups if not group["parts"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def init_state(self, p: Tensor) -> None:
        self.state[p]["step"] = torch.zeros(())  # AdamW needs it when it loads a checkpoint's state
        self.state[p]["momentum"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def move(self, matrices: list[tuple[Tensor, tuple[int, ...], dict]], ranks: int, rank: int, among) -> None:
        """The step of these weights. Each matrix is gathered whole, made orthogonal by one rank, and sent to all."""
        makers = share_out([[(rows, p.shape[1]) for rows in parts] for p, parts, _ in matrices], ranks)
        made = []
        for (p, parts, group), own in zip(matrices, makers, strict=True):
            pieces = whole(self.ahead(p, group)).split(parts)
            made.append([piece.clone() if maker == rank else None for piece, maker in zip(pieces, own, strict=True)])
        made = [[None if piece is None else scaled(piece) for piece in pieces] for pieces in made]  # all ranks at once
        for (p, parts, group), pieces, own in zip(matrices, made, makers, strict=True):
            for number, (rows, maker) in enumerate(zip(parts, own, strict=True)):
                if pieces[number] is None:
                    pieces[number] = torch.empty(rows, p.shape[1], dtype=products_in(p), device=p.device)
                if ranks > 1:
                    dist.broadcast(pieces[number], group=among, group_src=maker)
            own, first = own_rows(p)
            own.mul_(1 - group["lr"] * group["weight_decay"])
            own.sub_(torch.cat(pieces)[first : first + len(own)].to(own), alpha=group["lr"])

    def ahead(self, p: Tensor, group: dict) -> Tensor:
        """G + momentum B, after B <- momentum B + G."""
        if not self.state[p]:
            self.init_state(p)
        momentum = self.state[p]["momentum"].mul_(group["momentum"]).add_(p.grad)
        return p.grad.add(momentum, alpha=group["momentum"])


def sharers(p: Tensor) -> tuple[int, int, dist.ProcessGroup | None]:
    """(number of ranks that share the rows of p, the index of this rank among them, their group)."""
    if not isinstance(p, DTensor):
        return 1, 0, None
    mesh, last = p.device_mesh, p.device_mesh.ndim - 1
    return mesh.size(last), mesh.get_local_rank(last), mesh.get_group(last)


def share_out(shapes: list[list[tuple[int, int]]], ranks: int) -> list[list[int]]:
    """The rank that makes each matrix orthogonal. Each is given to the rank with the fewest operations so far."""
    work = [0] * ranks
    makers: list[list[int]] = []
    for weight in shapes:
        makers.append([])
        for rows, columns in weight:
            maker = work.index(min(work))
            work[maker] += rows * columns * min(rows, columns)
            makers[-1].append(maker)
    return makers


def scaled(matrix: Tensor) -> Tensor:
    """0.2 sqrt(max(rows, columns)) times the orthogonal matrix."""
    return orthogonal(matrix) * 0.2 * math.sqrt(max(matrix.shape))


def products_in(matrix: Tensor) -> torch.dtype:
    """The dtype of `orthogonal`: bf16 on a GPU, as published; else float32 or wider."""
    return torch.bfloat16 if matrix.device.type == "cuda" else torch.promote_types(matrix.dtype, torch.float32)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Approximately U V^T of a matrix U S V^T, by Newton-Schulz iteration.

    Each step replaces each singular value s by p(s) = a s + b s^3 + c s^5. After five steps s is between 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(products_in(matrix))
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def matrices_of_layers(model: nn.Module) -> dict[nn.Parameter, tuple[int, ...]]:
    """Each trainable matrix of the layers -> the numbers of rows of the matrices that are stacked in it.

    Raises:
        ValueError: a tensor with three dimensions has the experts, whose gates and ups alternate.
    """
    found = {}
    for name, module in model.transformer.layers.named_modules():
        for leaf, parts in getattr(module, "parts", {}).items():
            weight = getattr(module, leaf)
            if weight.requires_grad:
                found[weight] = parts
                if weight.ndim != 2:
                    shape = tuple(weight.shape)
                    raise ValueError(f"optim=muon needs matrices, but {name}.{leaf} is {shape}; set optim=adamw")
    return found
