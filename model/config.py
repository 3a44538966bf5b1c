"""The config of a model: the sizes of its weights and the settings of its forward pass."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from model.families import FAMILIES, LINEAR, Family

ROPE_KEYS = {  # rope type -> the keys that its formula needs
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "longrope": {"factor", "short_factor", "long_factor", "original_max_position_embeddings"},
}
ROPE_OPTIONS = {
    "yarn": {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"attention_factor"},
}
KINDS = ("full", "window", "linear")  # a layer's attention: all tokens, a sliding window, or a gated DeltaNet


@dataclass(frozen=True)
class ModelConfig:
    """The config of a decoder. The sizes of known models are in conf/model/*.yaml.

    Raises ValueError where the numbers contradict each other, before any weight is created.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int  # the window: the number of positions that the model supports
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3" | "yarn" | "longrope", "factor": ..., ...}
    window_rope_theta: float | None = None  # RoPE base of layers with a window, unscaled; None: as the others
    rotary_share: float = 1.0  # the rotated part of each head
    rotary_layers: tuple[bool, ...] = ()  # SmolLM3: whether a layer rotates, repeated; empty: all do
    sliding_window: int | None = None  # a token attends to this many tokens, itself included
    layer_kinds: tuple[str, ...] = ()  # full | window | linear, repeated over the layers; empty: all the same
    qkv_bias: bool = False  # attention's linear layers have biases (Qwen2: not the last one)
    mlp_bias: bool = False
    embed_scale: float = 1.0  # Granite, as the next three
    residual_scale: float = 1.0  # factor of a sublayer's output
    attention_scale: float | None = None  # factor of q k; None: head_dim ** -0.5
    logit_divisor: float = 1.0
    attention_softcap: float | None = None  # scores s become cap tanh(s / cap) (Gemma 2)
    logit_softcap: float | None = None
    num_experts: int = 0  # each has width intermediate_size
    experts_per_token: int = 0
    normalise_experts: bool = False  # the weights of a token's experts sum to one
    shared_expert_size: int = 0  # width of an expert that every token uses, with a gate
    expert_layers: tuple[bool, ...] = ()  # whether a layer has experts, repeated; empty: all do
    dense_size: int = 0  # width of the MLP in layers without experts
    linear_key_heads: int = 0  # this and the next four: sizes of gated DeltaNets
    linear_value_heads: int = 0
    linear_key_dim: int = 0
    linear_value_dim: int = 0
    conv_size: int = 0  # tokens that the convolution reads
    family: str = "llama"

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"unknown model family {self.family!r}; known: {', '.join(FAMILIES)}")
        plain = {"rotary_layers": (True,), "layer_kinds": (self.all_alike,), "expert_layers": (True,)}
        for name, default in plain.items():  # lists from YAML
            items = shortest_period(tuple(getattr(self, name)))
            object.__setattr__(self, name, () if items == default else items)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_length"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)!r} must be a whole number of at least 1")
        scales = (
            "embed_scale", "residual_scale", "attention_scale", "logit_divisor", "window_rope_theta",
            "attention_softcap", "logit_softcap",
        )  # fmt: skip
        for name in ("rope_theta", "norm_eps", *(name for name in scales if getattr(self, name) is not None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"model.{name}={value!r} must be a number above 0")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings rotate pairs")
        if not 0 < self.rotary_share <= 1 or self.rotary_dim % 2 or not self.rotary_dim:
            raise ValueError(f"rotary_share={self.rotary_share} of head_dim={self.head_dim} must be an even number")
        self.check_layers()
        self.check_family()
        self.check_linear()
        check_rope(self.rope_scaling, self.rotary_dim)

    def check_layers(self) -> None:
        """Raise ValueError where the window and the kinds of layers contradict each other."""
        window = self.sliding_window
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise ValueError(f"sliding_window={window!r} must be at least 1, or null")
        if unknown := set(self.layer_kinds) - set(KINDS):
            raise ValueError(f"layer_kinds holds {sorted(unknown)}; known: {', '.join(KINDS)}")
        if self.layer_kinds and ("window" in self.layer_kinds) != (window is not None):
            raise ValueError(f"layer_kinds={list(self.layer_kinds)} contradicts sliding_window={window}")

    def check_linear(self) -> None:
        """Raise ValueError where the sizes of gated DeltaNets are wrong."""
        if "linear" in self.layer_kinds and not self.facts.linear:
            raise ValueError(f"layer_kinds={list(self.layer_kinds)} contradicts family={self.family}")
        sizes = {name: getattr(self, name) for name in LINEAR if self.facts.linear}
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes.values()):
            raise ValueError(f"{sizes} must be whole numbers of at least 1")
        if self.facts.linear and self.linear_value_heads % self.linear_key_heads:
            got = f"linear_value_heads={self.linear_value_heads} is not a multiple of linear_key_heads"
            raise ValueError(f"{got}={self.linear_key_heads}")

    def check_family(self) -> None:
        """Raise ValueError where an optional field is set that this family does not have."""
        facts = self.facts
        if self.qkv_bias != facts.always_qkv_bias and "qkv_bias" not in facts.keys:
            raise ValueError(f"qkv_bias={self.qkv_bias} contradicts family={self.family}")
        if self.mlp_bias != facts.always_mlp_bias and "mlp_bias" not in facts.keys:
            raise ValueError(f"mlp_bias={self.mlp_bias} contradicts family={self.family}")
        if facts.experts and not 1 <= self.experts_per_token <= self.num_experts:
            got = f"experts_per_token={self.experts_per_token} of num_experts={self.num_experts}"
            raise ValueError(f"family={self.family} wants 1 <= experts_per_token <= num_experts, got {got}")
        if not isinstance(self.dense_size, int) or (self.dense_size > 0) != bool(self.expert_layers):
            got = f"dense_size={self.dense_size} and expert_layers={list(self.expert_layers)}"
            raise ValueError(f"{got}: the width of layers without experts is needed where there are such layers")
        shared = self.shared_expert_size
        if "shared_expert_size" in facts.keys and (
            isinstance(shared, bool) or not isinstance(shared, int) or shared < 1
        ):
            raise ValueError(f"shared_expert_size={shared!r} must be a whole number of at least 1")
        allowed = {*facts.keys, "qkv_bias", "mlp_bias", "rope_scaling", "family"}
        allowed |= {"sliding_window"} if facts.windowed else set()
        allowed |= {"layer_kinds"} if facts.own_layer_types else set()
        allowed |= {"expert_layers", "dense_size"} if facts.some_dense else set()
        allowed |= {"rotary_layers"} if self.family == "smollm3" else set()
        allowed |= {"rotary_share"} if facts.partial_rotary else set()
        allowed |= {"window_rope_theta"} if facts.window_theta else set()
        for option in fields(self)[11:]:
            if option.name not in allowed and getattr(self, option.name) != option.default:
                raise ValueError(f"{option.name}={getattr(self, option.name)!r} contradicts family={self.family}")

    @property
    def facts(self) -> Family:
        return FAMILIES[self.family]

    @property
    def rotary_dim(self) -> int:
        """The number of rotated dimensions of each head."""
        return int(self.head_dim * self.rotary_share)

    def kind(self, layer: int) -> str:
        """full | window | linear: the kind of this layer's attention."""
        return self.layer_kinds[layer % len(self.layer_kinds)] if self.layer_kinds else self.all_alike

    @property
    def all_alike(self) -> str:
        """The kind of all layers where `layer_kinds` names none."""
        return "full" if self.sliding_window is None else "window"

    def has_experts(self, layer: int) -> bool:
        """Whether this layer has experts in place of one MLP."""
        named = not self.expert_layers or self.expert_layers[layer % len(self.expert_layers)]
        return self.num_experts > 0 and named

    def turns(self, layer: int) -> bool:
        """Whether this layer's queries and keys are rotated."""
        if self.facts.windows_rotate and self.sliding_window is not None:
            return self.kind(layer) == "window"
        return not self.rotary_layers or self.rotary_layers[layer % len(self.rotary_layers)]


def shortest_period(items: tuple) -> tuple:
    """The shortest tuple whose repetition, cut to the same length, gives these items."""
    for size in range(1, len(items)):
        if all(item == items[i % size] for i, item in enumerate(items)):
            return items[:size]
    return items


def check_rope(scaling: Mapping | None, rotary_dim: int) -> None:
    """Raise ValueError unless `scaling` is None or a supported rope type with exactly the keys that it needs.

    rotary_dim: the number of rotated dimensions of a head, which rotate in pairs.
    """
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if kind not in ROPE_KEYS:
        raise ValueError(f"unknown rope_type {kind!r} in rope_scaling; known: {', '.join(ROPE_KEYS)}, or null for none")
    missing = ROPE_KEYS[kind] - set(scaling)
    unknown = set(scaling) - ROPE_KEYS[kind] - ROPE_OPTIONS.get(kind, set()) - {"rope_type"}
    if missing or unknown:
        raise ValueError(f"rope_scaling of type {kind}: missing {sorted(missing)}, unknown {sorted(unknown)}")
    for name, value in scaling.items():
        numbers = value if isinstance(value, list | tuple) else [value]
        if name in ("rope_type", "truncate") or value is None:
            continue
        if not all(type(number) in (int, float) and 0 < number < math.inf for number in numbers):
            raise ValueError(f"rope_scaling.{name}={value!r} must be a number above 0")
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        if len(scaling[name]) != rotary_dim // 2:
            raise ValueError(
                f"rope_scaling.{name} has {len(scaling[name])} numbers for {rotary_dim // 2} rotated pairs"
            )


def make_config(sizes: Mapping, vocab_size: int) -> ModelConfig:
    """The ModelConfig of a conf/model table. `vocab_size: null` there means the tokenizer's size, `vocab_size`."""
    sizes = dict(sizes)
    if sizes.get("rope_scaling") is not None:
        sizes["rope_scaling"] = dict(sizes["rope_scaling"])
    if sizes.get("vocab_size") is None:
        sizes["vocab_size"] = vocab_size
    config = ModelConfig(**sizes)
    check_vocab(config, vocab_size)
    return config


def check_vocab(config: ModelConfig, vocab_size: int) -> None:
    """Raise ValueError where the tokenizer has ids without a row in the embedding."""
    if vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size} ids but the model's embedding has {config.vocab_size} rows; "
            "use the tokenizer that came with the model, or train the model anew with model.vocab_size=null"
        )


def resized(config: ModelConfig, **changes) -> ModelConfig:
    """A copy of `config` with some fields changed. It is checked again."""
    return replace(config, **changes)
