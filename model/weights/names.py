"""Which weights of a file make up each of ours, in Hugging Face's names."""

from model.config import ModelConfig

LAYER = {  # ours -> Hugging Face's, stacked along dimension 0
    "attention_norm": ["input_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.out": ["self_attn.o_proj"],
    "attention.q_norm": ["self_attn.q_norm"],
    "attention.k_norm": ["self_attn.k_norm"],
    "mlp_norm": ["post_attention_layernorm"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"],
}
NORMED_AFTER = {
    "attention_out_norm": ["post_attention_layernorm"],
    "mlp_out_norm": ["post_feedforward_layernorm"],
}
NORMED_TWICE = {
    "attention_out_norm": ["post_attention_layernorm"],
    "mlp_norm": ["pre_feedforward_layernorm"],
    "mlp_out_norm": ["post_feedforward_layernorm"],
}
OWN = {  # family -> where its names differ from Llama's
    "olmo2": NORMED_AFTER,
    "olmo3": NORMED_AFTER,
    "gemma2": NORMED_TWICE,
    "gemma3_text": NORMED_TWICE,
    "phi3": {"attention.qkv": ["self_attn.qkv_proj"], "mlp.gate_up": ["mlp.gate_up_proj"]},
}
TOP = {
    "transformer.embed.weight": "model.embed_tokens.weight",
    "transformer.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "head.weight": "score.weight",
    "head.bias": "score.bias",
    "gain": "score.gain",
    "shift": "score.shift",
}


def parts_of(name: str, config: ModelConfig) -> list[str]:
    """Hugging Face names whose tensors, stacked in this order, are our parameter or buffer `name`."""
    if name in TOP:
        return [TOP[name]]
    _, _, layer, module = name.split(".", 3)  # transformer.layers.<layer>.<module>.<weight | bias>
    module, leaf = module.rsplit(".", 1)
    parts = (LAYER | OWN.get(config.family, {}))[module]
    return [f"model.layers.{layer}.{part}.{leaf}" for part in parts]


def shape_of(part: str, config: ModelConfig) -> tuple[int, ...]:
    """The shape that a Hugging Face weight must have in a model of these sizes."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    wide = config.facts.qk_norm == "width"
    if part in ("score.gain", "score.shift"):
        return ()
    shapes = {
        "embed_tokens": (V, D),
        "lm_head": (V, D),
        "score": (1, D),
        "q_proj": (queries, D),
        "k_proj": (keys, D),
        "v_proj": (keys, D),
        "qkv_proj": (queries + 2 * keys, D),
        "o_proj": (D, queries),
        "gate_proj": (F, D),
        "up_proj": (F, D),
        "gate_up_proj": (2 * F, D),
        "down_proj": (D, F),
        "q_norm": (queries if wide else config.head_dim,),
        "k_norm": (keys if wide else config.head_dim,),
    }
    module, leaf = part.split(".")[-2:]
    shape = shapes.get(module, (D,))  # the rest are norms over the width
    return shape[:1] if leaf == "bias" else shape
