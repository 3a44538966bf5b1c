"""Functions of a layer with a hand-written backward pass, which keeps less and reads memory less often than autograd.

tests/model/test_functions.py compares each with its definition, and with finite differences in float64. On a GPU the
functions between matmuls are Triton kernels (`model/fused.py`), one launch forward and one backward.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.backend import HAS_TRITON, check_agreement, fused

if HAS_TRITON:
    from model.fused import FusedGate, FusedNorm, fused_heads, norm_fits  # noqa: F401


class CastLinear(torch.autograd.Function):
    """F.linear of x (N, in) with a master weight (out, in), given a copy of the weight in x's dtype.

    The copy is an argument, because autograd would keep a cast made here alive until the backward pass. Where the
    device supports it, the matmul writes the weight's gradient directly in the master's dtype.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, copy: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, copy)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return F.linear(x, copy, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, copy = ctx.saved_tensors
        need_x, need_weight, _, need_bias = ctx.needs_input_grad
        dtype, bias_dtype = ctx.dtypes
        grad_x = grad @ copy if need_x else None
        grad_weight = product(grad.t(), x, dtype) if need_weight else None
        return grad_x, grad_weight, None, grad.float().sum(0).to(bias_dtype) if need_bias else None


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`. On CUDA a bfloat16 matmul writes float32 directly; elsewhere the result is cast."""
    if a.dtype != dtype and (a.is_cuda or a.is_meta):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, offset: float = 0.0) -> Tensor:
    """x / rms(x) * (weight + offset) over the last dimension, computed in float32 or wider, returned in `dtype`."""
    weight = weight + offset if offset else weight
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps, dtype)
    return _normalise(x, weight, eps, dtype)[0]


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(x + delta, its RMSNorm in `dtype`) of the residual stream x (N, D). delta=None adds nothing."""
    if fused(x) and norm_fits(x):
        check(
            "rms_norm",
            (x, weight),
            lambda x, w: FusedNorm.apply(x, None, w, eps, offset, x.dtype)[1],
            lambda x, w: rms_norm(x, w, eps, x.dtype, offset),
        )
        return FusedNorm.apply(x, delta, weight, eps, offset, dtype)
    x = x if delta is None else x + delta
    return x, rms_norm(x, weight, eps, dtype, offset)


def swiglu(gate_up: Tensor) -> Tensor:
    """(N, F) silu(gate) * up of (N, 2F) `[gate | up]`."""
    if fused(gate_up):
        check("swiglu", (gate_up,), lambda x: FusedGate.apply(x, False), _SwiGLU.apply)
        return FusedGate.apply(gate_up, False)
    return _SwiGLU.apply(gate_up) if torch.is_grad_enabled() else _gated(gate_up)


def geglu(gate_up: Tensor) -> Tensor:
    """(N, F) gelu(gate) * up of (N, 2F) `[gate | up]`, with the tanh approximation of gelu."""
    if fused(gate_up):
        check("geglu", (gate_up,), lambda x: FusedGate.apply(x, True), _geglu)
        return FusedGate.apply(gate_up, True)
    return _geglu(gate_up)


def _geglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def check(name: str, inputs: tuple[Tensor, ...], kernel: Callable, definition: Callable) -> None:
    """The first time in a run, compare the kernel's output and gradients with the definition's, on 64 rows in float32.

    Raises:
        ValueError: they differ, because one of the two was edited.
    """
    if inputs[0].is_meta:  # meta tensors have no values to compare
        return

    def both() -> list[tuple[Tensor, Tensor]]:
        results = []
        with torch.inference_mode(False), torch.enable_grad():
            for function in (kernel, definition):
                first, *rest = inputs
                leaves = [x.detach().float().clone().requires_grad_() for x in (first[:64], *rest)]
                out = function(*leaves)
                weights = torch.arange(out.numel(), device=out.device).view_as(out).cos()  # any distinct weights
                results.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
        return list(zip(*results, strict=True))

    check_agreement(f"model/functions.py ({name})", both)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (N, heads, Dh): the pair (i, i + Dh/2) is rotated by its angle. Su et al. 2021, Eq. 34.

        (a, b) -> (a cos - b sin, b cos + a sin)

    cos and sin: (N, 1, Dh), each half for the Dh/2 pairs, with sin negated in the first half. YaRN scales both.
    """
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _turn(x, cos, sin, 1)


class _RMSNorm(torch.autograd.Function):
    """With h = x / rms and g = grad * weight:   dx = (g - h mean(g h)) / rms,   dweight = sum over rows of grad * h.

    It keeps x, which the residual stream keeps anyway, and one number per row.
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
    """(normalised x times weight in `dtype`, (..., 1) the factor 1 / rms)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = scale.mul_(scale).mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight).to(dtype), scale


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up. It keeps only its input."""

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
    """The rotation. Its backward pass rotates the gradient by the negative angles."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin, value=sign)
