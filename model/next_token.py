"""Draw one token from a row of logits: temperature, top-k, top-p, inverse CDF. No host sync, no global random state."""

import torch
from torch import Tensor

from runtime.devices import widest

CHUNK = 256  # the inverse CDF has two levels: first a chunk of the vocabulary, then a token inside it


def uniforms(seeds: Tensor, steps: Tensor) -> Tensor:
    """(B,) random numbers in [0, 1), of dtype `widest`, for rows with these seeds at these steps; both (B,) int64.

    A counter-based generator (the finaliser of splitmix64, Steele et al. 2014). A number depends only on its row's seed
    and step, so neither the other rows of the batch nor an interruption changes a row's text.
    """
    x = seeds * -7046029254386353131 + (steps + 1) * -4417276706812531889  # odd constants; int64 wraps around
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ _shift_right(x, shift)) * factor
    x = x ^ _shift_right(x, 31)
    dtype = widest(x.device)
    bits = 53 if dtype == torch.float64 else 24
    return _shift_right(x, 64 - bits).to(dtype) * 2.0**-bits


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical shift, as of an unsigned integer


def next_token(logits: Tensor, u: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """(B,) int64: a token for each row of (B, V) logits by inverse CDF at u (B,) in [0, 1).

    temperature 0 takes the most likely token, of equal ones that with the lowest id. top_k = 0 and top_p = 1 keep all
    tokens. Top-k is applied first. Top-p then keeps the smallest set of most likely tokens whose probability, after
    top-k, reaches top_p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    if top_k or top_p < 1:
        return _from_shortlist(logits, u, top_k, top_p)
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()  # (B, V), the largest is 1
    return _inverse_cdf(weights, u)


def _from_shortlist(logits: Tensor, u: Tensor, top_k: int, top_p: float) -> Tensor:
    V = logits.shape[-1]
    logits, ids = torch.topk(logits, min(top_k, V)) if top_k else torch.sort(logits, descending=True, stable=True)
    weights = torch.exp(logits - logits[:, :1])  # (B, k), descending
    if top_p < 1:
        wide = weights.to(widest(weights.device))
        before = wide.cumsum(-1) - weights  # total weight of the more likely tokens
        weights = weights.masked_fill(before >= top_p * wide.sum(-1, keepdim=True), 0.0)
    return ids.gather(-1, _inverse_cdf(weights, u)[:, None])[:, 0]


def _inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """(B,) index i with cdf[i-1] <= u * total < cdf[i]; weights (B, V) >= 0 need not sum to one."""
    B, V = weights.shape
    if V % CHUNK:
        weights = torch.nn.functional.pad(weights, (0, -V % CHUNK))
    chunks = weights.view(B, -1, CHUNK)  # (B, C, CHUNK)
    by_chunk = chunks.sum(-1, dtype=u.dtype).cumsum(-1)  # (B, C)
    target = u * by_chunk[:, -1]  # (B,)
    chunk = _first_above(by_chunk, target)  # (B,)
    start = torch.where(chunk > 0, by_chunk.gather(-1, (chunk - 1).clamp_min(0)[:, None])[:, 0], 0.0)
    inside = chunks[torch.arange(B, device=weights.device), chunk].to(u.dtype).cumsum(-1)  # (B, CHUNK)
    return (chunk * CHUNK + _first_above(inside, target - start)).clamp_max(V - 1)


def _first_above(cdf: Tensor, target: Tensor) -> Tensor:
    """First index with cdf > target. Where rounding leaves none, the last index with a positive weight.

    A row with NaN gets some index: its log-prob is NaN, which the caller sees on the host.
    """
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous(), right=False)[:, 0].clamp_max(cdf.shape[-1] - 1)
    return torch.minimum(torch.searchsorted(cdf, target[:, None], right=True)[:, 0], last)
