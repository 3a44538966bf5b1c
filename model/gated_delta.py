"""Gated DeltaNet: a layer with a state of fixed size in the place of attention. Yang et al. 2024 (arXiv:2412.06464).

Each value head has a matrix S (Dk, Dv), which is zero at first. Every token decays it, corrects it and reads it:

    S = exp(g) S;   S = S + k (beta (v - S^T k))^T;   o = S^T q                                            (Eq. 10)

q, k and v are outputs of a short causal convolution. If several answers share a prompt, the state after the prompt is
computed once and copied to each answer (`model/chunks.py`).
"""

from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.attention import Blocks
from model.chunks import SIZE, Chunks
from model.config import ModelConfig
from model.functions import rms_norm
from model.linear import Linear


class GatedDeltaNet(nn.Module):
    """(N, D) inputs to (N, D) outputs. One product gives q, k, v, the output gate z, beta and g."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.eps = layer, config.norm_eps
        self.key_heads, self.value_heads = config.linear_key_heads, config.linear_value_heads
        self.key_dim, self.value_dim = config.linear_key_dim, config.linear_value_dim
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        self.widths = (2 * keys + values, values, self.value_heads, self.value_heads)
        self.by_head = config.facts.linear_by_head
        parts = (2 * (keys + values), 2 * self.value_heads) if self.by_head else self.widths
        self.qkv = Linear(config.hidden_size, sum(self.widths), bias=False, parts=parts)
        self.conv = nn.Parameter(torch.empty(self.widths[0], 1, config.conv_size))  # its last column is of the token
        self.A_log = nn.Parameter(torch.empty(self.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads))
        self.norm = nn.Parameter(torch.empty(self.value_dim))
        self.out = Linear(values, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope, blocks: Blocks, cache, adapted: bool, picks: Tensor | None) -> Tensor:
        convolve, recur = (convolve_stream, recur_stream) if cache is None else (cache.convolve, cache.recur)
        mix = partial(self.mix, convolve, recur, blocks, picks)
        given = self.qkv(x, adapted), self.conv, self.A_log, self.dt_bias, self.norm
        mixed = Recomputed.apply(mix, *given) if torch.is_grad_enabled() else mix(*given)
        return self.out(mixed, adapted)

    def mix(
        self,
        convolve: Callable,
        recur: Callable,
        blocks: Blocks,
        picks: Tensor | None,
        made: Tensor,
        conv: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        norm: Tensor,
    ) -> Tensor:
        """(N, Hv Dv) the input of the last product. `made` is the output of the first one and sets the dtype."""
        mixed, z, beta, a = self.by_key_head(made) if self.by_head else made.split(self.widths, dim=-1)
        mixed = F.silu(convolve(self.layer, mixed, conv, blocks))  # (N, 2 Hk Dk + Hv Dv) float32 at least
        keys = self.key_heads * self.key_dim
        q, k, v = mixed.split((keys, keys, mixed.shape[-1] - 2 * keys), dim=-1)
        q, k = (unit(rearrange(x, "n (h d) -> n h d", d=self.key_dim)) for x in (q, k))
        v = rearrange(v, "n (h d) -> n h d", d=self.value_dim)
        g = -A_log.to(v.dtype).exp() * F.softplus(a.to(v.dtype) + dt_bias)  # (N, Hv), below 0
        mixed = recur(self.layer, q * self.key_dim**-0.5, k, v, g, beta.to(v.dtype).sigmoid(), blocks)  # (N, Hv, Dv)
        if picks is not None:
            mixed, z = mixed[picks], z[picks]
        mixed = rms_norm(mixed, norm, self.eps, mixed.dtype) * F.silu(z.to(mixed.dtype)).view_as(mixed)
        return mixed.flatten(1).to(made.dtype)

    def by_key_head(self, made: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(q, k and v together, z, beta, a), where the product holds q, k, v and z of each key head side by side."""
        group, heads = self.value_heads // self.key_heads, self.key_heads
        qkvz, ba = made.tensor_split((made.shape[-1] - 2 * self.value_heads,), dim=-1)
        sizes = (self.key_dim, self.key_dim, group * self.value_dim, group * self.value_dim)
        q, k, v, z = (x.flatten(1) for x in qkvz.unflatten(-1, (heads, -1)).split(sizes, dim=-1))
        beta, a = (x.flatten(1) for x in ba.unflatten(-1, (heads, -1)).split(group, dim=-1))
        return torch.cat((q, k, v), dim=-1), z, beta, a

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Decay rates A ~ U(0.01, 16), as published. The convolution's weights are drawn as in torch's Conv1d."""
        self.A_log.uniform_(0.01, 16, generator=generator).log_()
        self.dt_bias.fill_(1.0)
        self.norm.fill_(1.0)
        bound = self.conv.shape[-1] ** -0.5
        self.conv.uniform_(-bound, bound, generator=generator)


class Recomputed(torch.autograd.Function):
    """function(*inputs). Only the inputs are stored, and the backward pass computes the function again.

    The activations of the recurrence would take three times the memory of the rest of a layer.
    """

    @staticmethod
    def forward(ctx, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        wanted = ctx.needs_input_grad[1:]
        inputs = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, wanted, strict=True)]
        with torch.enable_grad():
            out = ctx.function(*inputs)
        grads = iter(torch.autograd.grad(out, [x for x in inputs if x.requires_grad], grad))
        return None, *(next(grads) if need else None for need in wanted)


def unit(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6) along the last dimension."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def convolve_stream(layer: int, x: Tensor, weight: Tensor, blocks: Blocks) -> Tensor:
    """The convolution over a packed stream. `layer` is unused here; a cache needs it."""
    return ShortConvolution.apply(x, weight, blocks.chunks().before)


def recur_stream(layer: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, blocks: Blocks) -> Tensor:
    """The recurrence over a packed stream."""
    return gated_delta(q, k, v, g, beta, blocks.chunks())[0]


class ShortConvolution(torch.autograd.Function):
    """(N, C), in float32 or wider: y_t = sum over j of weight[:, 0, -1 - j] x_(t - j), where t - j is in the same row.

    before (N + 1,): the index of the token before each token, N if there is none.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, before: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, before)
        wide = torch.promote_types(x.dtype, torch.float32)
        padded = torch.cat((x, x.new_zeros(1, x.shape[1])))
        columns, at = weight.to(wide).squeeze(1).t(), torch.arange(len(x), device=x.device)  # (K, C)
        out = x * columns[-1]
        for column in columns[:-1].flip(0):
            at = before[at]
            out.addcmul_(padded[at].to(wide), column)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, before = ctx.saved_tensors
        padded, columns = torch.cat((x, x.new_zeros(1, x.shape[1]))), weight.to(grad.dtype).squeeze(1).t()
        at, grad_x, grad_columns = torch.arange(len(x), device=x.device), grad.new_zeros(padded.shape), []
        for column in columns.flip(0):
            grad_x.index_add_(0, at, grad * column)
            grad_columns.append((grad * padded[at]).sum(0))
            at = before[at]
        grad_weight = torch.stack(grad_columns[::-1], dim=-1).view(weight.shape)
        return grad_x[:-1].to(x.dtype), grad_weight.to(weight.dtype), None


def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunks: Chunks
) -> tuple[Tensor, list[Tensor]]:
    """(N, Hv, Dv) outputs, and for each level of chunks the states (n, Hk, G, Dk, Dv) after them.

    The chunkwise form, section 3.3: with G = cumsum(g) within a chunk and A_ij = beta_i exp(G_i - G_j) k_i k_j for
    j < i, the corrections of a chunk are the solution of (I + A) X = beta (v - exp(G) k S), S the state before it.

    q, k: (N, Hk, Dk). v: (N, Hv, Dv). g, beta: (N, Hv). Each key head serves G = Hv / Hk consecutive value heads.
    """
    groups = v.shape[1] // k.shape[1]
    q, k = (rearrange(chunks.split(x), "n c h d -> n h 1 c d") for x in (q, k))
    v = rearrange(chunks.split(v), "n c (h g) d -> n h g c d", g=groups)
    # The unused end of a short chunk neither decays nor writes.
    g, beta = (chunks.split(x).masked_fill(chunks.idle[..., None], 0) for x in (g, beta))
    g, beta = (rearrange(x, "n c (h g) -> n h g c", g=groups) for x in (g, beta))
    total = g.cumsum(-1)
    later = torch.ones(SIZE, SIZE, dtype=torch.bool, device=q.device).triu(1)
    kept = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()  # exp(G_i - G_j), j <= i
    known = total.exp()[..., None]  # the part of the state before the chunk that is left at each token
    system = (k @ k.mT) * kept * beta[..., None]
    right = torch.cat((v, k * known), dim=-1) * beta[..., None]
    right = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    written, read = right.split((v.shape[-1], k.shape[-1]), dim=-1)
    scores, q = (q @ k.mT) * kept, q * known
    k, left = k * (total[..., -1:] - total).exp()[..., None], known[..., -1:, :]

    outs = []
    states: list[Tensor] = []
    parts = zip(*(x.split(chunks.sizes) for x in (q, k, scores, written, read, left)), chunks.parents, strict=True)
    for q, k, scores, written, read, left, parents in parts:
        if not states:  # the first chunks begin at zero
            outs.append(scores @ written)
            states.append(k.mT @ written)
            continue
        state = states[-1][parents]
        written = written - read @ state
        outs.append(q @ state + scores @ written)
        states.append(left * state + k.mT @ written)
    return chunks.join(rearrange(torch.cat(outs), "n h g c d -> n c (h g) d")), states


def gated_delta_step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Hv, Dv) outputs at the next token of B rows, and the states (B, Hv, Dk, Dv) after it, by Eq. 10."""
    groups = v.shape[1] // k.shape[1]
    q, k = (x.repeat_interleave(groups, dim=1)[..., None] for x in (q, k))  # (B, Hv, Dk, 1)
    state = state * g.exp()[..., None, None]
    state = state + k * ((v - (k * state).sum(2)) * beta[..., None])[:, :, None]
    return (q * state).sum(2), state
