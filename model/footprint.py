"""The cost of a model before it is loaded: parameters, FLOPs, and the bytes that a forward keeps for its backward.

The kept bytes are counted on the real forward, which runs on torch's meta device. That device has shapes and no memory.
So there is no formula that could differ from the code.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import kernels_as
from model.attention import Blocks
from model.chunks import SIZE
from model.config import ModelConfig, resized
from model.gated_delta import GatedDeltaNet, convolve_stream, recur_stream
from model.linear import Linear
from model.lora import TARGETS
from model.transformer import Layer, Transformer


@dataclass(frozen=True)
class Footprint:
    """Parameter counts of a model of `config`. They are exact."""

    body: int  # parameters of the layers and norms
    embedding: int  # parameters of the embedding; an untied output matrix has as many
    output: int

    @property
    def ends(self) -> int:
        return self.embedding + self.output

    @property
    def total(self) -> int:
        return self.body + self.embedding + self.output


def layers_of(config: ModelConfig) -> list[tuple[Layer, int]]:
    """(a layer on the meta device, number of such layers) for each kind of layer, with experts and without."""
    kinds = [(config.kind(layer), config.has_experts(layer)) for layer in range(config.num_layers)]
    with torch.device("meta"):
        return [(Layer(config, kinds.index(kind)), count) for kind, count in Counter(kinds).items()]


def adapter_parameters(config: ModelConfig, rank: int) -> int:
    """Number of LoRA parameters with adapters on every linear layer that can have one."""
    return sum(
        count * rank * getattr(product, "count", 1) * (product.in_features + product.out_features)
        for layer, count in layers_of(config)
        for name, product in layer.named_modules()
        if isinstance(product, Linear) and name.rpartition(".")[2].removeprefix("shared_") in TARGETS
    )


def count_parameters(config: ModelConfig) -> Footprint:
    """The parameter counts of a model of this config."""
    layers = sum(count * sum(p.numel() for p in layer.parameters()) for layer, count in layers_of(config))
    table = config.vocab_size * config.hidden_size
    body = layers + config.hidden_size * (2 if config.facts.layer_norm else 1)
    return Footprint(body=body, embedding=table, output=0 if config.tie_embeddings else table)


def forward_flops(config: ModelConfig, *, tokens: int, length: int, targets: int) -> float:
    """FLOPs of a forward, two per multiply-add.

    The layers compute `tokens` tokens with attention within rows of `length`. The output matrix, and what follows the
    attention of the last layer, compute only `targets` tokens.
    """
    linear = sum(config.kind(layer) == "linear" for layer in range(config.num_layers))
    widths = 2 if config.facts.activation == "gelu" else 3
    expert = widths * config.hidden_size * config.intermediate_size
    behind = config.hidden_size * config.num_heads * config.head_dim
    if config.has_experts(config.num_layers - 1):
        behind += config.experts_per_token * expert + 3 * config.hidden_size * config.shared_expert_size
    else:
        behind += widths * config.hidden_size * (config.dense_size or config.intermediate_size)
    mixtures = sum(config.has_experts(layer) for layer in range(config.num_layers))
    idle = mixtures * max(0, config.num_experts - config.experts_per_token) * expert  # unused by a token
    products = 2.0 * ((count_parameters(config).body - idle) * tokens - behind * (tokens - targets))
    attention = 2.0 * 2 * tokens * (length / 2) * config.num_heads * config.head_dim * (config.num_layers - linear)
    attention += linear * tokens * delta_flops(config)
    return products + attention + 2.0 * targets * config.hidden_size * config.vocab_size


def delta_flops(config: ModelConfig) -> float:
    """FLOPs per token of a gated DeltaNet's recurrence: matmuls within a chunk of SIZE tokens, and with the state."""
    key, value, heads = config.linear_key_dim, config.linear_value_dim, config.linear_value_heads
    within = 2 * SIZE * key * config.linear_key_heads + SIZE * (value + (key + value) / 2) * heads  # half of a triangle
    return 2.0 * (within + 3 * key * value * heads)


def cache_bytes(config: ModelConfig, *, rows: int, length: int, itemsize: int) -> int:
    """Bytes of the KV cache of `rows` rows of `length` tokens, with the constant-size states of gated DeltaNets."""
    linear = sum(config.kind(layer) == "linear" for layer in range(config.num_layers))
    values = config.linear_value_heads * config.linear_value_dim
    state = config.linear_key_dim * values * max(4, itemsize)  # float32 or wider
    mixed = 2 * config.linear_key_heads * config.linear_key_dim + values
    state += mixed * (config.conv_size - 1) * itemsize
    attended = 2 * length * config.num_kv_heads * config.head_dim * itemsize
    return rows * ((config.num_layers - linear) * attended + linear * state)


class Flash(torch.autograd.Function):
    """A stand-in for fused attention on the meta device. It keeps q, k, v, the output and one number per query."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out


class FusedAttention:
    """A stand-in for the cache argument of the forward. It keeps only what a fused attention kernel keeps."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *how) -> Tensor:
        return Flash.apply(q, k, v)

    convolve, recur = staticmethod(convolve_stream), staticmethod(recur_stream)


@dataclass(frozen=True)
class Kept:
    """Bytes that the forward of a batch keeps for its backward."""

    layer: int  # per layer, on average
    rest: int  # of the embedding, the last norm and casts outside layers, and of one recomputed recurrence


@dataclass(frozen=True)
class Forward:
    """A forward pass whose kept bytes are counted."""

    rows: int
    length: int  # tokens of a row
    dtype: torch.dtype  # of matmuls
    master: torch.dtype  # of the weights
    fused_attention: bool  # True: the kernels of a GPU. False: the attention of a CPU, which keeps probabilities
    checkpointing: bool | str


def kept_bytes(config: ModelConfig, forward: Forward) -> Kept:
    """Bytes that the forward pass keeps for the backward pass, counted with one layer and with two.

    The weights and their copies in `forward.dtype` are not counted.
    """
    rows, length, checkpointing = forward.rows, forward.length, forward.checkpointing
    kinds = Counter(
        (config.kind(layer) if config.facts.linear else None, config.has_experts(layer))
        for layer in range(config.num_layers)
    )
    layers = {}
    for kind in kinds:  # gated DeltaNets keep other tensors than attention, experts others than one MLP
        alone = all_of_one_kind(config, *kind)
        one, two = (_saved(resized(alone, num_layers=n), forward) for n in (1, 2))
        layers[kind], rest = two - one, 2 * one - two
    rest += _recomputed(config, rows, length, forward.dtype) if "linear" in config.layer_kinds else 0
    if checkpointing in (True, "offload"):  # each layer keeps only its input, and one layer at a time is recomputed
        entry = rows * length * config.hidden_size * max(4, forward.dtype.itemsize)  # the residual stream is float32
        entry = 0 if checkpointing == "offload" else entry
        return Kept(layer=entry, rest=rest + max(layers.values()))
    mean = sum(layers[kind] * count for kind, count in kinds.items()) / sum(kinds.values())
    return Kept(layer=round(mean), rest=rest)


def all_of_one_kind(config: ModelConfig, kind: str | None, has_experts: bool) -> ModelConfig:
    """`config` with layers of this kind only (None: as they are), which all have experts, or none of them has."""
    config = config if kind is None else resized(config, layer_kinds=(kind,))
    if not config.expert_layers:
        return config
    return resized(config, expert_layers=(has_experts,), dense_size=0 if has_experts else config.dense_size)


def _saved(config: ModelConfig, forward: Forward) -> int:
    with kernels_as("auto" if forward.fused_attention else "torch"):
        return _saved_by_a_forward(config, forward)


def _saved_by_a_forward(config: ModelConfig, forward: Forward) -> int:
    num_tokens, dtype = forward.rows * forward.length, forward.dtype
    with torch.device("meta"):
        net = Transformer(config, None if dtype == forward.master else dtype).to(forward.master)
        net.checkpointing = "selective" if forward.checkpointing == "selective" else False
        tokens = torch.zeros(num_tokens, dtype=torch.int64)
        positions = torch.zeros(num_tokens, dtype=torch.int64)
        blocks = _blocks(forward.rows, forward.length)
        for rope in net.ropes.values():
            rope.frequencies = rope.frequencies.to("meta")
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    with torch.no_grad():  # makes the casts of the weights, which are not counted
        net(tokens, positions, blocks, FusedAttention())
    own |= {part.kept[0].untyped_storage()._cdata for part in net.modules() if getattr(part, "kept", None)}
    attention = FusedAttention() if forward.fused_attention else None
    return _kept_by(lambda: net(tokens, positions, blocks, attention), own)


def _recomputed(config: ModelConfig, rows: int, length: int, dtype: torch.dtype) -> int:
    """Bytes that a gated DeltaNet keeps during its backward pass, where it recomputes its recurrence."""
    with torch.device("meta"):
        layer = GatedDeltaNet(config, 0)
        made = torch.zeros(rows * length, sum(layer.widths), dtype=dtype, requires_grad=True)
        blocks = _blocks(rows, length)
    weights = layer.conv, layer.A_log, layer.dt_bias, layer.norm
    return _kept_by(lambda: layer.mix(convolve_stream, recur_stream, blocks, None, made, *weights), set())


def _blocks(rows: int, length: int) -> Blocks:
    nothing = torch.zeros(rows * length, dtype=torch.int64)
    return Blocks([[row * length, (row + 1) * length] for row in range(rows)], nothing, nothing, nothing, length)


def _kept_by(run: Callable[[], Tensor], own: set[int]) -> int:
    """Bytes that `run` keeps for the backward pass, without the storages in `own` (the weights)."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage.nbytes(), storage)  # kept alive, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in kept.values())
