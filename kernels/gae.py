"""Generalised advantage estimation: the definition as a loop, and a Triton kernel that scans each row."""

import torch
from torch import Tensor

from kernels.backend import HAS_TRITON, agreed, use_triton

if HAS_TRITON:
    import triton
    import triton.language as tl


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    gae_lambda: float | Tensor,
    done: Tensor | None = None,
) -> Tensor:
    """(B, T) float32 advantages, 0 off-mask. Schulman et al. 2016 (arXiv:1506.02438), Eq. 16.

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1},   V = A = 0 after an episode's end

    t + 1 is the next state where the mask is True. Tokens of an environment between two turns are not states. So the
    reward of a later turn reaches the turn before it.

    Args:
        rewards, values: (B, T) reward units. Off-mask entries have no influence on the result.
        mask: (B, T) bool, the states that have a value.
        gae_lambda: a number, or (B,) one per row.
        done: (B, T) bool, the last state of each episode. None: a row is one episode.

    Raises:
        ValueError: shapes or dtypes differ from these, or gamma or gae_lambda lies outside [0, 1].
    """
    tensors = {"rewards": rewards, "values": values, "mask": mask} | ({} if done is None else {"done": done})
    if len({x.shape for x in tensors.values()}) != 1 or rewards.ndim != 2:
        got = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"gae wants (B, T) tensors of one shape, got {got}")
    for name in ("mask", "done"):
        if name in tensors and tensors[name].dtype != torch.bool:
            raise ValueError(f"{name} must be bool, got {tensors[name].dtype}; write `mask.bool()` at the call")
    lambdas = torch.as_tensor(gae_lambda)
    if not 0 <= gamma <= 1 or not ((lambdas >= 0) & (lambdas <= 1)).all():
        raise ValueError(f"gamma and gae_lambda are discounts in [0, 1], got {gamma=}, {gae_lambda=}")
    if use_triton(rewards):
        return agreed("kernels/gae.py", gae_triton, gae_ref, rewards, values, mask, gamma, gae_lambda, done)
    return gae_ref(rewards, values, mask, gamma, gae_lambda, done)


@torch.no_grad()
def gae_ref(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float | Tensor, done: Tensor | None = None
) -> Tensor:
    """The definition, as a loop over columns. It computes in the dtype of its inputs: float64 gives a reference."""
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    rewards, values, zero = rewards.to(dtype), values.to(dtype), rewards.new_zeros((), dtype=dtype)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = zero.expand(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        if done is not None:
            next_value, next_advantage = (torch.where(done[:, t], zero, x) for x in (next_value, next_advantage))
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        advantages[:, t] = torch.where(mask[:, t], advantage, zero)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    return advantages


if HAS_TRITON:

    @triton.jit
    def _compose(later_a, later_b, a, b):
        return a * later_a, b + a * later_b

    @triton.jit
    def _nearest(later_is, later_v, now_is, now_v):  # of two states, the earlier one where the mask is True
        return later_is | now_is, tl.where(now_is != 0, now_v, later_v)

    @triton.jit
    def _gae_kernel(rewards, values, mask, done, lambdas, advantages, T, gamma, BLOCK_T: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * T  # int64: B*T passes 2**31 on long rollouts
        decay_rate = gamma * tl.load(lambdas + tl.program_id(0))
        blocks = tl.cdiv(T, BLOCK_T)
        last = row * 0 + (blocks - 1) * BLOCK_T
        carry = tl.zeros((1,), tl.float32)  # advantage of the first state after this block
        value = tl.zeros((1,), tl.float32)  # value of that state
        first = tl.arange(0, BLOCK_T) == 0
        for i in range(blocks):  # from the end of the row to its beginning
            t = last - i * BLOCK_T + tl.arange(0, BLOCK_T)
            m = tl.load(mask + row + t, t < T, other=0) != 0
            ends = tl.load(done + row + t, t < T, other=0) != 0
            r = tl.load(rewards + row + t, t < T, other=0.0).to(tl.float32)
            v = tl.load(values + row + t, t < T, other=0.0).to(tl.float32)

            # the value of the next state within the block: scan the columns shifted by one
            inside = (tl.arange(0, BLOCK_T) < BLOCK_T - 1) & (t + 1 < T)
            next_m = tl.load(mask + row + t + 1, inside, other=0) != 0
            next_v = tl.where(next_m, tl.load(values + row + t + 1, inside, other=0.0).to(tl.float32), 0.0)
            found, next_v = tl.associative_scan(
                (next_m.to(tl.int32), next_v), axis=0, combine_fn=_nearest, reverse=True
            )
            next_v = tl.where(found != 0, next_v, value)

            a = tl.where(m, decay_rate, 1.0)  # columns between states pass the advantage on unchanged
            a = tl.where(ends, 0.0, a)
            b = tl.where(m, r + gamma * tl.where(ends, 0.0, next_v) - v, 0.0)  # where, not *: 0 * inf is nan
            decay, advantage = tl.associative_scan((a, b), axis=0, combine_fn=_compose, reverse=True)
            advantage += decay * carry
            tl.store(advantages + row + t, tl.where(m, advantage, 0.0), t < T)
            carry = tl.sum(tl.where(first, advantage, 0.0), 0)[None]
            here = tl.sum(tl.where(first & m, v, 0.0), 0)
            after = tl.sum(tl.where(first, next_v, 0.0), 0)
            marked = tl.sum(tl.where(first & m, 1, 0), 0)
            value = tl.where(marked != 0, here, after)[None]


MAX_BLOCK = 1024


@torch.no_grad()
def gae_triton(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float | Tensor, done: Tensor | None = None
) -> Tensor:
    """The same in one launch: one program per row scans it from its end, in blocks of at most 1024 tokens."""
    B, T = rewards.shape
    done = torch.zeros_like(mask) if done is None else done
    inputs = [x.contiguous() for x in (rewards, values, mask, done)]
    lambdas = torch.as_tensor(gae_lambda, dtype=torch.float32, device=rewards.device).expand(B).contiguous()
    advantages = torch.empty(B, T, dtype=torch.float32, device=rewards.device)
    if advantages.numel():
        block = min(triton.next_power_of_2(T), MAX_BLOCK)
        _gae_kernel[(B,)](*inputs, lambdas, advantages, T, gamma, BLOCK_T=block, num_warps=max(1, block // 256))
    return advantages
