"""The Triton kernels of a layer as autograd functions, for a GPU.

Their definitions are in model/functions.py, which calls these functions where the kernels run.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.gated import gated_backward, gated_forward
from kernels.norm import MAX_WIDTH, add_rms_norm_backward, add_rms_norm_forward
from kernels.rotary import rotary_backward, rotary_forward


def norm_fits(x: Tensor) -> bool:
    """Whether the kernel supports the row width of x (N, D)."""
    return x.ndim == 2 and x.shape[1] <= MAX_WIDTH


class FusedNorm(torch.autograd.Function):
    """(x + delta, its norm). The backward pass adds both gradients, so autograd does not have to."""

    @staticmethod
    def forward(ctx, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float, dtype: torch.dtype):
        x, delta = x.contiguous(), None if delta is None else delta.contiguous()
        total, normed, scale = add_rms_norm_forward(x, delta, weight, eps, offset, dtype)
        total = x if delta is None else total
        ctx.save_for_backward(total, weight, scale)
        ctx.offset, ctx.delta_dtype = offset, None if delta is None else delta.dtype
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: Tensor | None, grad_normed: Tensor | None):
        total, weight, scale = ctx.saved_tensors
        if grad_normed is None:  # the norm was not used
            return grad_total, None if ctx.delta_dtype is None else grad_total.to(ctx.delta_dtype), *[None] * 4
        other = ctx.delta_dtype if ctx.delta_dtype != total.dtype else None
        grad_total = None if grad_total is None else grad_total.contiguous()
        grad, grad_delta, parts = add_rms_norm_backward(
            total, weight, scale, grad_normed.contiguous(), grad_total, ctx.offset, other
        )
        grad_delta = None if ctx.delta_dtype is None else grad if other is None else grad_delta
        return grad, grad_delta, parts.sum(0).to(weight.dtype), None, None, None


class FusedGate(torch.autograd.Function):
    """act(gate) * up. It keeps only its input."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, gelu: bool) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        ctx.gelu = gelu
        return gated_forward(gate_up, gelu)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return gated_backward(ctx.saved_tensors[0], grad.contiguous(), ctx.gelu), None


class FusedHeads(torch.autograd.Function):
    """q (N, H, Dh), k and v (N, K, Dh) from one matmul's output. q and k are normed, if there are weights, and rotated.

    v is a view of the input. The input is kept only where there are norms.
    """

    @staticmethod
    def forward(
        ctx,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        offset: float,
        heads: int,
        kv_heads: int,
    ):
        qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
        turned = rotary_forward(qkv, cos, sin, q_weight, k_weight, eps, offset, heads, kv_heads)
        ctx.save_for_backward(cos, sin, q_weight, k_weight, None if q_weight is None else qkv)
        ctx.eps, ctx.offset = eps, offset
        v = qkv.view(len(qkv), heads + 2 * kv_heads, -1)[:, heads + kv_heads :]
        return *turned.split((heads, kv_heads), dim=1), v

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        cos, sin, q_weight, k_weight, qkv = ctx.saved_tensors
        rows = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads]
        given = rows[0] if qkv is None else qkv
        grad, parts = rotary_backward(given, cos, sin, q_weight, k_weight, ctx.eps, ctx.offset, *rows)
        norms = (None, None)
        if q_weight is not None:
            norms = tuple(part.to(w.dtype) for part, w in zip(parts.sum(0), (q_weight, k_weight), strict=True))
        return grad, None, None, *norms, *[None] * 4


fused_heads = FusedHeads.apply
