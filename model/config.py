"""The shape of a model: every number that its weights and its arithmetic depend on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_KEYS = {  # rope type -> keys that its formula needs
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings"},
}
ROPE_OPTIONS = {"yarn": {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"}}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Llama-family decoder. The tables of known models are in conf/model/*.yaml.

    Raises ValueError when the numbers contradict each other, so that a wrong shape never reaches a product.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int  # the window: positions that the model was made for
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3" | "yarn", "factor": ..., ...}
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    sliding_window: int | None = None  # Mistral: a token sees this many tokens, itself included
    family: str = "llama"

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"unknown model family {self.family!r}; known: {', '.join(FAMILIES)}")
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        )
        for name in (*sizes, "max_length"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)!r} must be a whole number of at least 1")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"model.{name}={value!r} must be a number above 0")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs")
        for name, family in (("qkv_bias", "qwen2"), ("qk_norm", "qwen3")):
            if getattr(self, name) != (self.family == family):
                raise ValueError(f"{name}={getattr(self, name)} contradicts family={self.family}; only {family} has it")
        if self.sliding_window is not None and (self.family != "mistral" or self.sliding_window < 1):
            raise ValueError(f"sliding_window={self.sliding_window} wants family=mistral and at least 1, or null")
        check_rope(self.rope_scaling)


def check_rope(scaling: Mapping | None) -> None:
    """Raise ValueError unless `scaling` is None or a rope type that we compute, with the keys it needs."""
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if kind not in ROPE_KEYS:
        raise ValueError(f"unknown rope_type {kind!r} in rope_scaling; known: {', '.join(ROPE_KEYS)}, or null for none")
    missing = ROPE_KEYS[kind] - set(scaling)
    unknown = set(scaling) - ROPE_KEYS[kind] - ROPE_OPTIONS.get(kind, set()) - {"rope_type"}
    if missing or unknown:
        raise ValueError(f"rope_scaling of type {kind}: missing {sorted(missing)}, unknown {sorted(unknown)}")


def make_config(sizes: Mapping, vocab_size: int) -> ModelConfig:
    """ModelConfig from a conf/model table; `vocab_size: null` there means the tokenizer's, given here."""
    sizes = dict(sizes)
    if sizes.get("rope_scaling") is not None:
        sizes["rope_scaling"] = dict(sizes["rope_scaling"])
    if sizes.get("vocab_size") is None:
        sizes["vocab_size"] = vocab_size
    config = ModelConfig(**sizes)
    check_vocab(config, vocab_size)
    return config


def check_vocab(config: ModelConfig, vocab_size: int) -> None:
    """Raise ValueError if the tokenizer has ids that the embedding has no row for."""
    if vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size} ids but the model's embedding has {config.vocab_size} rows; "
            "use the tokenizer that came with the model, or train the model anew with model.vocab_size=null"
        )


def resized(config: ModelConfig, **changes) -> ModelConfig:
    """A copy of `config` with some fields changed, checked anew."""
    return replace(config, **changes)
