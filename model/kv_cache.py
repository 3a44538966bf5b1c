"""Keys and values of the rows being decoded: one static allocation, every row with a length of its own."""

import torch
from einops import rearrange
from torch import Tensor

from model.attention import Blocks, attend
from model.config import ModelConfig

STRIDE = 32  # attention reads lengths rounded up to this: few distinct shapes, so libraries reuse their plans


class KVCache:
    """Room for `slots` rows of `length` tokens. Row i of a decoding batch lives in slot i."""

    def __init__(self, config: ModelConfig, *, slots: int, length: int, dtype: torch.dtype, device: torch.device):
        length = -(-length // STRIDE) * STRIDE
        shape = (config.num_layers, slots, config.num_kv_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # zeros: masked scores must be finite
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = length

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of slot `source` into slot `target`."""
        for store in (self.keys, self.values):
            store[:, target, :, :tokens] = store[:, source, :, :tokens]

    def prefill(self, slots: list[list[int]]) -> "Prefill":
        """A cache for one forward over a packed stream of prompts: block i is written into all of slots[i]."""
        return Prefill(self, slots)

    def decode(self, positions: Tensor, longest: int) -> "Decode":
        """A cache for one forward over one token a row; positions (B,) are where these tokens stand in their rows."""
        return Decode(self, positions, longest)


class Prefill:
    def __init__(self, cache: KVCache, slots: list[list[int]]):
        self.cache, self.slots = cache, slots

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, window: int | None) -> Tensor:
        for (start, stop), slots in zip(blocks.spans, self.slots, strict=True):
            for slot in slots:
                self.cache.keys[layer, slot, :, : stop - start] = rearrange(k[start:stop], "n k d -> k n d")
                self.cache.values[layer, slot, :, : stop - start] = rearrange(v[start:stop], "n k d -> k n d")
        return attend(q, k, v, blocks, window)


class Decode:
    def __init__(self, cache: KVCache, positions: Tensor, longest: int):
        self.cache, self.positions = cache, positions
        self.rows = torch.arange(len(positions), device=positions.device)
        self.read = min(-(-longest // STRIDE) * STRIDE, cache.length)  # how many columns hold anything yet
        self.masks = {}  # window -> (B, 1, 1, read), the same for every layer

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, blocks: None, window: int | None) -> Tensor:
        """(B, H, Dh): each row's one query over its own keys, its own included."""
        B, K = k.shape[:2]
        keys, values = self.cache.keys[layer, :B], self.cache.values[layer, :B]  # (B, K, T, Dh)
        keys[self.rows, :, self.positions], values[self.rows, :, self.positions] = k, v
        keys, values = keys[:, :, : self.read], values[:, :, : self.read]
        queries = q.unflatten(1, (K, -1)) * q.shape[-1] ** -0.5  # (B, K, G, Dh)
        scores = queries @ keys.transpose(2, 3) + self.bias(window, q.dtype)  # (B, K, G, read)
        return (scores.softmax(-1) @ values).flatten(1, 2)

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        if window not in self.masks:
            columns, now = torch.arange(self.read, device=self.positions.device), self.positions[:, None]
            hidden = (columns > now) | (columns <= now - window if window else False)  # (B, read)
            self.masks[window] = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
                hidden, -torch.inf
            )[:, None, None]
        return self.masks[window]
