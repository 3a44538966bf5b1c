"""The cases of the benchmark: each kernel once at a small size, and the log-prob in several implementations."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.clips import Clips
from kernels.fold import Settings, Stats, Summary
from kernels.fold_triton import fold_triton, unfold_triton
from kernels.gae import gae_triton
from kernels.logprob import ReferenceInputs, linear_logprob, linear_logprob_ref
from kernels.ppo import ppo_triton

ROWS, WIDTH = 8, 4096  # shape of the tile of logits
B, T = 8, 1024  # shape of the inputs of PPO and GAE


def logprob_inputs(M: int, D: int, V: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (M, D) and weight (V, D) whose logits have variance 1, and targets (M,)."""
    torch.manual_seed(0)
    hidden = torch.randn(M, D, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, device=device, dtype=dtype).mul_(D**-0.5).requires_grad_()
    return hidden, weight, torch.randint(0, V, (M,), device=device)


def fold_everything() -> None:
    """One tile with entropy and KL, forward and backward."""
    hidden, weight, targets = logprob_inputs(ROWS, 16, WIDTH, torch.bfloat16, "cpu")
    out = linear_logprob(hidden, weight, targets, entropy=True, reference=ReferenceInputs(hidden, weight))
    sum(x.sum() for x in out).backward()


def fold_logprob() -> None:
    """One tile, log-prob alone."""
    hidden, weight, targets = logprob_inputs(ROWS, 16, WIDTH, torch.bfloat16, "cpu")
    linear_logprob(hidden, weight, targets).sum().backward()


def ppo() -> None:
    """A loss and its gradients."""
    floats = [torch.randn(B, T, requires_grad=i in (0, 3)) for i in range(6)]
    mask = [torch.ones(B, T, dtype=torch.bool) for _ in range(2)]
    clips = Clips(policy=0.2, dual=None, value=0.2, value_coef=0.1)
    inputs = [*floats[:3], mask[0], *floats[3:], mask[1]]
    terms = ppo_triton(*inputs, clips=clips, num_tokens=9.0, num_states=9.0)
    terms[0].backward()


def gae() -> None:
    """The advantages of B rows."""
    mask, done = torch.ones(2, B, T, dtype=torch.bool)
    gae_triton(torch.randn(B, T), torch.randn(B, T), mask, 0.99, 0.95, done)


def gpu_kernels() -> dict[str, tuple[int, Callable[[], object]]]:
    """name -> (bytes that one launch must move, the launch) on a CUDA device, at sizes larger than its caches."""
    M, width = 8192, 16384
    z, z_ref = torch.randn(2, M, width, device="cuda", dtype=torch.bfloat16)
    targets, tile = torch.randint(0, width, (M,), device="cuda"), z.numel() * z.element_size()
    stats, settings = Stats.start(M, torch.float32, z.device), Settings(1.0, None, True)
    summary = Summary.of(stats, entropy=True, kl=True)
    ones = [torch.ones(M, device="cuda") for _ in range(3)]
    floats = [torch.randn(2048, 4096, device="cuda", requires_grad=i in (0, 3)) for i in range(6)]
    mask, n = torch.ones(2048, 4096, dtype=torch.bool, device="cuda"), 2048 * 4096
    clips = Clips(policy=0.2, dual=None, value=0.2, value_coef=0.1)
    rewards, values, inputs = floats[1], floats[2], [*floats[:3], mask, *floats[3:], mask]
    return {
        "fold: log-prob, entropy": (tile, lambda: fold_triton(z, None, targets, 0, stats, settings)),
        "fold: log-prob, entropy, KL": (2 * tile, lambda: fold_triton(z, z_ref, targets, 0, stats, settings)),
        "unfold: log-prob, entropy": (
            2 * tile,
            lambda: unfold_triton(z, None, targets, 0, summary, [*ones[:2], None], settings),
        ),
        "unfold: log-prob, entropy, KL": (
            3 * tile,
            lambda: unfold_triton(z, z_ref, targets, 0, summary, ones, settings),
        ),
        "PPO forward": (
            n * (6 * 4 + 2 + 2 * 4),
            lambda: ppo_triton(*inputs, clips=clips, num_tokens=n, num_states=n),
        ),
        "GAE": (n * (4 + 4 + 1 + 1 + 4), lambda: gae_triton(rewards, values, mask, 0.99, 0.95, mask)),
    }


CASES = {"log-prob": fold_logprob, "log-prob, entropy, KL": fold_everything, "ppo": ppo, "gae": gae}
_tile = 2 * ROWS * WIDTH  # bytes
MINIMUM = {  # bytes that one launch must read and write; the few numbers per token are left out
    "log-prob": {"_fold_kernel": _tile, "_unfold_kernel": 2 * _tile},
    "log-prob, entropy, KL": {"_fold_kernel": 2 * _tile, "_unfold_kernel": 3 * _tile},
    "ppo": {"_forward_kernel": B * T * (6 * 4 + 2 + 2 * 4), "_backward_kernel": 4},
    "gae": {"_gae_kernel": B * T * (4 + 4 + 1 + 1 + 4)},
}


def _fold_formula(z: Tensor, *args, **options) -> tuple[float, float]:
    return 0, z.numel() * z.element_size() + 40 * len(z)  # the tile once, and ten numbers per token


def _unfold_formula(z: Tensor, *args, **options) -> tuple[float, float]:
    return 0, 2 * z.numel() * z.element_size() + 40 * len(z)


FORMULAS = {"_fold_kernel": _fold_formula, "_unfold_kernel": _unfold_formula}


def tiles(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """This project's implementation, in tiles of the vocabulary."""
    return linear_logprob(hidden, weight, targets, entropy=True)


def tiles_bf16(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same with bfloat16 products and float32 weights."""
    return linear_logprob(hidden.bfloat16(), weight, targets, entropy=True)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: all logits at once."""
    return linear_logprob_ref(hidden, weight, targets, entropy=True)


def compiled(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The definition under torch.compile."""
    return _compile()(hidden, weight, targets)


@functools.cache
def _compile():
    return torch.compile(naive)


IMPLEMENTATIONS = {"naive": naive, "tiles": tiles, "tiles_bf16": tiles_bf16, "compiled": compiled}
