"""The transformer: from a packed stream of tokens to hidden states. It has no head, no loss and no padding.

The differences between a family and Llama are listed in model/families.py and read here.
"""

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.attention import Blocks, attend
from model.config import ModelConfig
from model.experts import Experts
from model.functions import add_rms_norm, fused, fused_heads, geglu, rms_norm, rotate, swiglu
from model.gated_delta import GatedDeltaNet
from model.linear import Linear
from model.offload import on_host
from model.recompute import recomputed
from model.rope import Rope
from runtime.devices import send


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight), returned in `dtype`. Zhang & Sennrich 2019 (arXiv:1910.07467), Eq. 4."""

    def __init__(self, size: int, config: ModelConfig):
        super().__init__()
        self.eps, self.offset = config.norm_eps, config.facts.norm_offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - self.offset))

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return rms_norm(x, self.weight, self.eps, dtype, self.offset)

    def add(self, x: Tensor, delta: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(x + delta, its norm): the residual stream, and the input of the next sublayer. delta=None adds nothing."""
        return add_rms_norm(x, delta, self.weight, self.eps, dtype, self.offset)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with mean and bias (GPT-NeoX), computed in float32 or wider, returned in `dtype`."""

    def __init__(self, size: int, config: ModelConfig):
        super().__init__(size, eps=config.norm_eps)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(dtype)

    def add(self, x: Tensor, delta: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See RMSNorm.add."""
        x = x if delta is None else x + delta
        return x, self(x, dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions. One matmul computes q, k and v."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.window = layer, config.sliding_window if config.kind(layer) == "window" else None
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        queries, keys, facts = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, config.facts
        self.gated = facts.gated_attention  # a gate on each head's output, computed with its query
        parts = ((1 + self.gated) * queries, keys, keys)
        self.qkv = Linear(
            config.hidden_size, sum(parts), bias=config.qkv_bias, parts=None if facts.fused_by_head else parts
        )
        self.out = Linear(queries, config.hidden_size, bias=config.qkv_bias and not facts.always_qkv_bias)
        self.fused_by_head = facts.fused_by_head  # q, k and v of a head are neighbours
        self.wide_norm, normed = facts.qk_norm == "width", facts.qk_norm is not None
        self.q_norm = RMSNorm(queries if self.wide_norm else self.head_dim, config) if normed else None
        self.k_norm = RMSNorm(keys if self.wide_norm else self.head_dim, config) if normed else None
        self.turned = config.rotary_dim if config.turns(layer) else 0  # numbers of each head
        self.q_scale = 1.0 if config.attention_scale is None else config.attention_scale * self.head_dim**0.5
        self.softcap = config.attention_softcap
        self.sinks = nn.Parameter(torch.zeros(self.num_heads)) if facts.sinks else None  # (H,) extra scores

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], blocks: Blocks, cache, adapted: bool, picks: Tensor | None
    ) -> Tensor:
        qkv = self.qkv(x, adapted)
        if self.gated:
            qkv, gate = self.without_gate(qkv)
        q, k, v = self.heads(qkv, rope)  # (N, H | K | K, Dh)
        if self.q_scale != 1:
            q = q * self.q_scale
        extras = () if self.softcap is None and self.sinks is None else (self.softcap, self.sinks)
        run = attend if cache is None else partial(cache.attend, self.layer)
        mixed = run(q, k, v, blocks, self.window, *extras)  # (N, H, Dh)
        if self.gated:
            mixed = mixed * gate.sigmoid()
        return self.out((mixed if picks is None else mixed[picks]).flatten(1), adapted)

    def without_gate(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """(N, (H + 2K) Dh) queries, keys and values, and (N, H, Dh) gates, which follow each head's query in qkv."""
        queries, rest = qkv.tensor_split((2 * self.num_heads * self.head_dim,), dim=-1)
        q, gate = queries.unflatten(-1, (self.num_heads, 2, self.head_dim)).unbind(2)
        return torch.cat((q.flatten(1), rest), dim=-1), gate

    def heads(self, qkv: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q (N, H, Dh), k and v (N, K, Dh) from the matmul's output. q and k are normed, then rotated."""
        H, K = self.num_heads, self.num_kv_heads
        if fused(qkv) and self.turned and not self.wide_norm and not self.fused_by_head:
            weights = (None, None) if self.q_norm is None else (self.q_norm.weight, self.k_norm.weight)
            eps, offset = (0.0, 0.0) if self.q_norm is None else (self.q_norm.eps, self.q_norm.offset)
            return fused_heads(qkv, *rope, *weights, eps, offset, H, K)
        qkv = qkv.unflatten(-1, (-1, self.head_dim))  # (N, H + 2K, Dh)
        q, k, v = qkv.unflatten(1, (H, 3)).unbind(2) if self.fused_by_head else qkv.split((H, K, K), dim=1)
        if self.q_norm is not None:
            q, k = self.normed(self.q_norm, q), self.normed(self.k_norm, k)
        return self.rotated(q, rope), self.rotated(k, rope), v

    def normed(self, norm: RMSNorm, x: Tensor) -> Tensor:
        """Queries or keys (N, heads, Dh), normed per head or over all heads."""
        return norm(x.flatten(1), x.dtype).view(x.shape) if self.wide_norm else norm(x, x.dtype)

    def rotated(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x (N, heads, Dh) with the first `turned` dimensions of each head rotated by the token's position."""
        if self.turned == self.head_dim:
            return rotate(x, *rope)
        if not self.turned:
            return x
        return torch.cat((rotate(x[..., : self.turned], *rope), x[..., self.turned :]), dim=-1)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x). Shazeer 2020 (arXiv:2002.05202), Eq. 6. One matmul computes gate and up.

    Gemma uses the tanh approximation of GELU (GeGLU). GPT-NeoX has no gate: down(gelu(up x)).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.selective = False  # set by Transformer.checkpointing
        inner = config.dense_size or config.intermediate_size  # between layers with experts it has its own width
        self.gated = {"silu": swiglu, "gelu_pytorch_tanh": geglu, "gelu": F.gelu}[config.facts.activation]
        widths = 1 if self.gated is F.gelu else 2
        parts = (inner,) * widths
        self.gate_up = Linear(config.hidden_size, sum(parts), bias=config.mlp_bias, parts=parts)
        self.down = Linear(inner, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, adapted: bool) -> Tensor:
        gate_up = self.gate_up(x, adapted)
        mixed = self.gated(gate_up)
        if self.selective:
            gate_up = gate_up.detach()
            recomputed(mixed, lambda: self.gated(gate_up))
        return self.down(mixed, adapted)


class Layer(nn.Module):
    """Attention and MLP, each added to the residual stream, with a norm before it, after it, or both."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        Norm = LayerNorm if config.facts.layer_norm else RMSNorm
        before, after = (config.facts.norms in (place, "both") for place in ("before", "after"))
        self.attention_norm = Norm(config.hidden_size, config) if before else None
        self.attention = (GatedDeltaNet if config.kind(layer) == "linear" else Attention)(config, layer)
        self.attention_out_norm = Norm(config.hidden_size, config) if after else None
        self.mlp_norm = Norm(config.hidden_size, config) if before else None
        self.mlp = (Experts if config.has_experts(layer) else MLP)(config)
        self.mlp_out_norm = Norm(config.hidden_size, config) if after else None
        self.kind, self.scale = config.kind(layer), config.residual_scale
        self.parallel = config.facts.parallel  # attention and MLP read the same input (GPT-NeoX)
        self.selective = False  # set by Transformer.checkpointing
        self.dropout = 0.0  # residual dropout, set by Transformer.regularise

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], blocks: Blocks, cache, adapted: bool, picks: Tensor | None
    ) -> Tensor:
        dtype = rope[0].dtype
        x, given = self.entering(self.attention_norm, x, None, dtype)
        mixed = self.leaving(self.attention_out_norm, self.attention(given, rope, blocks, cache, adapted, picks))
        x = x if picks is None else x[picks]
        if self.parallel:
            given, x = self.entering(self.mlp_norm, x, None, dtype)[1], x + mixed
        else:
            x, given = self.entering(self.mlp_norm, x, mixed, dtype)
        return x + self.leaving(self.mlp_out_norm, self.mlp(given, adapted))

    def entering(
        self, norm: RMSNorm | None, x: Tensor, delta: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The residual stream plus `delta`, and the input of a sublayer."""
        if norm is not None:
            x, given = norm.add(x, delta, dtype)
        else:
            x = x if delta is None else x + delta
            given = x.to(dtype)
        if self.selective and given is not x:
            stream = x.detach()
            recomputed(given, lambda: self.entering(norm, stream, None, dtype)[1])
        return x, given

    def leaving(self, norm: RMSNorm | None, y: Tensor) -> Tensor:
        """What a sublayer with output y adds to the residual stream."""
        y = y if norm is None else norm(y, torch.promote_types(y.dtype, torch.float32))
        if self.dropout:
            y = F.dropout(y, self.dropout, self.training and torch.is_grad_enabled())
        return y if self.scale == 1 else y * self.scale


class Transformer(nn.Module):
    """The decoder stack on a packed stream.

    `compute_dtype` is the dtype of matmuls. None means that of the weights. The residual stream is float32 or wider:
    with bfloat16, the errors against float32 were 1/6 larger in log-probs and 1/4 larger in gradients.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype | None = None):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_layers))
        self.norm = (LayerNorm if config.facts.layer_norm else RMSNorm)(config.hidden_size, config)
        self.checkpointing = False
        self.neftune_alpha = 0.0
        self.embed_scale = config.hidden_size**0.5 if config.facts.embed_by_width else config.embed_scale
        self.ropes = {"full": Rope(config), "window": Rope(config, of_windows=True)}
        self.one_rope = config.window_rope_theta is None  # all layers use the same angles

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        blocks: Blocks | None,
        cache=None,
        adapted: bool = True,
        picks: Tensor | None = None,
    ) -> Tensor:
        """(N, D) hidden states after the last norm, in the dtype of matmuls; (M, D) with `picks`.

        Args:
            tokens, positions: (N,) int64.
            blocks: the attention mask, made by `pack`.
            cache: None, or an object like those in model/kv_cache.py. Its `attend(layer, q, k, v, blocks, window, ...)`
                stores k and v (N, K, Dh) of each layer and returns attention's output (N, H, Dh). `blocks` is passed to
                it, and is None in decoding. For gated DeltaNets it has `convolve` and `recur`.
            adapted: whether LoRA adapters are used. It is an argument so that a recomputed layer gets the same value.
            picks: (M,) int64, the tokens whose hidden states are returned. After its attention, the last layer
                computes only these.
        Raises:
            ValueError: a row is longer than the model's window.
        """
        if blocks is not None and blocks.longest > self.config.max_length:
            raise ValueError(
                f"a row of {blocks.longest} tokens exceeds the model's window of {self.config.max_length}; "
                "lower data.max_length"
            )
        x = self.embed(tokens)  # (N, D)
        dtype = self.compute_dtype or x.dtype
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.embed_scale != 1:
            x = x * self.embed_scale
        if self.neftune_alpha and self.training and torch.is_grad_enabled():
            x = x + neftune_noise(x, blocks, self.neftune_alpha)
        rope = self.ropes["full"](positions, dtype)
        window_rope = rope if self.one_rope else self.ropes["window"](positions, dtype)
        for layer in self.layers:
            given = (
                x,
                window_rope if layer.kind == "window" else rope,
                blocks,
                cache,
                adapted,
                picks if layer is self.layers[-1] else None,
            )
            if self.checkpointing in (True, "offload") and torch.is_grad_enabled():
                with on_host() if self.checkpointing == "offload" else nullcontext():
                    x = checkpoint(layer, *given, use_reentrant=False)
            else:
                x = layer(*given)
        return self.norm.add(x, None, dtype)[1]

    @property
    def checkpointing(self) -> bool | str:
        """The recomputation in the backward pass. True: each layer; "offload": each layer, with its input in host
        memory; "selective": cheap operations (model/recompute.py); False: nothing."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, how: bool | str) -> None:
        self._checkpointing = how
        for layer in self.layers:
            layer.selective = layer.mlp.selective = how == "selective"

    def regularise(self, *, residual_dropout: tuple[float, float], neftune_alpha: float) -> None:
        """Set the noise of SFT, used only in training: NEFTune, and dropout with a rate linear in the layer index."""
        if len(residual_dropout) != 2:
            raise ValueError(f"residual_dropout={list(residual_dropout)} must be two rates: [first layer, last layer]")
        low, high = residual_dropout
        if not (0 <= low < 1 and 0 <= high < 1 and neftune_alpha >= 0):
            raise ValueError(f"want 0 <= dropout < 1 and neftune_alpha >= 0, got {residual_dropout=}, {neftune_alpha=}")
        for number, layer in enumerate(self.layers):
            layer.dropout = low + (high - low) * number / max(1, len(self.layers) - 1)
        self.neftune_alpha = neftune_alpha


def neftune_noise(x: Tensor, blocks: Blocks, alpha: float) -> Tensor:
    """(N, D) noise U(-1, 1) * alpha / sqrt(L * D). Jain et al. 2023 (arXiv:2310.05914), Algorithm 1.

    L is the length of the token's block, without padding, so the noise of a row does not depend on its batch.
    """
    sizes = send(torch.tensor([stop - start for start, stop in blocks.spans]), x.device)
    scale = alpha / (sizes.float() * x.shape[1]).sqrt()  # (blocks,)
    return torch.empty_like(x).uniform_(-1, 1) * scale[blocks.numbers][:, None].to(x.dtype)
