"""The Llama family by hand: a packed stream of tokens -> hidden states. No head, no loss, no padding."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.attention import Blocks, attend
from model.config import ModelConfig
from model.functions import CastLinear, rms_norm, rotate, swiglu
from runtime.distributed import whole


class Linear(nn.Linear):
    """A linear layer on (N, in) that multiplies in its input's dtype: fp32 master weights, bf16 products."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool):
        super().__init__(in_features, out_features, bias=bias)
        self.prepared = None  # while sampling: a function of x that holds the weight as decoding wants it
        self.lora = None  # a thin product that learns beside a frozen weight (model/lora.py)

    def forward(self, x: Tensor, adapted: bool = True) -> Tensor:
        if self.prepared is not None:
            return self.prepared(x)
        same = self.weight.dtype == x.dtype
        y = F.linear(x, self.weight, self.bias) if same else CastLinear.apply(x, self.weight, self.bias)
        return y + self.lora(x) if adapted and self.lora is not None else y

    def merged(self, adapted: bool = True) -> Tensor:
        """(out, in) the weight with its adapter in it, where it has one."""
        if self.lora is None or not adapted:
            return self.weight.detach()
        return (whole(self.weight.detach()).float() + self.lora.delta().detach()).to(self.weight.dtype)

    def prepare(self, dtype: torch.dtype, batch: int, adapted: bool) -> None:
        """Cast the weight once instead of at every token. On a CPU in bf16 also put it into oneDNN's own order for
        `batch` rows: a decoding step is bound by reading weights, and these products then run 1.2-2 times faster."""
        weight = self.merged(adapted).to(dtype)
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        if dtype == torch.bfloat16 and weight.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, batch)
            self.prepared = lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        else:
            self.prepared = lambda x: F.linear(x, weight, bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in x's dtype, returned in `dtype`. Zhang & Sennrich 2019 (arXiv:1910.07467), Eq. 4."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return rms_norm(x, self.weight, self.eps, dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; q, k and v come out of one product."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.window = layer, config.sliding_window
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.out = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], blocks: Blocks, cache, adapted: bool, picks: Tensor | None
    ) -> Tensor:
        H, K = self.num_heads, self.num_kv_heads
        q, k, v = self.qkv(x, adapted).unflatten(-1, (-1, self.head_dim)).split((H, K, K), dim=1)  # (N, H | K | K, Dh)
        if self.q_norm is not None:
            q, k = self.q_norm(q, q.dtype), self.k_norm(k, k.dtype)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is None:
            mixed = attend(q, k, v, blocks, self.window)  # (N, H, Dh)
        else:
            mixed = cache.attend(self.layer, q, k, v, blocks, self.window)  # (N, H, Dh)
        return self.out((mixed if picks is None else mixed[picks]).flatten(1), adapted)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x), gate and up from one product. Shazeer 2020 (arXiv:2002.05202), Eq. 6."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, adapted: bool) -> Tensor:
        return self.down(swiglu(self.gate_up(x, adapted)), adapted)


class Layer(nn.Module):
    """Attention and MLP, each on a normed input and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = 0.0  # residual dropout, set by Transformer.regularise

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], blocks: Blocks, cache, adapted: bool, picks: Tensor | None
    ) -> Tensor:
        noisy, dtype = self.training and torch.is_grad_enabled(), rope[0].dtype
        mixed = self.attention(self.attention_norm(x, dtype), rope, blocks, cache, adapted, picks)
        x = (x if picks is None else x[picks]) + F.dropout(mixed, self.dropout, noisy)
        return x + F.dropout(self.mlp(self.mlp_norm(x, dtype), adapted), self.dropout, noisy)


class Transformer(nn.Module):
    """Decoder stack on a packed stream.

    `compute_dtype` is the dtype of products; None means the weights' own. The residual stream x is float32 at least:
    with a bfloat16 one, log-probs are a sixth and gradients a quarter further from float32's.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype | None = None):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.checkpointing = False  # recompute each layer in the backward pass: less memory, a third more time
        self.neftune_alpha = 0.0
        # Plain tensor, not a buffer: a model moved to bf16 must keep its frequencies exact.
        self.frequencies, self.rope_gain = rope_frequencies(config)

    def forward(
        self, tokens: Tensor, positions: Tensor, blocks: Blocks | None, cache=None, adapted: bool = True,
        picks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(N, D) hidden states, after the last norm, of N tokens, in the dtype of products; (M, D) where picked.

        Args:
            tokens, positions: (N,) int64.
            blocks: who attends to whom (`pack` makes it).
            cache: None, or an object whose `attend(layer, q, k, v, blocks, window)` keeps k and v (N, K, Dh) of each
                layer and returns attention's output (N, H, Dh); `blocks` goes to it untouched, None while decoding.
            adapted: with LoRA's part where there is one. An argument, as a layer that is recomputed must see the same.
            picks: (M,) int64, the tokens whose hidden states are wanted: after its attention, the last layer computes
                no others.
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
        if self.neftune_alpha and self.training and torch.is_grad_enabled():
            x = x + neftune_noise(x, blocks, self.neftune_alpha)
        rope = self.rope(positions, dtype)
        for layer in self.layers:
            given = (x, rope, blocks, cache, adapted, picks if layer is self.layers[-1] else None)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *given, use_reentrant=False)
            else:
                x = layer(*given)
        return self.norm(x, dtype)

    def rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin as `rotate` wants them; angles in float32, as positions exceed bf16's whole numbers at 256."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        angles = (positions[:, None].float() * self.frequencies)[:, None]  # (N, 1, Dh / 2)
        cos, sin = angles.cos() * self.rope_gain, angles.sin() * self.rope_gain
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)

    def regularise(self, *, residual_dropout: tuple[float, float], neftune_alpha: float) -> None:
        """Noise for SFT, only where gradients are: dropout, linear from the first to the last layer, and NEFTune."""
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

    L is the token's own block length, without padding: the noise of a row does not depend on its batch.
    """
    sizes = torch.tensor([stop - start for start, stop in blocks.spans], device=x.device)
    scale = alpha / (sizes.float() * x.shape[1]).sqrt()  # one per block
    return torch.empty_like(x).uniform_(-1, 1) * scale.repeat_interleave(sizes)[:, None].to(x.dtype)


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """(Dh / 2,) float32 radians per position, and the factor on cos and sin (YaRN's attention temperature)."""
    exponents = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"], 1.0
    if scaling["rope_type"] == "llama3":
        return llama3_frequencies(frequencies, scaling), 1.0
    return yarn_frequencies(frequencies, config), yarn_gain(scaling)


def llama3_frequencies(frequencies: Tensor, scaling: dict) -> Tensor:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, a linear blend between."""
    turns = (
        scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    )  # full turns within the old window
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / scaling["factor"] + keep * frequencies


def yarn_frequencies(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """YaRN, Peng et al. 2023 (arXiv:2309.00071), section 3.2: blend by the number of turns within the old window."""
    scaling = config.rope_scaling

    def dimension(turns: float) -> float:  # the (real-valued) pair index that makes `turns` turns
        old = scaling["original_max_position_embeddings"]
        return config.head_dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    pairs = torch.arange(config.head_dim // 2, device="cpu").float()
    stretch = ((pairs - low) / (max(high - low, 0.001))).clamp(0, 1)
    return stretch * frequencies / scaling["factor"] + (1 - stretch) * frequencies


def yarn_gain(scaling: dict) -> float:
    """The factor on cos and sin that makes attention sharper on stretched windows: 0.1 ln(factor) + 1."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return temperature(scaling["mscale"]) / temperature(scaling["mscale_all_dim"])
    return temperature(1.0)
