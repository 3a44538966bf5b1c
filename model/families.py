"""The model families: what the models of each have in common, as differences from Llama."""

from dataclasses import dataclass, field
from typing import Any

# Optional fields of ModelConfig -> their key in config.json, and transformers' default for a missing key.
BIAS = {"qkv_bias": ("attention_bias", False)}
BIASES = BIAS | {"mlp_bias": ("mlp_bias", False)}
SCALES = {
    "embed_scale": ("embedding_multiplier", 1.0),
    "residual_scale": ("residual_multiplier", 1.0),
    "attention_scale": ("attention_multiplier", 1.0),
    "logit_divisor": ("logits_scaling", 1.0),
}
EXPERTS = {"num_experts": ("num_local_experts", 0), "experts_per_token": ("num_experts_per_tok", 0)}
NORMALISE = {"normalise_experts": ("norm_topk_prob", False)}
SHARED = {"shared_expert_size": ("shared_expert_intermediate_size", 512)}
SHARED_OF_QWEN2 = {"shared_expert_size": ("shared_expert_intermediate_size", 5632)}
LINEAR = {
    "linear_key_heads": ("linear_num_key_heads", 16),
    "linear_value_heads": ("linear_num_value_heads", 32),
    "linear_key_dim": ("linear_key_head_dim", 128),
    "linear_value_dim": ("linear_value_head_dim", 128),
    "conv_size": ("linear_conv_kernel_dim", 4),
}


@dataclass(frozen=True)
class Family:
    """The facts that all models of a family have in common. The defaults are Llama's."""

    title: str  # the architecture in Hugging Face's config.json is <title>ForCausalLM
    keys: dict = field(default_factory=dict)  # optional fields -> (key in config.json, its default there)
    norms: str = "before"  # where the norms of a sublayer are: before | after (OLMo 2) | both (Gemma)
    norm_offset: float = 0.0  # a norm multiplies by this plus its weight (Gemma: 1)
    qk_norm: str | None = None  # norms of queries and keys: head (per head) | width (over all heads)
    always_qkv_bias: bool = False  # Qwen2; the matmul after attention has no bias
    activation: str = "silu"  # of the MLP's gate: silu | gelu_pytorch_tanh | clamped; with gelu there is no gate
    embed_by_width: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    window: int | None = None  # default of sliding_window; null in config.json means no window
    windowed: bool = False  # has layers with a sliding window
    kinds: tuple[str, ...] = ()  # default kinds of the layers, repeated, without layer_types in config.json
    own_layer_types: bool = False  # config.json may give each layer's kind
    partial_rotary: bool = False  # config.json may set the rotated part of each head
    share: float = 1.0  # default of the rotated part of each head
    windows_rotate: bool = False  # where some layers have a window, only those rotate (EXAONE 4)
    theta: float = 10000.0  # default of rope_theta
    eps: float = 1e-6  # default of rms_norm_eps, layer_norm_eps
    window_theta: float | None = None  # RoPE base of layers with a window, if it is another one
    head_dim: int | None = None  # default of head_dim; None: hidden_size / num_heads
    layer_norm: bool = False  # norms with a mean and a bias (GPT-NeoX)
    parallel: bool = False  # attention and MLP read the same input, and both outputs are added
    fused_by_head: bool = False  # the rows of q, k and v are stored head by head
    always_mlp_bias: bool = False
    experts: bool = False  # the MLP is a mixture of experts
    some_dense: bool = False  # config.json may name layers without experts
    expert_bias: bool = False  # experts and router have biases
    normalise_experts: bool = False  # the weights of a token's experts always sum to one
    sinks: bool = False  # each head has an extra score in its softmax
    linear: bool = False  # has layers that are gated DeltaNets
    linear_by_head: bool = False  # their first product's rows are stored key head by key head
    gated_attention: bool = False  # a sigmoid gate on each head's output
    classifier: str | None = None  # the title of its reward models, if it is another one
    tied: bool = False  # default of tie_word_embeddings


GEMMA: dict[str, Any] = dict(
    norms="both", norm_offset=1.0, activation="gelu_pytorch_tanh", embed_by_width=True, tied=True, head_dim=256,
    windowed=True, window=4096, own_layer_types=True,
)  # fmt: skip
CAP = {"logit_softcap": ("final_logit_softcapping", None)}
CAPS_OF_2 = {"attention_softcap": ("attn_logit_softcapping", 50.0), "logit_softcap": ("final_logit_softcapping", 30.0)}
QUERY = {"attention_scale": ("query_pre_attn_scalar", 256)}  # to the power of -0.5
HYBRID: dict[str, Any] = dict(
    norm_offset=1.0, qk_norm="head", own_layer_types=True, head_dim=256, linear=True, partial_rotary=True, share=0.25,
    gated_attention=True, kinds=("linear",) * 3 + ("full",),
)  # fmt: skip
FAMILIES = {  # model_type -> its differences from Llama
    "llama": Family("Llama", BIASES),
    "mistral": Family("Mistral", windowed=True, window=4096),
    "ministral": Family("Ministral", windowed=True, window=4096, own_layer_types=True),
    "qwen2": Family("Qwen2", always_qkv_bias=True, windowed=True, own_layer_types=True),
    "qwen3": Family("Qwen3", BIAS, qk_norm="head", windowed=True, own_layer_types=True, head_dim=128),
    "smollm3": Family("SmolLM3", BIASES, windowed=True, own_layer_types=True, theta=2e6, tied=True),
    "olmo2": Family("Olmo2", BIAS, norms="after", qk_norm="width", eps=1e-5),
    "olmo3": Family(
        "Olmo3", BIAS, norms="after", qk_norm="width", windowed=True, window=4096, own_layer_types=True,
        kinds=("window", "window", "window", "full"), theta=5e5, window_theta=5e5, eps=1e-5,
    ),
    "exaone4": Family(
        "Exaone4", norms="after", qk_norm="head", windowed=True, window=4096, own_layer_types=True,
        kinds=("window", "window", "window", "full"), windows_rotate=True, eps=1e-5,
    ),
    "phi3": Family("Phi3", windowed=True, partial_rotary=True, eps=1e-5),
    "granite": Family("Granite", BIASES | SCALES),
    "qwen2_moe": Family(
        "Qwen2Moe", EXPERTS | SHARED_OF_QWEN2 | NORMALISE, always_qkv_bias=True, windowed=True, own_layer_types=True,
        experts=True, some_dense=True,
    ),
    "qwen3_moe": Family(
        "Qwen3Moe", BIAS | EXPERTS | NORMALISE, qk_norm="head", windowed=True, experts=True, some_dense=True,
    ),
    "olmoe": Family("Olmoe", BIAS | EXPERTS | NORMALISE, qk_norm="width", experts=True, eps=1e-5),
    "mixtral": Family(
        "Mixtral", EXPERTS, windowed=True, theta=1e6, experts=True, normalise_experts=True, eps=1e-5,
    ),
    "gpt_oss": Family(
        "GptOss", {"qkv_bias": ("attention_bias", True)} | EXPERTS, windowed=True, window=128,
        own_layer_types=True, kinds=("window", "full"),
        theta=1.5e5, head_dim=64, activation="clamped", experts=True, expert_bias=True, normalise_experts=True,
        sinks=True, eps=1e-5,
    ),
    "gpt_neox": Family(
        "GPTNeoX", {"qkv_bias": ("attention_bias", True)}, partial_rotary=True, share=0.25, layer_norm=True,
        parallel=True, fused_by_head=True, always_mlp_bias=True, activation="gelu", eps=1e-5,
    ),
    "qwen3_5_text": Family("Qwen3_5", BIAS | LINEAR, **HYBRID, classifier="Qwen3_5Text"),
    "qwen3_5_moe_text": Family(
        "Qwen3_5Moe", BIAS | LINEAR | EXPERTS | SHARED, **HYBRID, experts=True, normalise_experts=True,
    ),
    "qwen3_next": Family(
        "Qwen3Next", BIAS | LINEAR | EXPERTS | SHARED | {"normalise_experts": ("norm_topk_prob", True)}, **HYBRID,
        experts=True, some_dense=True, linear_by_head=True,
    ),
    "gemma2": Family(
        "Gemma2", BIAS | QUERY | CAPS_OF_2,
        kinds=("window", "full"), **GEMMA,
    ),
    "gemma3_text": Family(
        "Gemma3", BIAS | QUERY | CAP, qk_norm="head", theta=1e6, window_theta=1e4, classifier="Gemma3Text",
        kinds=("window",) * 5 + ("full",), **GEMMA,
    ),
}  # fmt: skip
