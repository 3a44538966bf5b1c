"""Triton kernels for PPO's clipped policy and value losses, with their metrics and gradients.

The definitions are `ppo_policy_loss` and `ppo_value_loss` in `losses.py`; `tests/kernels/test_ppo_kernel.py` compares.
The forward launch reads each input once and writes both gradients. The backward launch multiplies them by the gradient
of the loss. It leaves them as they are where that is 1, as after `loss.backward()`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.clips import Clips

BLOCK, WARPS = 1024, 4
NAMES = ("policy/loss", "policy/approx_kl", "policy/clip_fraction", "policy/ratio", "value/loss", "value/clip_fraction")


def ppo_triton(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, completion_mask: Tensor,
    values: Tensor, old_values: Tensor, returns: Tensor, value_mask: Tensor,
    *, clips: Clips, num_tokens: Tensor | float, num_states: Tensor | float,
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:  # fmt: skip
    """(policy / num_tokens + value_coef * value / num_states, metrics as (sum, number of terms)).

    Schulman et al. 2017 (arXiv:1707.06347), Eq. 7 and 9 without the entropy bonus, with a clipped value loss.

    Args:
        logprobs .. returns: (B, T), nats and reward units. completion_mask, value_mask: (B, T) bool.
        num_tokens, num_states: numbers of True entries of the two masks in the whole optimizer step.
    Raises:
        ValueError: shapes differ.
    """
    constants = [x.contiguous() for x in (old_logprobs, advantages, completion_mask, old_values, returns, value_mask)]
    shapes = {tuple(x.shape) for x in (logprobs, values, *constants)}
    if len(shapes) != 1:
        raise ValueError(f"ppo_triton wants eight tensors of one shape, got {sorted(shapes)}")
    totals = [torch.as_tensor(x, dtype=torch.float32, device=logprobs.device) for x in (num_tokens, num_states)]
    loss, sums = _Terms.apply(logprobs.contiguous(), values.contiguous(), constants, totals, clips)
    counts = (sums[6],) * 4 + (sums[7],) * 2
    return loss, {name: (total, count) for name, total, count in zip(NAMES, sums, counts, strict=False)}


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, values, constants, totals, clips):
        old_logprobs, advantages, mask, old_values, returns, value_mask = constants
        sums = torch.zeros(9, dtype=torch.float32, device=logprobs.device)
        grads = torch.empty_like(logprobs), torch.empty_like(values)
        n = logprobs.numel()
        if n:
            _forward_kernel[(triton.cdiv(n, BLOCK),)](
                logprobs, old_logprobs, advantages, mask, values, old_values, returns, value_mask, *grads, sums,
                *totals, n, float(clips.policy), float(clips.policy_high or clips.policy), float(clips.dual or 0),
                float(clips.value or 0), float(clips.value_coef), clips.dual is not None, clips.value is not None,
                BLOCK, num_warps=WARPS,
            )  # fmt: skip
        ctx.grads = grads
        ctx.mark_non_differentiable(metrics := sums[:8])
        return sums[8], metrics

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        if ctx.grads is None:
            raise RuntimeError("the gradients of this PPO loss were handed out; compute the loss again")
        (grad_logprobs, grad_values), ctx.grads = (
            ctx.grads,
            None,
        )  # they are scaled in place, so only one backward pass is possible
        n = grad_logprobs.numel()
        if n:
            _backward_kernel[(triton.cdiv(n, BLOCK),)](grad_logprobs, grad_values, grad_loss, n, BLOCK, num_warps=WARPS)
        return grad_logprobs, grad_values, *[None] * 3


@triton.jit
def _forward_kernel(
    logprobs, old_logprobs, advantages, mask, values, old_values, returns, value_mask, grad_logprobs, grad_values, sums,
    num_tokens, num_states, n, clip_range, clip_range_high, dual_clip, value_clip_range, value_coef,
    DUAL: tl.constexpr, CLIP_VALUE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < n
    policy_scale, value_scale = 1.0 / tl.load(num_tokens), value_coef / tl.load(num_states)

    m = tl.load(mask + at, real, other=0) != 0  # off-mask entries may be inf or nan, so they are not read
    advantage = tl.load(advantages + at, m, other=0.0).to(tl.float32)
    old_logprob = tl.load(old_logprobs + at, m, other=0.0).to(tl.float32)
    log_ratio = tl.load(logprobs + at, m, other=0.0).to(tl.float32) - old_logprob
    bounded_ratio = tl.minimum(log_ratio, 80.0)  # as in losses.py: exp would overflow to inf, and inf * 0 is nan
    ratio = tl.exp(bounded_ratio if DUAL else tl.where(advantage < 0, log_ratio, bounded_ratio))
    unclipped = -advantage * ratio
    clipped = -advantage * tl.minimum(tl.maximum(ratio, 1 - clip_range), 1 + clip_range_high)
    loss = tl.maximum(unclipped, clipped)
    learns = unclipped >= clipped
    if DUAL:
        bounded = (advantage < 0) & (loss > -advantage * dual_clip)
        loss = tl.where(bounded, -advantage * dual_clip, loss)
        learns = learns & (bounded == 0)
    policy_loss = tl.sum(tl.where(m, loss, 0.0), 0)
    grad = tl.where(m & learns, unclipped * policy_scale, 0.0)
    tl.store(grad_logprobs + at, grad.to(grad_logprobs.dtype.element_ty), real)
    tl.atomic_add(sums + 0, policy_loss)
    tl.atomic_add(sums + 1, tl.sum(tl.where(m, 0.5 * log_ratio * log_ratio, 0.0), 0))
    tl.atomic_add(sums + 2, tl.sum(tl.where(m & (clipped > unclipped), 1.0, 0.0), 0))
    tl.atomic_add(sums + 3, tl.sum(tl.where(m, ratio, 0.0), 0))
    tl.atomic_add(sums + 6, tl.sum(tl.where(m, 1.0, 0.0), 0))

    m = tl.load(value_mask + at, real, other=0) != 0
    value = tl.load(values + at, m, other=0.0).to(tl.float32)
    old_value = tl.load(old_values + at, m, other=0.0).to(tl.float32)
    target = tl.load(returns + at, m, other=0.0).to(tl.float32)
    error = value - target
    grad, square, was_clipped = error, error * error, m & (value != value)
    if CLIP_VALUE:
        step = value - old_value
        bounded = tl.minimum(tl.maximum(step, -value_clip_range), value_clip_range)
        clipped_error = old_value + bounded - target
        was_clipped = m & (bounded != step) & (clipped_error * clipped_error > square)
        grad = tl.where(was_clipped, 0.0, error)
        square = tl.where(was_clipped, clipped_error * clipped_error, square)
    value_loss = tl.sum(tl.where(m, 0.5 * square, 0.0), 0)
    grad = tl.where(m, grad * value_scale, 0.0)
    tl.store(grad_values + at, grad.to(grad_values.dtype.element_ty), real)
    tl.atomic_add(sums + 4, value_loss)
    tl.atomic_add(sums + 5, tl.sum(tl.where(was_clipped, 1.0, 0.0), 0))
    tl.atomic_add(sums + 7, tl.sum(tl.where(m, 1.0, 0.0), 0))
    tl.atomic_add(sums + 8, policy_loss * policy_scale + value_loss * value_scale)


@triton.jit
def _backward_kernel(grad_logprobs, grad_values, grad_loss, n, BLOCK: tl.constexpr):
    g = tl.load(grad_loss)
    if g != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        real = at < n
        tl.store(grad_logprobs + at, tl.load(grad_logprobs + at, real) * g, real)
        tl.store(grad_values + at, tl.load(grad_values + at, real) * g, real)
