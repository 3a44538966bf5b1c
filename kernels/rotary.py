"""Triton kernels for rotary embedding of queries and keys, fused with their norms where a model has them.

There is one launch forward and one backward. The definition is `heads_of` in `model/functions.py`, and
`tests/kernels/test_layer_kernels.py` compares the two. q, k and v are neighbours in the output of one matmul,
(N, (H + 2K) Dh). The kernels read the part of q and k.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import operator, programs


@operator(
    "rotary_forward(Tensor qkv, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, float eps, float offset,"
    " int heads, int kv_heads) -> Tensor"
)
def rotary_forward(
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
    """(N, H + K, Dh): the heads of q and k, normed where there are weights, then rotated.

    qkv: (N, (H + 2K) Dh) contiguous. cos, sin: (N, 1, R) as in `model/functions.py`. R <= Dh dimensions are rotated.
    """
    out = _rotated(qkv, heads, kv_heads)
    N, total, head_dim = out.shape
    if out.numel():
        rotated = cos.shape[-1]
        _forward_kernel[(N, triton.cdiv(total, heads_at_once(head_dim)))](
            qkv, cos, sin, *_weights(q_weight, k_weight, qkv), out, heads, total, head_dim, rotated, qkv.shape[1],
            eps, offset, q_weight is not None, *_blocks(head_dim, rotated), num_warps=warps(head_dim),
        )  # fmt: skip
    return out


def warps(head_dim: int) -> int:
    """Warps of a program: the smallest number without register spills."""
    return 2 if head_dim <= 64 else 4


def heads_at_once(head_dim: int) -> int:
    """Heads of one token that a program rotates together: 512 numbers, or one head."""
    return max(1, 512 // triton.next_power_of_2(head_dim))


def _rotated(qkv: Tensor, heads: int, kv_heads: int) -> Tensor:
    return qkv.new_empty(len(qkv), heads + kv_heads, qkv.shape[1] // (heads + 2 * kv_heads))


def _weights(q_weight: Tensor | None, k_weight: Tensor | None, other: Tensor) -> tuple[Tensor, Tensor]:
    return (other, other) if q_weight is None else (q_weight, k_weight)


def _blocks(head_dim: int, rotated: int) -> tuple[int, int, int]:
    """Sizes of the loads: half of the rotated part, the rest of the head (masked where there is none), and heads."""
    rest = triton.next_power_of_2(max(1, head_dim - rotated))
    return triton.next_power_of_2(rotated // 2), rest, heads_at_once(head_dim)


@rotary_forward.shapes
def _(qkv, cos, sin, q_weight, k_weight, eps, offset, heads, kv_heads):
    return _rotated(qkv, heads, kv_heads)


@operator(
    "rotary_backward(Tensor qkv, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, float eps, float offset,"
    " Tensor grad_q, Tensor grad_k, Tensor grad_v) -> (Tensor, Tensor)"
)
def rotary_backward(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
):
    """((N, (H + 2K) Dh) gradient of qkv, (programs, 2, Dh) partial sums of the weights' gradients).

    Without weights the second result is empty and qkv is not read. grad_q: (N, H, Dh). grad_k, grad_v: (N, K, Dh). The
    last dimension is contiguous.
    """
    grad, parts = _gradients(grad_q, grad_k, q_weight)
    N, heads, head_dim = grad_q.shape
    if N:
        rotated, kv_heads = cos.shape[-1], grad_k.shape[1]
        rows = triton.cdiv(N, len(parts)) if q_weight is not None else 1
        _backward_kernel[(len(parts) if q_weight is not None else N,)](
            qkv, cos, sin, *_weights(q_weight, k_weight, qkv), grad_q, grad_k, grad_v, grad, parts,
            *grad_q.stride()[:2], *grad_k.stride()[:2], *grad_v.stride()[:2], N, rows, heads, kv_heads, head_dim,
            rotated, eps, offset, q_weight is not None, *_blocks(head_dim, rotated), num_warps=warps(head_dim),
        )  # fmt: skip
    return grad, parts


def _gradients(grad_q: Tensor, grad_k: Tensor, q_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    N, heads, head_dim = grad_q.shape
    grad = grad_q.new_empty(N, (heads + 2 * grad_k.shape[1]) * head_dim)
    count = 0 if q_weight is None else max(1, min(N, programs(grad.device)))
    return grad, torch.empty(count, 2, head_dim, dtype=torch.float32, device=grad.device)


@rotary_backward.shapes
def _(qkv, cos, sin, q_weight, k_weight, eps, offset, grad_q, grad_k, grad_v):
    return _gradients(grad_q, grad_k, q_weight)


@triton.jit
def _forward_kernel(
    qkv, cos, sin, q_weight, k_weight, out, H, total, head_dim, rotated, width, eps, offset,
    NORM: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]  # (HEADS, 1)
    half, pair, last = rotated // 2, tl.arange(0, HALF)[None, :], tl.arange(0, REST)[None, :]
    real, real_last = (head < total) & (pair < half), (head < total) & (last < head_dim - rotated)
    source, target = qkv + row * width + head * head_dim, out + (row * total + head) * head_dim
    a = tl.load(source + pair, real, other=0.0).to(tl.float32)
    b = tl.load(source + half + pair, real, other=0.0).to(tl.float32)
    c = tl.load(source + rotated + last, real_last, other=0.0).to(tl.float32)
    if NORM:
        square = tl.sum(a * a + b * b, 1) + tl.sum(c * c, 1)
        inverse = (1.0 / tl.sqrt_rn(square / head_dim + eps))[:, None]
        is_q = head < H
        a *= inverse * (_gain(q_weight, k_weight, is_q, pair, real) + offset)
        b *= inverse * (_gain(q_weight, k_weight, is_q, half + pair, real) + offset)
        c *= inverse * (_gain(q_weight, k_weight, is_q, rotated + last, real_last) + offset)
    co = tl.load(cos + row * rotated + half + pair, pair < half, other=0.0).to(tl.float32)
    si = tl.load(sin + row * rotated + half + pair, pair < half, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(target + pair, (a * co - b * si).to(kind), real)
    tl.store(target + half + pair, (b * co + a * si).to(kind), real)
    tl.store(target + rotated + last, c.to(kind), real_last)


@triton.jit
def _gain(q_weight, k_weight, is_q, column, real):
    q = tl.load(q_weight + column, real & is_q, other=0.0).to(tl.float32)
    return q + tl.load(k_weight + column, real & (is_q == 0), other=0.0).to(tl.float32)


@triton.jit
def _backward_kernel(
    qkv, cos, sin, q_weight, k_weight, grad_q, grad_k, grad_v, grad, parts,
    q_row, q_head, k_row, k_head, v_row, v_head, N, rows, H, K, head_dim, rotated, eps, offset,
    NORM: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    half, pair, last = rotated // 2, tl.arange(0, HALF)[None, :], tl.arange(0, REST)[None, :]
    width, first = (H + 2 * K) * head_dim, program * rows
    qa, qb, qc = tl.zeros((1, HALF), tl.float32), tl.zeros((1, HALF), tl.float32), tl.zeros((1, REST), tl.float32)
    ka, kb, kc = qa, qb, qc  # weight gradients of the three parts of a head
    for i in range(tl.minimum(rows, N - first)):
        row = first + i
        co = tl.load(cos + row * rotated + half + pair, pair < half, other=0.0).to(tl.float32)
        si = tl.load(sin + row * rotated + half + pair, pair < half, other=0.0).to(tl.float32)
        at = row * width
        qa, qb, qc = _turn_back(
            qkv + at, q_weight, grad_q + row * q_row, q_head, grad + at, co, si, qa, qb, qc, H, head_dim, rotated,
            eps, offset, NORM, HALF, REST, HEADS,
        )  # fmt: skip
        at += H * head_dim
        ka, kb, kc = _turn_back(
            qkv + at, k_weight, grad_k + row * k_row, k_head, grad + at, co, si, ka, kb, kc, K, head_dim, rotated,
            eps, offset, NORM, HALF, REST, HEADS,
        )  # fmt: skip
        at += K * head_dim
        for start in range(0, K, HEADS):  # values are not rotated: their gradient is copied
            head = start + tl.arange(0, HEADS)[:, None]
            source, target = grad_v + row * v_row + head * v_head, grad + at + head * head_dim
            real, real_last = (head < K) & (pair < half), (head < K) & (last < head_dim - rotated)
            tl.store(target + pair, tl.load(source + pair, real), real)
            tl.store(target + half + pair, tl.load(source + half + pair, real), real)
            tl.store(target + rotated + last, tl.load(source + rotated + last, real_last), real_last)
    if NORM:
        to = parts + program * 2 * head_dim
        _store_parts(to, qa, qb, qc, half, head_dim, rotated, pair, last)
        _store_parts(to + head_dim, ka, kb, kc, half, head_dim, rotated, pair, last)


@triton.jit
def _turn_back(
    x, weight, grad_out, stride, grad, co, si, part_a, part_b, part_c, count, head_dim, rotated, eps, offset,
    NORM: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of `count` heads of one token; return the updated partial sums of the weight's gradient."""
    half, pair, last = rotated // 2, tl.arange(0, HALF)[None, :], tl.arange(0, REST)[None, :]
    for start in range(0, count, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        real, real_last = (head < count) & (pair < half), (head < count) & (last < head_dim - rotated)
        source = grad_out + head * stride
        ga = tl.load(source + pair, real, other=0.0).to(tl.float32)
        gb = tl.load(source + half + pair, real, other=0.0).to(tl.float32)
        gc = tl.load(source + rotated + last, real_last, other=0.0).to(tl.float32)
        ga, gb = ga * co + gb * si, gb * co - ga * si
        if NORM:
            values = x + head * head_dim
            a = tl.load(values + pair, real, other=0.0).to(tl.float32)
            b = tl.load(values + half + pair, real, other=0.0).to(tl.float32)
            c = tl.load(values + rotated + last, real_last, other=0.0).to(tl.float32)
            square = tl.sum(a * a + b * b, 1) + tl.sum(c * c, 1)
            inverse = (1.0 / tl.sqrt_rn(square / head_dim + eps))[:, None]
            a, b, c = a * inverse, b * inverse, c * inverse
            part_a += tl.sum(ga * a, 0)[None, :]
            part_b += tl.sum(gb * b, 0)[None, :]
            part_c += tl.sum(gc * c, 0)[None, :]
            ga *= tl.load(weight + pair, pair < half, other=0.0).to(tl.float32) + offset
            gb *= tl.load(weight + half + pair, pair < half, other=0.0).to(tl.float32) + offset
            gc *= tl.load(weight + rotated + last, last < head_dim - rotated, other=0.0).to(tl.float32) + offset
            along = ((tl.sum(ga * a + gb * b, 1) + tl.sum(gc * c, 1)) / head_dim)[:, None]
            ga, gb, gc = (ga - a * along) * inverse, (gb - b * along) * inverse, (gc - c * along) * inverse
        target = grad + head * head_dim
        tl.store(target + pair, ga.to(grad.dtype.element_ty), real)
        tl.store(target + half + pair, gb.to(grad.dtype.element_ty), real)
        tl.store(target + rotated + last, gc.to(grad.dtype.element_ty), real_last)
    return part_a, part_b, part_c


@triton.jit
def _store_parts(to, part_a, part_b, part_c, half, head_dim, rotated, pair, last):
    tl.store(to + pair, part_a, pair < half)
    tl.store(to + half + pair, part_b, pair < half)
    tl.store(to + rotated + last, part_c, last < head_dim - rotated)
