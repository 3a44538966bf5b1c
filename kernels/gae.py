"""Generalised advantage estimation: the definition as a loop, and one Triton scan per row."""

import torch
from torch import Tensor

from kernels.backend import HAS_TRITON, use_triton

if HAS_TRITON:
    import triton
    import triton.language as tl


def gae(rewards: Tensor, values: Tensor, completion_mask: Tensor, *, gamma: float, gae_lambda: float) -> Tensor:
    """(B, T) float32 advantages, 0 off-mask. Schulman et al. 2016 (arXiv:1506.02438), Eq. 16.

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1},   V = A = 0 after a run's end

    Args:
        rewards, values: (B, T) reward units; what they hold off-mask is never read into a result.
        completion_mask: (B, T) bool; where a row has several runs, each is an episode of its own.

    Raises:
        ValueError: other shapes or dtypes, or gamma or gae_lambda outside [0, 1].
    """
    if not (rewards.shape == values.shape == completion_mask.shape) or rewards.ndim != 2:
        got = f"rewards {tuple(rewards.shape)}, values {tuple(values.shape)}, mask {tuple(completion_mask.shape)}"
        raise ValueError(f"gae wants three (B, T) tensors, got {got}")
    if completion_mask.dtype != torch.bool:
        raise ValueError(f"completion_mask must be bool, got {completion_mask.dtype}; write `mask.bool()` at the call")
    if not (0 <= gamma <= 1 and 0 <= gae_lambda <= 1):
        raise ValueError(f"gamma and gae_lambda are discounts in [0, 1], got {gamma=}, {gae_lambda=}")
    run = gae_triton if use_triton(rewards) else gae_ref
    return run(rewards, values, completion_mask, gamma, gae_lambda)


@torch.no_grad()
def gae_ref(rewards: Tensor, values: Tensor, completion_mask: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """The definition, as a loop. Runs in the inputs' precision: pass float64 to get the truth."""
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    rewards, values, zero = rewards.to(dtype), values.to(dtype), rewards.new_zeros((), dtype=dtype)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = zero
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(completion_mask[:, t], delta + gamma * gae_lambda * next_advantage, zero)
        next_value = torch.where(completion_mask[:, t], values[:, t], zero)
        advantages[:, t] = next_advantage
    return advantages


if HAS_TRITON:

    @triton.jit
    def _compose(later_a, later_b, a, b):
        return a * later_a, b + a * later_b

    @triton.jit
    def _gae_kernel(rewards, values, mask, advantages, T, gamma, gae_lambda, BLOCK_T: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * T  # int64: B*T passes 2**31 on long rollouts
        blocks = tl.cdiv(T, BLOCK_T)
        last = row * 0 + (blocks - 1) * BLOCK_T
        carry = tl.zeros((1,), tl.float32)  # the advantage of the first token after this block
        for i in range(blocks):  # from the end of the row to its beginning
            t = last - i * BLOCK_T + tl.arange(0, BLOCK_T)
            m = tl.load(mask + row + t, t < T, other=0) != 0
            r = tl.load(rewards + row + t, t < T, other=0.0).to(tl.float32)
            v = tl.load(values + row + t, t < T, other=0.0).to(tl.float32)
            next_m = tl.load(mask + row + t + 1, t + 1 < T, other=0) != 0
            next_v = tl.load(values + row + t + 1, t + 1 < T, other=0.0).to(tl.float32)

            a = tl.where(m, gamma * gae_lambda, 0.0)
            b = tl.where(m, r + gamma * tl.where(next_m, next_v, 0.0) - v, 0.0)  # where, not *: 0 * inf is nan
            decay, advantage = tl.associative_scan((a, b), axis=0, combine_fn=_compose, reverse=True)
            advantage += decay * carry
            tl.store(advantages + row + t, advantage, t < T)
            carry = tl.sum(tl.where(tl.arange(0, BLOCK_T) == 0, advantage, 0.0), 0)[None]


MAX_BLOCK = 1024


@torch.no_grad()
def gae_triton(rewards: Tensor, values: Tensor, completion_mask: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """The same in one launch: a row is one program, scanned from its end in blocks of at most 1024 tokens."""
    B, T = rewards.shape
    inputs = [x.contiguous() for x in (rewards, values, completion_mask)]
    advantages = torch.empty(B, T, dtype=torch.float32, device=rewards.device)
    if advantages.numel():
        block = min(triton.next_power_of_2(T), MAX_BLOCK)
        _gae_kernel[(B,)](*inputs, advantages, T, gamma, gae_lambda, BLOCK_T=block, num_warps=max(1, block // 256))
    return advantages
