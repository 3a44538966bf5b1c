"""The KV cache for decoding: one static allocation, in which every row has its own length.

Attention caches keys and values of every token. A gated DeltaNet caches one state, and the last inputs of its
convolution.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from model.attention import Blocks, attend, probabilities
from model.config import ModelConfig
from model.gated_delta import convolve_stream, gated_delta, gated_delta_step

STRIDE = 32  # attention reads lengths rounded up to a multiple of this: few shapes, so libraries reuse their plans
PIECE = 8  # rows of one attention call while decoding; a piece reads up to the length of its longest row


class KVCache:
    """A cache for `slots` rows of up to `length` tokens. Row i of the decoding batch uses slot i."""

    def __init__(self, config: ModelConfig, *, slots: int, length: int, dtype: torch.dtype, device: torch.device):
        length = -(-length // STRIDE) * STRIDE
        kinds = [config.kind(layer) for layer in range(config.num_layers)]
        linear = kinds.count("linear")
        # for each layer, its index among the layers of the same kind
        self.places = [sum((kind == "linear") == (k == "linear") for k in kinds[:i]) for i, kind in enumerate(kinds)]
        shape = (len(kinds) - linear, slots, 2 * config.num_kv_heads, length, config.head_dim)  # keys, then values
        self.store = torch.zeros(shape, dtype=dtype, device=device)  # zeros, because masked scores must be finite
        key, value, heads = config.linear_key_dim, config.linear_value_dim, config.linear_value_heads
        wide = torch.promote_types(dtype, torch.float32)
        self.states = torch.zeros(linear, slots, heads, key, value, dtype=wide, device=device)
        mixed = 2 * config.linear_key_heads * key + heads * value
        self.inputs = torch.zeros(linear, slots, mixed, max(0, config.conv_size - 1), dtype=dtype, device=device)
        self.length = length

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache."""
        return self.store.nbytes + self.states.nbytes + self.inputs.nbytes

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of slot `source` into slot `target`."""
        self.store[:, target, :, :tokens] = self.store[:, source, :, :tokens]
        self.states[:, target] = self.states[:, source]
        self.inputs[:, target] = self.inputs[:, source]

    def prefill(self, slots: list[list[int]]) -> "Prefill":
        """The cache argument for one forward of packed prompts. Block i is written into all slots in slots[i]."""
        return Prefill(self, slots)

    def decode(self, positions: Tensor, pieces: list[tuple[slice, int]]) -> "Decode":
        """The cache argument for one forward of one token per row.

        positions: (B,) of the tokens in their rows. pieces: the rows of each attention call, and how many tokens it
        reads.
        """
        return Decode(self, positions, pieces)

    def pieces(self, lengths: list[int]) -> list[tuple[slice, int]]:
        """(rows, tokens read) for PIECE rows at a time. It reads the longest of their lengths, rounded up."""
        pieces = []
        for start in range(0, len(lengths), PIECE):
            piece = lengths[start : start + PIECE]
            read = min(-(-max(piece) // STRIDE) * STRIDE, self.length)
            pieces.append((slice(start, start + len(piece)), read))
        return pieces


class Prefill:
    """The cache during one forward of whole prompts: it stores keys and values, and attends within the prompts."""

    def __init__(self, cache: KVCache, slots: list[list[int]]):
        self.cache, self.slots = cache, slots

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *how) -> Tensor:
        """(N, H, Dh) attention within the stream. It writes each block's keys and values into its slots."""
        both = rearrange(torch.cat((k, v), dim=1), "n k d -> k n d")
        for (start, stop), slots in zip(blocks.spans, self.slots, strict=True):
            for slot in slots:
                self.cache.store[self.cache.places[layer], slot, :, : stop - start] = both[:, start:stop]
        return attend(q, k, v, blocks, *how)

    def convolve(self, layer: int, x: Tensor, weight: Tensor, blocks: Blocks) -> Tensor:
        """(N, C) convolution of x (N, C) within each block. It writes each block's last inputs into its slots."""
        inputs = self.cache.inputs[self.cache.places[layer]]  # (slots, C, K - 1)
        for (start, stop), slots in zip(blocks.spans, self.slots, strict=True):
            newest = x[max(start, stop - inputs.shape[-1]) : stop].t()
            inputs[slots] = F.pad(newest, (inputs.shape[-1] - newest.shape[1], 0))
        return convolve_stream(layer, x, weight, blocks)

    def recur(self, layer: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, blocks: Blocks) -> Tensor:
        """(N, Hv, Dv) outputs of the recurrence within each block. It writes each block's last state into its slots."""
        out, states = gated_delta(q, k, v, g, beta, blocks.chunks())
        for (level, place), slots in zip(blocks.chunks().ends, self.slots, strict=True):
            self.cache.states[self.cache.places[layer], slots] = states[level][place].flatten(0, 1)
        return out


class Decode:
    """The cache during one forward of one new token per row."""

    def __init__(self, cache: KVCache, positions: Tensor, pieces: list[tuple[slice, int]]):
        self.cache, self.positions, self.pieces = cache, positions, pieces
        self.rows = torch.arange(len(positions), device=positions.device)
        # window -> one (rows, 1, 1, read) mask per piece, the same for every layer
        self.masks: dict[int | None, list[Tensor]] = {}

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: None,
        window: int | None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """(B, H, Dh) attention of each row's query over the row's cached keys and its own key."""
        K, store = k.shape[1], self.cache.store[self.cache.places[layer]]  # (slots, 2K, T, Dh)
        store[self.rows, :, self.positions] = torch.cat((k, v), dim=1)
        queries, outs = q.unflatten(1, (K, -1)), []  # (B, K, G, Dh): the queries of a group share keys
        for (rows, read), bias in zip(self.pieces, self.biases(window, q.dtype), strict=True):
            keys, values = store[rows, :K, :read], store[rows, K:, :read]  # (rows, K, read, Dh)
            if softcap is None and sinks is None:
                outs.append(F.scaled_dot_product_attention(queries[rows], keys, values, attn_mask=bias))
                continue
            scores = queries[rows] @ keys.transpose(2, 3) * q.shape[-1] ** -0.5  # (rows, K, G, read)
            heads = None if sinks is None else sinks.view(1, 1, -1).expand(len(scores), 1, -1)
            weights = probabilities(scores.flatten(1, 2), bias.squeeze(1), softcap, heads)
            outs.append(weights.view_as(scores) @ values)
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(1, 2)

    def convolve(self, layer: int, x: Tensor, weight: Tensor, blocks: None) -> Tensor:
        """(B, C), float32 or wider: the convolution at each row's new token x (B, C)."""
        inputs = self.cache.inputs[self.cache.places[layer], : len(x)]  # (B, C, K - 1)
        window = torch.cat((inputs, x[..., None]), dim=-1)
        inputs.copy_(window[..., 1:])
        return (window * weight.to(torch.promote_types(x.dtype, torch.float32)).squeeze(1)).sum(-1)

    def recur(self, layer: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, blocks: None) -> Tensor:
        """(B, Hv, Dv) output of the recurrence at each row's new token."""
        state = self.cache.states[self.cache.places[layer], : len(q)]
        out, after = gated_delta_step(state, q, k, v, g, beta)
        state.copy_(after)
        return out

    def biases(self, window: int | None, dtype: torch.dtype) -> list[Tensor]:
        """One (rows, 1, 1, read) bias per piece: 0 where the query may attend to the key, -inf elsewhere."""
        if window not in self.masks:
            self.masks[window] = [self.bias(rows, read, window, dtype) for rows, read in self.pieces]
        return self.masks[window]

    def bias(self, rows: slice, read: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """(rows, 1, 1, read) bias: 0 at a row's own tokens, within the window if there is one; -inf elsewhere."""
        columns, now = torch.arange(read, device=self.positions.device), self.positions[rows, None]
        hidden = (columns > now) | (columns <= now - window if window else False)
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)[
            :, None, None
        ]
