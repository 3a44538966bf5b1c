"""The Triton fold: the equations of `kernels/fold.py`, one launch per tile. Each logit is read once.

Fold: one program per row, with the statistics in registers. Unfold: one program per block of a row. All arithmetic is
in float32, whatever the dtype of the tile.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from kernels.fold import Settings, Stats, Summary

# columns at once -> warps; 8 to 32 columns per thread (4 to 16 on AMD), so that nothing spills
BLOCKS = {256: 2, 1024: 4, 4096: 8}


def choose_block(width: int) -> int:
    """The smallest block size that holds a row of this width, or else the largest block size."""
    return next((block for block in BLOCKS if block >= width), max(BLOCKS))


def fold_triton(z: Tensor, z_ref: Tensor | None, targets: Tensor, first: int, stats: Stats, settings: Settings) -> None:
    """Add a tile of logits (M, width), whose first column is token `first`, to the statistics."""
    M, width = z.shape
    block = choose_block(width)
    if M:
        _fold_kernel[(M,)](
            z, z if z_ref is None else z_ref, targets, first, *stats, width, 1 / settings.temperature,
            float(settings.softcap or 1), settings.softcap is not None, settings.entropy, z_ref is not None, block,
            num_warps=BLOCKS[block],
        )  # fmt: skip


def unfold_triton(
    z: Tensor,
    z_ref: Tensor | None,
    targets: Tensor,
    first: int,
    summary: Summary,
    grads: Sequence[Tensor | None],
    settings: Settings,
) -> None:
    """Turn a tile of logits into the gradient of the logits, in place."""
    M, width = z.shape
    block = choose_block(width)
    per_token = [summary.maximum if s is None else s.contiguous() for s in (*summary, *grads)]  # None is not read
    if M:
        _unfold_kernel[(M, triton.cdiv(width, block))](
            z, z if z_ref is None else z_ref, targets, first, *per_token, width, 1 / settings.temperature,
            float(settings.softcap or 1),
            settings.softcap is not None, *(g is not None for g in grads), block, num_warps=BLOCKS[block],
        )  # fmt: skip


@triton.jit
def _load(logits, real, inv_temperature, softcap, CAPPED: tl.constexpr):
    x = tl.load(logits, real, other=0.0).to(tl.float32)
    if CAPPED:
        x = softcap * libdevice.tanh(x / softcap)
    return tl.where(real, x * inv_temperature, -1e18)  # adds exp(-1e18) = 0; 0 would add 1, and 0 * -inf is nan


@triton.jit
def _fold_kernel(
    z, z_ref, targets, first, maximum, total, weighted, target, difference, ref_maximum, ref_total,
    width, inv_temperature, softcap,
    CAPPED: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = row.to(tl.int64) * width  # int64: tokens x tile passes 2**31
    m, s, w = tl.load(maximum + row), tl.load(total + row), tl.load(weighted + row)
    d, m_ref, s_ref = tl.load(difference + row), tl.load(ref_maximum + row), tl.load(ref_total + row)
    for i in range(0, width, BLOCK):
        columns = i + tl.arange(0, BLOCK)
        x = _load(z + start + columns, columns < width, inv_temperature, softcap, CAPPED)
        new = tl.maximum(m, tl.max(x, 0))
        shift = m - new
        scale = tl.exp(shift)
        p = tl.exp(x - new)
        if ENTROPY:
            w = scale * (w + shift * s) + tl.sum(p * (x - new), 0)
        if KL:
            y = _load(z_ref + start + columns, columns < width, inv_temperature, softcap, CAPPED)
            new_ref = tl.maximum(m_ref, tl.max(y, 0))
            ref_shift = m_ref - new_ref
            d = scale * (d + (shift - ref_shift) * s) + tl.sum(p * ((x - new) - (y - new_ref)), 0)
            s_ref = tl.exp(ref_shift) * s_ref + tl.sum(tl.exp(y - new_ref), 0)
            m_ref = new_ref
        s = scale * s + tl.sum(p, 0)
        m = new
    tl.store(maximum + row, m)
    tl.store(total + row, s)
    if ENTROPY:
        tl.store(weighted + row, w)
    if KL:
        tl.store(difference + row, d)
        tl.store(ref_maximum + row, m_ref)
        tl.store(ref_total + row, s_ref)
    column = tl.load(targets + row) - first
    if (column >= 0) & (column < width):
        tl.store(target + row, _load(z + start + column, column < width, inv_temperature, softcap, CAPPED))


@triton.jit
def _unfold_kernel(
    z, z_ref, targets, first, maximum, log_total, entropy, kl, ref_maximum, ref_log_total,
    grad_logprob, grad_entropy, grad_kl,
    width, inv_temperature, softcap,
    CAPPED: tl.constexpr, LOGPROB: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = row.to(tl.int64) * width
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = columns < width
    x = _load(z + start + columns, real, inv_temperature, softcap, CAPPED)
    logp = x - tl.load(maximum + row) - tl.load(log_total + row)
    factor = tl.zeros((BLOCK,), tl.float32)
    if LOGPROB:
        factor -= tl.load(grad_logprob + row)
    if ENTROPY:
        factor -= tl.load(grad_entropy + row) * (logp + tl.load(entropy + row))
    if KL:
        y = _load(z_ref + start + columns, real, inv_temperature, softcap, CAPPED)
        ref_logp = y - tl.load(ref_maximum + row) - tl.load(ref_log_total + row)
        factor += tl.load(grad_kl + row) * (logp - ref_logp - tl.load(kl + row))
    dz = tl.exp(logp) * factor
    if LOGPROB:
        dz += tl.where(columns == tl.load(targets + row) - first, tl.load(grad_logprob + row), 0.0)
    if CAPPED:
        t = x / (inv_temperature * softcap)
        dz *= 1 - t * t  # the derivative of tanh
    tl.store(z + start + columns, (dz * inv_temperature).to(z.dtype.element_ty), real)
