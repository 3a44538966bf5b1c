"""Pieces of a layer whose backward pass is written by hand: autograd's own would keep more and go through memory more
often. Each is held to its definition, and to finite differences in float64, by tests/test_functions.py."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class CastLinear(torch.autograd.Function):
    """F.linear of x (N, in) with a master weight (out, in) cast to x's dtype.

    The backward pass casts it again: autograd would keep every layer's copy alive until then, a whole bf16 model, which
    FSDP2 could not free.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x = grad @ weight.to(grad.dtype) if need_x else None
        grad_weight = (grad.t() @ x).to(weight.dtype) if need_weight else None
        return grad_x, grad_weight, grad.float().sum(0).to(ctx.bias_dtype) if need_bias else None


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32 at least, returned in `dtype`."""
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps, dtype)
    return _normalise(x, weight, eps, dtype)[0]


def swiglu(gate_up: Tensor) -> Tensor:
    """(N, F) silu(gate) * up of (N, 2F) `[gate | up]`."""
    return _SwiGLU.apply(gate_up) if torch.is_grad_enabled() else _gated(gate_up)


def geglu(gate_up: Tensor) -> Tensor:
    """(N, F) gelu(gate) * up of (N, 2F) `[gate | up]`, gelu in its tanh form."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (N, heads, Dh): the pair (i, i + Dh/2) turns by its angle. Su et al. 2021, Eq. 34.

    cos and sin: (N, 1, Dh), the angles of the pairs twice, sin negative the first time: (a, b) becomes
    (a cos - b sin, b cos + a sin). A factor on both (YaRN) stays a factor.
    """
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _turn(x, cos, sin, 1)


class _RMSNorm(torch.autograd.Function):
    """With h = x / rms and g = grad * weight:   dx = (g - h mean(g h)) / rms,   dweight = sum over rows of grad * h.

    Keeps x, which the residual stream keeps anyway, and one number a row.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        out, scale = _normalise(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        size, scale = x.shape[-1], scale.view(-1, 1)  # (n, 1)
        flat, grad = (t.reshape(-1, size).to(scale.dtype) for t in (x, grad))  # (n, size)
        product, wide = grad * flat, weight.to(scale.dtype)
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_weight = (scale.T @ product)[0].to(weight.dtype) if need_weight else None
        if not need_x:
            return None, grad_weight, None, None
        along = (product @ wide)[:, None] / size * scale.pow(3)  # (n, 1)
        grad_x = torch.mul(flat, along.neg_(), out=product).addcmul_(grad * wide, scale)
        return grad_x.view(x.shape).to(x.dtype), grad_weight, None, None


def _normalise(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The normalised x, and (..., 1) what it was multiplied by."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = scale.mul_(scale).mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight).to(dtype), scale


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _gated(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _Rotate(torch.autograd.Function):
    """The gradient turns back by the same angles."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _turn(grad, *ctx.saved_tensors, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin, value=sign)
