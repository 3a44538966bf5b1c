"""Triton kernels for the gate of an MLP, act(gate) * up: one launch forward, one backward.

The definition is `gated` in `model/functions.py`. `tests/kernels/test_layer_kernels.py` compares the two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from kernels.backend import operator

BLOCK, WARPS = 1024, 4
GELU_SCALE, GELU_CUBE = 0.7978845608028654, 0.044715  # sqrt(2 / pi); Hendrycks & Gimpel 2016 (arXiv:1606.08415)


@operator("gated_forward(Tensor gate_up, bool gelu) -> Tensor")
def gated_forward(gate_up: Tensor, gelu: bool) -> Tensor:
    """(N, F) of a contiguous (N, 2F) `[gate | up]`: silu(gate) * up, or tanh-gelu(gate) * up."""
    out = _output(gate_up)
    N, F = out.shape
    if out.numel():
        _forward_kernel[(N, triton.cdiv(F, BLOCK))](gate_up, out, F, gelu, BLOCK, num_warps=WARPS)
    return out


def _output(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@gated_forward.shapes
def _(gate_up, gelu):
    return _output(gate_up)


@operator("gated_backward(Tensor gate_up, Tensor grad, bool gelu) -> Tensor")
def gated_backward(gate_up: Tensor, grad: Tensor, gelu: bool) -> Tensor:
    """(N, 2F) gradient of gate_up, from a contiguous (N, F) gradient of `gated_forward`."""
    out = torch.empty_like(gate_up)
    N, F = grad.shape
    if grad.numel():
        _backward_kernel[(N, triton.cdiv(F, BLOCK))](gate_up, grad, out, F, gelu, BLOCK, num_warps=WARPS)
    return out


@gated_backward.shapes
def _(gate_up, grad, gelu):
    return torch.empty_like(gate_up)


@triton.jit
def _forward_kernel(gate_up, out, F, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < F
    gate = tl.load(gate_up + row * 2 * F + column, real, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + column, real, other=0.0).to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        activated = 0.5 * gate * (1.0 + libdevice.tanh(inner))
    else:
        activated = gate / (1.0 + tl.exp(-gate))
    tl.store(out + row * F + column, (activated * up).to(out.dtype.element_ty), real)


@triton.jit
def _backward_kernel(gate_up, grad, out, F, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < F
    gate = tl.load(gate_up + row * 2 * F + column, real, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + column, real, other=0.0).to(tl.float32)
    g = tl.load(grad + row * F + column, real, other=0.0).to(tl.float32)
    if GELU:
        square = gate * gate
        tanh = libdevice.tanh(0.7978845608028654 * (gate + 0.044715 * square * gate))
        activated = 0.5 * gate * (1.0 + tanh)
        inner = 0.7978845608028654 * (1.0 + 3 * 0.044715 * square)
        slope = 0.5 * (1.0 + tanh) + 0.5 * gate * (1.0 - tanh * tanh) * inner
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        activated = gate * sigmoid
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(out + row * 2 * F + column, (g * up * slope).to(out.dtype.element_ty), real)
    tl.store(out + row * 2 * F + F + column, (g * activated).to(out.dtype.element_ty), real)
