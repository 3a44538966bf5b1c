"""The cases of the benchmark: each kernel once at a small size, and the log-prob in several implementations."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.backend import programs
from kernels.clips import Clips
from kernels.fold import Settings, Stats, Summary
from kernels.fold_triton import fold_triton, unfold_triton
from kernels.gae import gae_triton
from kernels.gated import gated_backward, gated_forward
from kernels.logprob import ReferenceInputs, linear_logprob, linear_logprob_ref
from kernels.norm import add_rms_norm_backward, add_rms_norm_forward
from kernels.ppo import ppo_triton
from kernels.rotary import rotary_backward, rotary_forward

ROWS, WIDTH = 8, 4096  # shape of the tile of logits
B, T = 8, 1024  # shape of the inputs of PPO and GAE
D, HEADS, KV_HEADS, HEAD_DIM, F = 2048, 16, 4, 128, 8192  # shape of a layer
Launches = dict[str, tuple[int, Callable[[], object]]]  # name -> (bytes that one launch must move, the launch)


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


def layer_kernels(N: int, device: str) -> Launches:
    """The kernels between a layer's products, for N tokens: a float32 residual stream, bfloat16 elsewhere."""

    def bf16(*shape: int) -> Tensor:
        return torch.randn(N, *shape, dtype=torch.bfloat16, device=device)

    x, grad_x = torch.randn(2, N, D, device=device)
    delta, scale, weight = bf16(D), torch.ones(N, device=device), torch.ones(D, device=device)
    qkv, gate_up, grad_gated = bf16((HEADS + 2 * KV_HEADS) * HEAD_DIM), bf16(2 * F), bf16(F)
    grads = [bf16(heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    cos, sin = torch.randn(2, N, 1, HEAD_DIM, device=device)
    settings = (cos, sin, *torch.ones(2, HEAD_DIM, device=device), 1e-5, 0.0)
    qk, v = (HEADS + KV_HEADS) * HEAD_DIM, KV_HEADS * HEAD_DIM
    parts = min(N, programs(x.device))  # rows of the partial sums of a weight's gradient
    tables = 4 * HEAD_DIM * (N + 2)  # half of cos, half of sin, and two weights
    return {
        "norm forward": (
            N * D * (4 + 2 + 4 + 2) + 4 * D + 4 * N,
            lambda: add_rms_norm_forward(x, delta, weight, 1e-5, 0.0, torch.bfloat16),
        ),
        "norm backward": (
            N * D * (4 + 2 + 4 + 4 + 2) + 4 * D + 4 * N + 4 * parts * D,
            lambda: add_rms_norm_backward(x, weight, scale, delta, grad_x, 0.0, torch.bfloat16),
        ),
        "rotary forward": (N * 2 * 2 * qk + tables, lambda: rotary_forward(qkv, *settings, HEADS, KV_HEADS)),
        "rotary backward": (
            N * 2 * (qk + 2 * (qk + v)) + tables + 8 * parts * HEAD_DIM,
            lambda: rotary_backward(qkv, *settings, *grads),
        ),
        "gate forward": (N * F * 2 * 3, lambda: gated_forward(gate_up, False)),
        "gate backward": (N * F * 2 * 5, lambda: gated_backward(gate_up, grad_gated, False)),
    }


def gpu_kernels() -> Launches:
    """The kernels on a CUDA device, at sizes larger than its caches."""
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
        **layer_kernels(M, "cuda"),
    }


CASES: dict[str, Callable[[], object]] = {
    "log-prob": fold_logprob,
    "log-prob, entropy, KL": fold_everything,
    "ppo": ppo,
    "gae": gae,
}
_layer = layer_kernels(16, "cpu")
CASES |= {name: step for name, (_, step) in _layer.items()}
_tile = 2 * ROWS * WIDTH  # bytes
MINIMUM = {  # bytes that one launch must read and write; the few numbers per token are left out
    "log-prob": {"_fold_kernel": _tile, "_unfold_kernel": 2 * _tile},
    "log-prob, entropy, KL": {"_fold_kernel": 2 * _tile, "_unfold_kernel": 3 * _tile},
    "ppo": {"_forward_kernel": B * T * (6 * 4 + 2 + 2 * 4), "_backward_kernel": 4},
    "gae": {"_gae_kernel": B * T * (4 + 4 + 1 + 1 + 4)},
} | {name: {f"_{name.split()[1]}_kernel": moved} for name, (moved, _) in _layer.items()}


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
