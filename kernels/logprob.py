"""Log-probs over the vocabulary from hidden states, without storing the (M, V) logits.

The forward pass goes over tiles of the vocabulary, for all tokens at once. A library matmul computes a tile of logits.
A fold adds the tile to running statistics of each token (online softmax). The backward pass computes each tile again,
turns it into the gradient of the logits in place, and multiplies it with the weight and with the hidden states. The
rows of the weight's gradient that belong to a tile are written once.
The fold is torch (`kernels/fold.py`) or Triton (`kernels/fold_triton.py`). All else is the same on every device.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import HAS_TRITON, use_triton
from kernels.fold import Settings, Stats, Summary, fold_torch, unfold_torch

if HAS_TRITON:
    from kernels.fold_triton import fold_triton, unfold_triton

# Columns of logits in a tile. On a CPU it is wide enough for matmuls at full speed. On a GPU it is as wide as memory
# allows, because each tile reads all hidden states again and adds to their float32 gradient.
TILES = {"cpu": 4096, "gpu": 16384}


class ReferenceInputs(NamedTuple):
    """Hidden states (M, D') and weight (V, D') of a frozen model over the same vocabulary."""

    hidden: Tensor
    weight: Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    reference: ReferenceInputs | None = None,
) -> Any:
    """(M,) float32 log-probs of `targets` in nats [, (M,) entropy] [, (M,) exact KL to the reference] in one pass.

        z = softcap tanh(hidden @ weight.T / softcap) / temperature,   log pi = z[target] - logsumexp(z)
        entropy = -sum_v pi_v log pi_v,   KL = sum_v pi_v (log pi_v - log ref_v)

    All results have gradients to `hidden` and `weight`. The reference gets no gradient. Matmuls run in the dtype of
    `hidden`: a float32 weight is cast to bfloat16 tile by tile where the hidden states are bfloat16. Statistics and
    sums are float32.

    Args:
        hidden: (M, D). weight: (V, D), the output embedding. targets: (M,) int64 in [0, V).
        temperature: > 0, divides the logits after the softcap, as in sampling. softcap: > 0, in logit units.
        reference: the hidden states and the weight of the reference, used with the same temperature and softcap.

    Raises:
        ValueError: shapes, dtypes or ranges differ from these.
    """
    _check(hidden, weight, targets, temperature, softcap, reference)
    settings = Settings(temperature, softcap, entropy)
    ref_hidden, ref_weight = (x.detach() for x in reference) if reference else (None, None)
    out = _Sweep.apply(hidden, weight, targets.contiguous(), settings, use_triton(hidden), ref_hidden, ref_weight)
    asked = tuple(x for x in out if x is not None)
    return asked if len(asked) > 1 else asked[0]


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """(M,) float32 exact KL(pi || ref) in nats over the whole vocabulary, with gradient to `hidden` and `weight`."""
    targets = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    reference = ReferenceInputs(ref_hidden, ref_weight)
    return linear_logprob(hidden, weight, targets, temperature=temperature, softcap=softcap, reference=reference)[1]


def linear_logprob_ref(hidden, weight, targets, *, temperature=1.0, softcap=None, entropy=False, reference=None):
    """The definition of `linear_logprob`, with all (M, V) logits. It computes in the dtype of its inputs."""
    logp = _log_softmax(hidden, weight, temperature, softcap)  # (M, V)
    out = [logp.gather(1, targets[:, None]).squeeze(1)]
    if entropy:
        out.append(-(logp.exp() * logp).sum(1))
    if reference is not None:
        ref_logp = _log_softmax(reference[0].detach(), reference[1].detach(), temperature, softcap)
        out.append((logp.exp() * (logp - ref_logp)).sum(1))
    return tuple(out) if len(out) > 1 else out[0]


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float, softcap: float | None) -> Tensor:
    logits = hidden @ weight.to(hidden.dtype).T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits / temperature, dim=1)


def _check(hidden, weight, targets, temperature, softcap, reference) -> None:
    M = hidden.shape[0]
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != (M,):
        got = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"linear_logprob wants hidden (M, D), weight (V, D), targets (M,), got {got}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if temperature <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"need temperature > 0 and softcap > 0 or None, got {temperature=}, {softcap=}")
    if M and targets.device.type == "cpu":  # on a GPU the check would wait for the device
        low, high = targets.min().item(), targets.max().item()
        if low < 0 or high >= len(weight):
            raise ValueError(f"targets lie in [{low}, {high}], outside the vocabulary [0, {len(weight)})")
    if reference is None:
        return
    ref_hidden, ref_weight = reference
    if len(ref_hidden) != M or len(ref_weight) != len(weight) or ref_hidden.shape[1] != ref_weight.shape[1]:
        got = f"reference hidden {tuple(ref_hidden.shape)}, weight {tuple(ref_weight.shape)}"
        raise ValueError(f"the reference wants hidden (M={M}, D'), weight (V={len(weight)}, D'), got {got}")


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, settings, triton, ref_hidden, ref_weight):
        fold = fold_triton if triton else fold_torch
        ctx.set_materialize_grads(False)  # outputs that are only logged need no backward pass
        stats = Stats.start(len(hidden), torch.promote_types(hidden.dtype, torch.float32), hidden.device)
        for v, z, z_ref, _ in _tiles(hidden, weight, ref_hidden, ref_weight):
            fold(z, z_ref, targets, v, stats, settings)
        summary = Summary.of(stats, settings.entropy, ref_hidden is not None)
        ctx.save_for_backward(hidden, weight, targets, ref_hidden, ref_weight, *summary)
        ctx.settings, ctx.triton = settings, triton
        return (stats.target - stats.maximum) - summary.log_total, summary.entropy, summary.kl

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        hidden, weight, targets, ref_hidden, ref_weight, *summary = ctx.saved_tensors
        unfold = unfold_triton if ctx.triton else unfold_torch
        if grads[2] is None:  # no gradient of the KL: the reference is not needed
            ref_hidden = ref_weight = None
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        for v, z, z_ref, rows in _tiles(hidden, weight, ref_hidden, ref_weight):
            unfold(z, z_ref, targets, v, Summary(*summary), grads, ctx.settings)  # z: the gradient of the logits
            if needs_hidden:
                _add_product(grad_hidden, z, rows)
            if needs_weight:
                _write_product(grad_weight[v : v + len(rows)], z.T, hidden)
            del rows  # frees the cast copy before the next one is made
        return (grad_hidden.to(hidden.dtype) if needs_hidden else None), grad_weight, *[None] * 5


def _tiles(hidden: Tensor, weight: Tensor, ref_hidden: Tensor | None, ref_weight: Tensor | None):
    """Yield (first column, logits, reference logits, weight rows) of each tile. All tiles share the logits' memory."""
    memory = ref_memory = None
    width = TILES["gpu"]
    if hidden.device.type == "cpu":  # narrower tiles for a wide model, because a cast copies the tile's weights
        width = min(TILES["cpu"], max(512, 2**22 // hidden.shape[1]))
    for v in range(0, len(weight), width):
        rows = weight[v : v + width].to(hidden.dtype)
        memory, z_ref = _logits(hidden, rows, memory), None
        if ref_hidden is not None:
            ref_memory = z_ref = _logits(ref_hidden, ref_weight[v : v + width].to(ref_hidden.dtype), ref_memory)
        yield v, memory, z_ref, rows
        del rows


def _logits(hidden: Tensor, rows: Tensor, memory: Tensor | None) -> Tensor:
    if memory is None:
        return hidden @ rows.T
    return torch.mm(hidden, rows.T, out=memory.view(-1)[: len(hidden) * len(rows)].view(len(hidden), len(rows)))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, accumulated in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def _write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, rounded once to the dtype of `out`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)
