"""Attention over a packed stream: which token sees which, and the two ways to compute it."""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

CHUNK = 256  # queries of one product: a longer block is cut, so that little is computed above the diagonal
TILE = 128  # flex_attention skips or visits squares of this many tokens


class Blocks:
    """Who attends to whom in a stream of N tokens: causal, within one block, an answer never to another answer.

    Masks are made once and shared by all layers of a forward.
    """

    def __init__(self, spans: list[tuple[int, int]], answers: Tensor, positions: Tensor, longest: int):
        self.spans = spans  # stream slice of each block
        self.answers = answers  # (N,) int64: 0 = the block's prompt, k = its k-th answer
        self.positions = positions  # (N,) int64
        self.longest = longest  # tokens of the longest row
        self.masks = {}

    def allowed(self, q: Tensor, k: Tensor, window: int | None) -> Tensor:
        """bool: may stream index q see k, both in one block? The one definition that both backends evaluate."""
        answer = self.answers[k]
        seen = (q >= k) & ((answer == 0) | (answer == self.answers[q]))
        if window is not None:
            seen = seen & (self.positions[q] - self.positions[k] < window)
        return seen

    def bias(self, start: int, low: int, high: int, groups: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """(1, (high - low) * groups, high - start): 0 where queries [low, high) may look in [start, high), else -inf.

        Each row stands there once per query head of a group.
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
        """The same mask for flex_attention: for each tile of queries, the tiles of keys that it must visit.

        Made from the blocks' bounds, so that no (N, N) mask is ever laid out; inside a tile `allowed` decides.
        """
        if window in self.masks:
            return self.masks[window]
        size, device = len(self.answers), self.answers.device
        sizes = torch.tensor([stop - start for start, stop in self.spans], device=device)
        block = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes, output_size=size)  # (N,)
        first = block[::TILE]  # (tiles,) block of each tile's first token
        last = torch.cat((block[TILE - 1 :: TILE], block[-1:]))[: len(first)]  # and of its last one
        tile = torch.arange(len(first), device=device)
        visit = (tile[None, :] <= tile[:, None]) & (last[None, :] >= first[:, None])  # (query tiles, key tiles)
        counts = visit.sum(1, dtype=torch.int32)
        order = visit.int().argsort(dim=1, descending=True, stable=True).int()  # the tiles to visit come first

        def mask_mod(b, h, q, k):
            return (block[q] == block[k]) & self.allowed(q, k, window)

        self.masks[window] = BlockMask.from_kv_blocks(
            counts[None, None], order[None, None], BLOCK_SIZE=TILE, mask_mod=mask_mod, seq_lengths=(size, size)
        )
        return self.masks[window]


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, window: int | None) -> Tensor:
    """(N, H, Dh) attention of q (N, H, Dh) over k, v (N, K, Dh), each token seeing what `blocks` allows."""
    run = attend_flex if q.is_cuda else attend_blocks
    return run(q, k, v, blocks, window)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, window: int | None) -> Tensor:
    """One call over the whole stream; compiled on CUDA, eager (dense, for tests) elsewhere."""
    q, k, v = (rearrange(x, "n h d -> 1 h n d") for x in (q, k, v))
    run = compiled_flex() if q.is_cuda else flex_attention
    out = run(q, k, v, block_mask=blocks.block_mask(window), enable_gqa=q.shape[1] != k.shape[1])
    return rearrange(out, "1 h n d -> n h d")


def compiled_flex():
    global _compiled
    if _compiled is None:
        _compiled = torch.compile(flex_attention, dynamic=True)
    return _compiled


_compiled = None


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, window: int | None) -> Tensor:
    """Masked batches of products, written out: on a CPU in bf16 faster than flash attention at every length tried.

    Queries are laid out as (kv heads, tokens x group, head width), so that a block is a view and no key is repeated.
    """
    groups, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    q = rearrange(q, "n (k g) d -> k (n g) d", g=groups).contiguous()
    k, v = (rearrange(x, "n k d -> k n d").contiguous() for x in (k, v))
    sizes = [stop - start for start, stop in blocks.spans]
    tiles = [[(low, min(low + CHUNK, stop)) for low in range(start, stop, CHUNK)] for start, stop in blocks.spans]
    queries = iter(q.split([(high - low) * groups for block in tiles for low, high in block], 1))
    outs = []
    for block, keys, values in zip(tiles, k.split(sizes, 1), v.split(sizes, 1), strict=True):
        start = block[0][0]
        for low, high in block:
            bias = blocks.bias(start, low, high, groups, window, q.dtype)
            past = keys[:, : high - start].transpose(1, 2)  # (K, Dh, keys up to here)
            scores = torch.baddbmm(bias, next(queries), past, alpha=scale)  # (K, queries * G, keys)
            outs.append(scores.softmax(-1) @ values[:, : high - start])
    return rearrange(torch.cat(outs, 1), "k (n g) d -> n (k g) d", g=groups)
