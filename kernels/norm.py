"""Triton kernels for RMSNorm of the residual stream, fused with the addition before it and the cast after it.

There is one launch forward and one backward. The definition is `add_rms_norm` in `model/functions.py`, and
`tests/kernels/test_layer_kernels.py` compares the two. Each function here is a `torch.library` operator, so that
meta tensors, checkpointing and FSDP2 treat it as one operation with known shapes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import operator, programs

MAX_WIDTH = 8192  # a row is kept in registers; a wider one would spill


def warps(width: int) -> int:
    """Warps of a program that holds one row: 16 numbers per thread."""
    return max(1, triton.next_power_of_2(width) // 512)


@operator(
    "add_rms_norm_forward(Tensor x, Tensor? delta, Tensor weight, float eps, float offset, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)"
)
def add_rms_norm_forward(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float, dtype: torch.dtype
):
    """(x + delta, its RMSNorm times (weight + offset) in `dtype`, (N,) float32 1 / rms).

    x: (N, D) contiguous, D <= MAX_WIDTH. delta: (N, D) contiguous, or None: then the first result is empty.
    """
    N, D = x.shape
    total, normed, scale = _outputs(x, delta, dtype)
    if N:
        block = triton.next_power_of_2(D)
        _forward_kernel[(N,)](
            x, x if delta is None else delta, weight, total, normed, scale, D, 1.0 / D, eps, offset,
            delta is not None, block, num_warps=warps(D),
        )  # fmt: skip
    return total, normed, scale


def _outputs(x: Tensor, delta: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.empty_like(x) if delta is not None else x.new_empty(0)
    return total, torch.empty_like(x, dtype=dtype), torch.empty(len(x), dtype=torch.float32, device=x.device)


@add_rms_norm_forward.shapes
def _(x, delta, weight, eps, offset, dtype):
    return _outputs(x, delta, dtype)


@operator(
    "add_rms_norm_backward(Tensor x, Tensor weight, Tensor scale, Tensor grad_normed, Tensor? grad_x, float offset,"
    " ScalarType? delta_dtype) -> (Tensor, Tensor, Tensor)"
)
def add_rms_norm_backward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    grad_normed: Tensor,
    grad_x: Tensor | None,
    offset: float,
    delta_dtype: torch.dtype | None,
):
    """(gradient of x, the same cast to `delta_dtype`, (programs, D) partial sums of the gradient of weight).

    x: (N, D), the input of the norm. grad_x: the gradient of x from the residual connection, or None.
    delta_dtype: the dtype of delta where it differs from that of x; None: no cast.
    """
    N, D = x.shape
    grad, grad_delta, parts = _gradients(x, delta_dtype)
    if N:
        rows = triton.cdiv(N, len(parts))
        _backward_kernel[(len(parts),)](
            x, weight, scale, grad_normed, x if grad_x is None else grad_x, grad, grad_delta, parts, N, D, rows,
            1.0 / D, offset, grad_x is not None, delta_dtype is not None, triton.next_power_of_2(D), num_warps=warps(D),
        )  # fmt: skip
    else:
        parts.zero_()
    return grad, grad_delta, parts


def _gradients(x: Tensor, delta_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    grad_delta = x.new_empty(0) if delta_dtype is None else torch.empty_like(x, dtype=delta_dtype)
    count = max(1, min(len(x), programs(x.device)))
    return torch.empty_like(x), grad_delta, torch.empty(count, x.shape[1], dtype=torch.float32, device=x.device)


@add_rms_norm_backward.shapes
def _(x, weight, scale, grad_normed, grad_x, offset, delta_dtype):
    return _gradients(x, delta_dtype)


@triton.jit
def _forward_kernel(
    x, delta, weight, total, normed, scale, D, inverse_width, eps, offset, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < D
    at = row * D + column
    value = tl.load(x + at, real, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + at, real, other=0.0).to(tl.float32)
        tl.store(total + at, value.to(total.dtype.element_ty), real)
    gain = tl.load(weight + column, real, other=0.0).to(tl.float32) + offset
    inverse = 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) * inverse_width + eps)
    tl.store(normed + at, (value * inverse * gain).to(normed.dtype.element_ty), real)
    tl.store(scale + row, inverse)


@triton.jit
def _backward_kernel(
    x, weight, scale, grad_normed, grad_x, grad, grad_delta, parts, N, D, rows, inverse_width, offset,
    ADD: tl.constexpr, CAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < D
    gain = tl.load(weight + column, real, other=0.0).to(tl.float32) + offset
    grad_gain = tl.zeros((BLOCK,), tl.float32)
    first = program * rows
    for i in range(tl.minimum(rows, N - first)):
        row = first + i
        at = row * D + column
        inverse = tl.load(scale + row)
        direction = tl.load(x + at, real, other=0.0).to(tl.float32) * inverse
        g = tl.load(grad_normed + at, real, other=0.0).to(tl.float32)
        grad_gain += g * direction
        g *= gain
        out = (g - direction * (tl.sum(g * direction, 0) * inverse_width)) * inverse
        if ADD:
            out += tl.load(grad_x + at, real, other=0.0).to(tl.float32)
        tl.store(grad + at, out.to(grad.dtype.element_ty), real)
        if CAST:
            tl.store(grad_delta + at, out.to(grad_delta.dtype.element_ty), real)
    tl.store(parts + program * D + column, grad_gain, real)
