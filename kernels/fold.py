"""The two operations on a tile of logits: add it to running statistics (fold), or turn it into the gradient (unfold).

z = softcap tanh(logits / softcap) / temperature      m = max z,  Z = sum exp(z - m),  p = exp(z - m) / Z
log pi = (z[target] - m) - log Z
H      = log Z - sum p (z - m)
KL     = sum p ((z - m) - (z_ref - m_ref)) - (log Z - log Z_ref)

d log pi / dz = 1[target] - p      dH / dz = -p (log p + H)      dKL / dz = p (log p - log p_ref - KL)

Logits are used only as distances z - m. Computing m + log Z first would lose precision: near logits of 1,000 every p
would be wrong by one part in 20,000.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 64  # rows folded at once on a CPU, so that this part of the tile stays in cache between operations


class Settings(NamedTuple):
    """How z is computed from the logits, and whether the entropy is computed."""

    temperature: float
    softcap: float | None
    entropy: bool


class Stats(NamedTuple):
    """Running statistics of the tiles seen so far, each (M,)."""

    maximum: Tensor  # m
    total: Tensor  # sum exp(z - m)
    weighted: Tensor  # sum exp(z - m) (z - m), for the entropy
    target: Tensor  # z at the target
    difference: Tensor  # sum exp(z - m) ((z - m) - (z_ref - m_ref)), for the KL
    ref_maximum: Tensor
    ref_total: Tensor

    @staticmethod
    def start(M: int, dtype: torch.dtype, device: torch.device) -> "Stats":
        stats = Stats(*torch.zeros(7, M, dtype=dtype, device=device))
        lowest = torch.finfo(torch.float32).min  # not 0: all logits may be negative; not -inf: -inf * 0 is nan
        stats.maximum.fill_(lowest)
        stats.ref_maximum.fill_(lowest)
        return stats


class Summary(NamedTuple):
    """The statistics that the backward pass needs, (M,) each. The last four are None where they were not requested."""

    maximum: Tensor
    log_total: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    ref_maximum: Tensor | None
    ref_log_total: Tensor | None

    @staticmethod
    def of(stats: Stats, entropy: bool, kl: bool) -> "Summary":
        log_total, ref_log_total = stats.total.log(), stats.ref_total.log()
        summary = Summary(stats.maximum, log_total, None, None, None, None)
        if entropy:
            summary = summary._replace(entropy=log_total - stats.weighted / stats.total)
        if kl:
            value = stats.difference / stats.total - (log_total - ref_log_total)
            summary = summary._replace(kl=value, ref_maximum=stats.ref_maximum, ref_log_total=ref_log_total)
        return summary


def fold_torch(z: Tensor, z_ref: Tensor | None, targets: Tensor, first: int, stats: Stats, settings: Settings) -> None:
    """Add a tile of logits (M, width), whose first column is token `first`, to the statistics. Overwrites z."""
    targets = targets - first
    for r in range(0, len(z), ROWS):
        rows = slice(r, r + ROWS)
        x_ref = None if z_ref is None else _scaled(z_ref[rows], settings)
        _fold_rows(_scaled(z[rows], settings), x_ref, targets[rows], Stats(*(s[rows] for s in stats)), settings.entropy)


def _fold_rows(x: Tensor, x_ref: Tensor | None, targets: Tensor, stats: Stats, entropy: bool) -> None:
    inside = (targets >= 0) & (targets < x.shape[1])
    picked = x.gather(1, targets.clamp(0, x.shape[1] - 1)[:, None]).squeeze(1)
    stats.target.copy_(torch.where(inside, picked, stats.target))

    maximum = torch.maximum(stats.maximum, x.amax(1))
    shift = stats.maximum - maximum
    p = x.sub_(maximum[:, None]).exp()  # relative to the maximum
    if entropy:
        stats.weighted.add_(shift * stats.total).mul_(shift.exp()).add_(torch.linalg.vecdot(p, x))
    if x_ref is not None:
        ref_maximum = torch.maximum(stats.ref_maximum, x_ref.amax(1))
        ref_shift = stats.ref_maximum - ref_maximum
        x.sub_(x_ref.sub_(ref_maximum[:, None]))
        stats.difference.add_((shift - ref_shift) * stats.total).mul_(shift.exp()).add_(torch.linalg.vecdot(p, x))
        stats.ref_total.mul_(ref_shift.exp()).add_(x_ref.exp_().sum(1))
        stats.ref_maximum.copy_(ref_maximum)
    stats.total.mul_(shift.exp()).add_(p.sum(1))
    stats.maximum.copy_(maximum)


def unfold_torch(
    z: Tensor,
    z_ref: Tensor | None,
    targets: Tensor,
    first: int,
    summary: Summary,
    grads: Sequence[Tensor | None],
    settings: Settings,
) -> None:
    """Turn a tile of logits into the gradient of the logits, in place. grads: those of log-prob, entropy and KL."""
    targets = targets - first
    for r in range(0, len(z), ROWS):
        rows = slice(r, r + ROWS)
        x_ref = None if z_ref is None else _scaled(z_ref[rows], settings)
        part = Summary(*(None if s is None else s[rows, None] for s in summary))
        grad = [None if g is None else g[rows, None] for g in grads]
        _unfold_rows(z[rows], x_ref, targets[rows], part, grad, settings)


def _unfold_rows(z: Tensor, x_ref: Tensor | None, targets: Tensor, summary: Summary, grads: Sequence, settings) -> None:
    grad_logprob, grad_entropy, grad_kl = grads
    x = _scaled(z, settings)
    slope = None if settings.softcap is None else 1 - (x * (settings.temperature / settings.softcap)).square_()
    x.sub_(summary.maximum)
    share = summary.log_total.neg().exp()  # 1 / Z, multiplied into the factors of exp(z - m)
    factor = torch.zeros_like(share) if grad_logprob is None else -grad_logprob * share
    if grad_entropy is not None:
        factor = factor - grad_entropy * share * (summary.entropy - summary.log_total)
        factor = torch.addcmul(factor, x, grad_entropy * share, value=-1)
    if grad_kl is not None:
        apart = summary.log_total - summary.ref_log_total + summary.kl
        factor = factor + (x - x_ref.sub_(summary.ref_maximum) - apart).mul_(grad_kl * share)
    dz = x.exp_().mul_(factor)
    if grad_logprob is not None:
        inside = (targets >= 0) & (targets < z.shape[1])
        at = targets.clamp(0, z.shape[1] - 1)[:, None]
        dz.scatter_add_(1, at, torch.where(inside[:, None], grad_logprob, 0.0).to(dz.dtype))
    if slope is not None:
        dz.mul_(slope)
    if settings.temperature != 1:
        dz.mul_(1 / settings.temperature)
    if dz.data_ptr() != z.data_ptr():
        z.copy_(dz)


def _scaled(z: Tensor, settings: Settings) -> Tensor:
    """z of the equations from the logits, in float32 or wider; in place where the logits already are."""
    x = z.to(torch.promote_types(z.dtype, torch.float32))
    if settings.softcap is not None:
        x.mul_(1 / settings.softcap).tanh_().mul_(settings.softcap)
    return x if settings.temperature == 1 else x.mul_(1 / settings.temperature)
