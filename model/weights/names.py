"""The names of our weights and of Hugging Face's, and the shapes of the latter."""

from model.config import ModelConfig

LAYER = {  # our name -> Hugging Face names, whose tensors are stacked along dimension 0
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
DELTANET = {  # for layers that are gated DeltaNets; names without .weight are complete
    "attention.qkv": [f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")],
    "attention.out": ["linear_attn.out_proj"],
    "attention.conv": ["linear_attn.conv1d.weight"],
    "attention.A_log": ["linear_attn.A_log"],
    "attention.dt_bias": ["linear_attn.dt_bias"],
    "attention.norm": ["linear_attn.norm.weight"],
}
DELTANET_BY_HEAD = DELTANET | {"attention.qkv": [f"linear_attn.in_proj_{part}" for part in ("qkvz", "ba")]}
PER_EXPERT = {"gate_up": ["gate_proj", "up_proj"], "down": ["down_proj"]}  # stacked, expert by expert
MIXTRAL = {"gate_up": ["w1", "w3"], "down": ["w2"]}
SHARED_EXPERT = {
    "mlp.router": ["mlp.gate"],
    "mlp.shared_gate_up": ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"],
    "mlp.shared_down": ["mlp.shared_expert.down_proj"],
    "mlp.shared_gate": ["mlp.shared_expert_gate"],
}
OWN = {  # family -> names that differ from Llama's
    "olmo2": NORMED_AFTER,
    "olmo3": NORMED_AFTER,
    "exaone4": NORMED_AFTER,
    "gemma2": NORMED_TWICE,
    "gemma3_text": NORMED_TWICE,
    "qwen2_moe": SHARED_EXPERT,
    "qwen3_moe": {"mlp.router": ["mlp.gate"]},
    "qwen3_next": SHARED_EXPERT,
    "qwen3_5_moe_text": SHARED_EXPERT,
    "olmoe": {"mlp.router": ["mlp.gate"]},
    "mixtral": {"mlp.router": ["block_sparse_moe.gate"]},
    "gpt_oss": {  # complete names, without .weight
        "mlp.router": ["mlp.router"],
        "attention.sinks": ["self_attn.sinks"],
        "mlp.gate_up.weight": ["mlp.experts.gate_up_proj"],
        "mlp.gate_up.bias": ["mlp.experts.gate_up_proj_bias"],
        "mlp.down.weight": ["mlp.experts.down_proj"],
        "mlp.down.bias": ["mlp.experts.down_proj_bias"],
    },
    "gpt_neox": {
        "attention.qkv": ["attention.query_key_value"],
        "attention.out": ["attention.dense"],
        "mlp.gate_up": ["mlp.dense_h_to_4h"],
        "mlp.down": ["mlp.dense_4h_to_h"],
    },
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
NEOX_TOP = {
    "transformer.embed.weight": "gpt_neox.embed_in.weight",
    "transformer.norm.weight": "gpt_neox.final_layer_norm.weight",
    "transformer.norm.bias": "gpt_neox.final_layer_norm.bias",
    "lm_head.weight": "embed_out.weight",
}


def parts_of(name: str, config: ModelConfig) -> list[str]:
    """Hugging Face names whose tensors, stacked in this order, are our parameter or buffer `name`."""
    neox = config.family == "gpt_neox"
    top = TOP | NEOX_TOP if neox else TOP
    if name in top:
        return [top[name]]
    _, _, layer, inner = name.split(".", 3)  # transformer.layers.<layer>.<module>.<weight | bias>
    place = f"{'gpt_neox' if neox else 'model'}.layers.{layer}"
    own = OWN.get(config.family, {})
    if config.kind(int(layer)) == "linear":
        own = own | (DELTANET_BY_HEAD if config.facts.linear_by_head else DELTANET)
    if inner in own:
        return [f"{place}.{part}" for part in own[inner]]
    module, leaf = inner.rsplit(".", 1)
    if config.has_experts(int(layer)) and module in ("mlp.gate_up", "mlp.down"):
        kinds = (MIXTRAL if config.family == "mixtral" else PER_EXPERT)[module.removeprefix("mlp.")]
        block = "block_sparse_moe" if config.family == "mixtral" else "mlp"
        return [f"{place}.{block}.experts.{e}.{kind}.{leaf}" for e in range(config.num_experts) for kind in kinds]
    return [f"{place}.{part}.{leaf}" for part in (LAYER | own)[module]]


def shape_of(part: str, config: ModelConfig) -> tuple[int, ...]:
    """The shape of the Hugging Face weight `part` in a model of this config."""
    D, F, V, E = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_experts
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    wide = config.facts.qk_norm == "width"
    if part in ("score.gain", "score.shift"):
        return ()
    if ".shared_expert." in part:
        F = config.shared_expert_size
    elif ".experts." not in part:
        F = config.dense_size or F
    if ".linear_attn." in part:
        return deltanet_shape(part.split(".linear_attn.")[1], config)
    shapes = {
        "embed_tokens": (V, D),
        "lm_head": (V, D),
        "score": (1, D),
        "q_proj": (queries * (2 if config.facts.gated_attention else 1), D),
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
    shapes |= {"embed_in": (V, D), "embed_out": (V, D), "query_key_value": (3 * queries, D), "dense": (D, queries)}
    shapes |= {"dense_h_to_4h": (F, D), "dense_4h_to_h": (D, F)}
    shapes |= {"gate": (E, D), "shared_expert_gate": (1, D), "router": (E, D), "w1": (F, D), "w3": (F, D), "w2": (D, F)}
    stacked = {"gate_up_proj": (E, D, 2 * F), "down_proj": (E, F, D), "sinks": (config.num_heads,)}
    stacked |= {"gate_up_proj_bias": (E, 2 * F), "down_proj_bias": (E, D)}
    module, leaf = part.split(".")[-2:]
    if leaf in stacked:
        return stacked[leaf]
    shape = shapes.get(module, (D,))  # all others are norms over the width
    return shape[:1] if leaf == "bias" else shape


def deltanet_shape(part: str, config: ModelConfig) -> tuple[int, ...]:
    """The shape of a weight of a gated DeltaNet."""
    D, heads = config.hidden_size, config.linear_value_heads
    values = heads * config.linear_value_dim
    mixed = 2 * config.linear_key_heads * config.linear_key_dim + values
    return {
        "in_proj_qkv.weight": (mixed, D),
        "in_proj_qkvz.weight": (mixed + values, D),
        "in_proj_ba.weight": (2 * heads, D),
        "in_proj_z.weight": (values, D),
        "in_proj_b.weight": (heads, D),
        "in_proj_a.weight": (heads, D),
        "out_proj.weight": (D, values),
        "conv1d.weight": (mixed, 1, config.conv_size),
        "norm.weight": (config.linear_value_dim,),
    }.get(part, (heads,))
