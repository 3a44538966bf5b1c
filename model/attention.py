"""Attention over a packed stream: which token attends to which, and the two implementations."""

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from model.chunks import Chunks
from runtime.devices import send

CHUNK = 256  # queries of one matmul; longer blocks are cut, so that little is computed above the diagonal
SMALLEST_HEAD = 16  # flex_attention does not compile for narrower heads
RECOMPILE_LIMIT = 64  # compiled variants of flex_attention in one process; torch's own limit is 8
TILE = 128  # flex_attention skips or computes tiles of TILE x TILE tokens


class Blocks:
    """The attention mask of a stream of N tokens: causal, within one block, and no answer attends to another answer.

    Masks are computed once and shared by all layers of a forward pass.
    """

    def __init__(self, cuts: list[list[int]], numbers: Tensor, answers: Tensor, positions: Tensor, longest: int):
        self.cuts = cuts  # per block: the start of its prompt, the end of its prompt, the end of each answer
        self.spans = [(cut[0], cut[-1]) for cut in cuts]  # stream slice of each block
        self.numbers = numbers  # (N,) int64, the number of the token's block
        self.answers = answers  # (N,) int64: 0 = the block's prompt, k = its k-th answer
        self.positions = positions  # (N,) int64
        self.longest = longest  # length of the longest row
        self.masks: dict = {}

    def to(self, device) -> "Blocks":
        numbers, answers, positions = (send(x, device) for x in (self.numbers, self.answers, self.positions))
        return Blocks(self.cuts, numbers, answers, positions, self.longest)

    def chunks(self) -> Chunks:
        """The stream in chunks, for layers that are a recurrence."""
        if "chunks" not in self.masks:
            self.masks["chunks"] = Chunks(self.cuts, self.answers.device)
        return self.masks["chunks"]

    def allowed(self, q: Tensor, k: Tensor, window: int | None) -> Tensor:
        """bool: may stream index q attend to k, both in one block? Both implementations evaluate this definition."""
        answer = self.answers[k]
        seen = (q >= k) & ((answer == 0) | (answer == self.answers[q]))
        if window is not None:
            seen = seen & (self.positions[q] - self.positions[k] < window)
        return seen

    def bias(self, start: int, low: int, high: int, groups: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """(1, (high - low) * groups, high - start): 0 where queries [low, high) may attend to keys [start, high).

        It is -inf elsewhere. Each row is repeated for the query heads of a group.
        """
        key = (low, groups, window, dtype)
        if key not in self.masks:
            index = torch.arange(start, high, device=self.answers.device)
            seen = self.allowed(index[low - start :, None], index[None, :], window).repeat_interleave(groups, 0)
            self.masks[key] = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)[
                None
            ]
        return self.masks[key]

    def block_mask(self, window: int | None) -> BlockMask:
        """The same mask for flex_attention: for each tile of queries, the tiles of keys that it needs.

        It is computed from the bounds of the blocks, so no (N, N) mask is stored. `allowed` decides inside a tile.
        """
        if window in self.masks:
            return self.masks[window]
        size, device, block = len(self.answers), self.answers.device, self.numbers
        first = block[::TILE]  # (tiles,) block of each tile's first token
        last = torch.cat((block[TILE - 1 :: TILE], block[-1:]))[: len(first)]  # (tiles,) block of its last token
        tile = torch.arange(len(first), device=device)
        visit = (tile[None, :] <= tile[:, None]) & (last[None, :] >= first[:, None])  # (query tiles, key tiles)
        counts = visit.sum(1, dtype=torch.int32)
        order = visit.int().argsort(dim=1, descending=True, stable=True).int()  # the tiles to visit come first

        def mask_mod(b, h, q, k):
            return (block[q] == block[k]) & self.allowed(q, k, window)

        self.masks[window] = BlockMask.from_kv_blocks(
            counts[None, None], order[None, None], BLOCK_SIZE=TILE, mask_mod=mask_mod, seq_lengths=(size, size)
        )
        if self.answers.is_cuda:
            mark_dynamic(self.masks[window])
        return self.masks[window]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """(N, H, Dh) attention of q (N, H, Dh) over k, v (N, K, Dh), under the mask of `blocks`.

    softcap: scores become softcap tanh(score / softcap) (Gemma 2). sinks: (H,) an extra score of each head, which takes
    part in the softmax and has no value vector (GPT-OSS).
    """
    if q.is_cuda and q.shape[-1] >= SMALLEST_HEAD:
        return attend_flex(q, k, v, blocks, window, softcap, sinks)
    if softcap is None and sinks is None:
        return attend_blocks(q, k, v, blocks, window)
    return attend_plain(q, k, v, blocks, window, softcap, sinks)


def attend_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One call of flex_attention over the whole stream: compiled on CUDA, eager and dense elsewhere (for tests)."""
    q, k, v = (rearrange(x, "n h d -> 1 h n d") for x in (q, k, v))
    run = compiled_flex() if q.is_cuda else flex_attention
    how = {"block_mask": blocks.block_mask(window), "enable_gqa": q.shape[1] != k.shape[1]}
    if softcap is not None:
        how["score_mod"] = lambda score, b, h, i, j: softcap * torch.tanh(score / softcap)
    if sinks is None:
        return rearrange(run(q, k, v, **how), "1 h n d -> n h d")
    out, aux = run(q, k, v, **how, return_aux=AuxRequest(lse=True))
    out = out * torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[:, None])[..., None].to(out.dtype)
    return rearrange(out, "1 h n d -> n h d")


def compiled_flex(**settings):
    """flex_attention under torch.compile, which compiles it at the first call on a GPU.

    fullgraph=True: past RECOMPILE_LIMIT variants (gradients or not, windows, heads) torch raises. Otherwise it would go
    on with the eager definition, which lays out the whole (N, N) mask.
    """
    global _compiled
    if _compiled is None:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        _compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True, **settings)
    return _compiled


def mark_dynamic(mask: BlockMask) -> None:
    """One compilation serves any number of tiles above one: dynamic=True does not reach a mask's tensors."""
    for tensor in vars(mask).values():
        if isinstance(tensor, Tensor):
            for dim in (dim for dim, size in enumerate(tensor.shape) if size > 1):
                torch._dynamo.maybe_mark_dynamic(tensor, dim)


_compiled = None


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, window: int | None) -> Tensor:
    """Attention block by block with plain matmuls. On CPUs in bf16 it was faster than flash attention."""
    return BlockAttention.apply(q, k, v, blocks, window)


def attend_plain(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The tiles of BlockAttention with a softcap or sinks, differentiated by autograd."""
    K, groups, scale, outs = k.shape[1], q.shape[1] // k.shape[1], q.shape[-1] ** -0.5, []
    q, k, v = _by_head(q, K), _by_head(k, K), _by_head(v, K)
    for start, low, high in tiles(blocks.spans):
        bias = blocks.bias(start, low, high, groups, window, q.dtype)
        scores = q[:, low * groups : high * groups] @ k[:, start:high].transpose(1, 2) * scale
        weights = probabilities(scores, bias, softcap, None if sinks is None else sinks.view(K, 1, groups))
        outs.append(weights @ v[:, start:high])
    return _by_token(torch.cat(outs, dim=1), groups)


def probabilities(scores: Tensor, bias: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Softmax of scores (K, queries x G, keys) after softcap and mask. sinks (K, 1, G) are part of the denominator."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.to(scores.dtype).expand(-1, scores.shape[1] // sinks.shape[2], -1).reshape(len(scores), -1, 1)
    return torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1]


class BlockAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(Dh) + mask) v in tiles: CHUNK queries of a block, and all keys up to the last of them.

    Queries are stored as (kv heads, tokens x group, head width), so that a tile is a view and no key is repeated.
    The forward pass keeps the probabilities P. With dP = dO v^T:   dS = P (dP - rowsum(P dP)),
    dq = dS k / sqrt(Dh),   dk = dS^T q / sqrt(Dh),   dv = P^T dO.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, window: int | None) -> Tensor:
        groups, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
        q, k, v = _by_head(q, k.shape[1]), _by_head(k, k.shape[1]), _by_head(v, v.shape[1])
        out, kept = torch.empty_like(q), []
        for start, low, high in tiles(blocks.spans):
            bias, rows = blocks.bias(start, low, high, groups, window, q.dtype), slice(low * groups, high * groups)
            scores = torch.baddbmm(bias, q[:, rows], k[:, start:high].transpose(1, 2), alpha=scale)
            kept.append(scores.softmax(-1))  # (K, queries * G, keys)
            torch.bmm(kept[-1], v[:, start:high], out=out[:, rows])
        ctx.save_for_backward(q, k, v, *kept)
        ctx.spans, ctx.groups, ctx.scale = blocks.spans, groups, scale
        return _by_token(out, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, *kept = ctx.saved_tensors
        groups, scale, grad = ctx.groups, ctx.scale, _by_head(grad, k.shape[0])
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (start, low, high), weights in zip(tiles(ctx.spans), kept, strict=True):
            keys, rows = slice(start, high), slice(low * groups, high * groups)
            grad_v[:, keys].baddbmm_(weights.transpose(1, 2), grad[:, rows])
            scores = grad[:, rows] @ v[:, keys].transpose(1, 2)
            scores = torch._softmax_backward_data(scores, weights, -1, scores.dtype)
            torch.baddbmm(grad_q[:, rows], scores, k[:, keys], beta=0, alpha=scale, out=grad_q[:, rows])
            grad_k[:, keys].baddbmm_(scores.transpose(1, 2), q[:, rows], alpha=scale)
        return _by_token(grad_q, groups), _by_token(grad_k, 1), _by_token(grad_v, 1), None, None


def tiles(spans: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(start of the block, first query, end of queries and keys) of every tile."""
    return [(start, low, min(low + CHUNK, stop)) for start, stop in spans for low in range(start, stop, CHUNK)]


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    return rearrange(x, "n (k g) d -> k (n g) d", k=kv_heads).contiguous()


def _by_token(x: Tensor, groups: int) -> Tensor:
    return rearrange(x, "k (n g) d -> n (k g) d", g=groups)
