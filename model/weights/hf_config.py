"""config.json <-> ModelConfig. A key that changes the forward pass and is not supported here is refused by name."""

from pathlib import Path

from model.config import ModelConfig
from model.families import FAMILIES, Family
from model.weights.hf_layers import read_dense, read_layers, write_layers
from model.weights.hf_rope import read_rope

KINDS = {"ForCausalLM": "policy", "ForSequenceClassification": "reward", "ForTokenClassification": "value"}


def architecture(facts: Family, suffix: str) -> str:
    """The name of the model class in transformers."""
    return (facts.title if suffix == "ForCausalLM" else facts.classifier or facts.title) + suffix


ARCHITECTURES = {
    architecture(facts, suffix): (family, kind) for family, facts in FAMILIES.items() for suffix, kind in KINDS.items()
}
# Keys without effect on a forward: bookkeeping, special tokens, and settings of transformers' own training.
CHANGES_NOTHING = {
    "initial_context_length",
    "_name_or_path", "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "auto_map",
    "use_cache", "cache_implementation", "_attn_implementation_autoset", "attn_implementation", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "id2label", "label2id", "num_labels",
    "problem_type", "pretraining_tp", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop",
    "classifier_dropout", "is_llama_config", "transformers.js_config", "tokenizer_class", "unsloth_fixed",
    "unsloth_version", "return_dict", "output_hidden_states", "output_attentions", "no_rope_layer_interval",
    "output_router_logits", "router_aux_loss_coef",
    "max_window_layers", "_sliding_window_pattern", "sliding_window_pattern", "is_decoder",
    "full_attention_interval", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype",
}  # fmt: skip
# Keys that must have one value, because the code supports only that.
NEUTRAL = {
    "use_mrope": False, "rope_interleaved": False, "lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1,
    "mlp_bias": False, "attention_bias": False, "use_sliding_window": False, "is_encoder_decoder": False,
    "use_bidirectional_attention": False, "chunk_size_feed_forward": 0, "tie_encoder_decoder": False,
    "add_cross_attention": False, "router_jitter_noise": 0.0, "qkv_bias": True,
    "swiglu_limit": 7.0, "swiglu_alpha": 1.702, "use_parallel_residual": True, "attn_output_gate": True,
}  # fmt: skip
NARROW_EXPERTS = (
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe_text",
)  # moe_intermediate_size is the width of an expert
MAY_LACK_KV_HEADS = (
    "llama",
    "olmo2",
    "olmo3",
    "phi3",
    "granite",
    "gpt_neox",
)  # then as many as heads
OTHER_NAMES = {  # alternative names of keys -> the usual names
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
}
OF_NEOX = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
WHOLE = ("hidden_size", "num_attention_heads", "num_hidden_layers")  # ModelConfig checks the others by its own names


def parse_config(raw: dict, directory: Path) -> tuple[ModelConfig, str]:
    """(ModelConfig, kind) of a config.json; kind is policy, reward or value. Raises ValueError on unsupported keys."""
    refuse_quantised(raw, directory)
    family, kind = read_family(raw, directory)
    left = {key: value for key, value in raw.items() if key not in CHANGES_NOTHING | {"quantization_config"}}
    try:
        config = read_sizes(left, raw, family)
    except KeyError as error:
        raise ValueError(f"{directory}/config.json lacks {error}") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:  # a value of the wrong type
        raise ValueError(f"{directory}/config.json: {error}") from None
    for key, value in left.items():
        if value is None or (key in NEUTRAL and value == NEUTRAL[key]):
            continue
        only = f"; only {NEUTRAL[key]!r} is computed" if key in NEUTRAL else ", which this code does not know"
        raise ValueError(
            f"{directory}/config.json: {key}={value!r} of a {family} model{only}; ignoring it could change the model. "
            "If the key changes nothing in the forward pass, delete it there"
        )
    return config, kind


def refuse_quantised(raw: dict, directory: Path) -> None:
    """Raise ValueError where the weights are quantised in a format that cannot be read."""
    how = raw.get("quantization_config")
    if isinstance(how, dict) and how.get("quant_method") == "mxfp4" and raw.get("model_type") == "gpt_oss":
        return  # it is dequantised when it is read
    if how is not None:
        method = how.get("quant_method", "an unknown method") if isinstance(how, dict) else how
        raise ValueError(
            f"{directory}: its weights are quantised ({method}, see quantization_config in config.json) and cannot be "
            "trained on; take the unquantised checkpoint, or dequantise it with transformers and save_pretrained it"
        )


def read_family(raw: dict, directory: Path) -> tuple[str, str]:
    """(family, kind of model) from `architectures` and `model_type`. Raises ValueError where they contradict."""
    names = raw.get("architectures") or [None]
    name = names[0] if isinstance(names, list) else names
    model_type = raw.get("model_type")
    if name is None:
        like = FAMILIES[model_type].title if model_type in FAMILIES else "Llama"
        raise ValueError(
            f"{directory}/config.json has no architectures, which say whether it is a policy or a reward model; "
            f'write "architectures": ["{like}ForCausalLM"] there for a policy'
        )
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"{directory}: unknown architecture {name!r}; known: {', '.join(ARCHITECTURES)}")
    family, kind = ARCHITECTURES[name]
    if model_type not in (None, family):
        raise ValueError(
            f"{directory}/config.json contradicts itself: architectures={names} but model_type={model_type!r}; "
            "correct the one that is wrong"
        )
    if family == "mistral" and raw.get("layer_types") is not None:
        family = "ministral"  # as in transformers' AutoModel
    return family, kind


def read_sizes(left: dict, raw: dict, family: str) -> ModelConfig:
    """The ModelConfig. The keys that were read are removed from `left`."""
    facts, take = FAMILIES[family], left.pop
    value = "silu" if facts.activation == "clamped" else facts.activation
    for key in ("hidden_act", "hidden_activation"):
        found = take(key, None)
        if found not in (None, value) and (found, value) != ("swish", "silu"):  # transformers has two names for it
            raise ValueError(f"{key}={found!r} is not what a {family} model computes, which is {value!r}")
    for key in WHOLE:
        if key in left and type(left[key]) is not int:
            raise ValueError(f"{key}={left[key]!r} must be a whole number")
    width, heads = take("hidden_size"), take("num_attention_heads")
    kv_heads = take("num_key_value_heads", None) if family in MAY_LACK_KV_HEADS else take("num_key_value_heads")
    use_usual_names(left, family)
    options = {ours: take(theirs, default) for ours, (theirs, default) in facts.keys.items()}
    options |= {"qkv_bias": True} if facts.always_qkv_bias else {}
    options |= {"mlp_bias": True} if facts.always_mlp_bias else {}
    if family.startswith("gemma"):
        options["attention_scale"] **= -0.5
    head_dim = take("head_dim", None) or facts.head_dim or width // heads
    max_length = take("max_position_embeddings")
    theta, scaling, window_theta, share = read_rope(left, facts, family, max_length)
    if scaling is not None and scaling["rope_type"] == "longrope":
        max_length = scaling["original_max_position_embeddings"]  # transformers rotates longer texts by other angles
    num_layers = take("num_hidden_layers")
    if facts.some_dense:
        options |= read_dense(left, num_layers)
    if family in NARROW_EXPERTS:
        take("intermediate_size", None)  # of layers without experts
        inner = take("moe_intermediate_size")
    else:
        inner = take("intermediate_size")
    return ModelConfig(
        family=family,
        vocab_size=take("vocab_size"),
        hidden_size=width,
        intermediate_size=inner,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads or heads,
        head_dim=head_dim,
        max_length=max_length,
        rope_theta=theta,
        rope_scaling=scaling,
        window_rope_theta=window_theta,
        rotary_share=share,
        norm_eps=take("layer_norm_eps" if facts.layer_norm else "rms_norm_eps", facts.eps),
        tie_embeddings=take("tie_word_embeddings", facts.tied),
        **options,
        **read_layers(left, raw, family, num_layers),
    )


def use_usual_names(left: dict, family: str) -> None:
    """Give the keys in `left` their usual names. Raises ValueError where transformers would read none or another."""
    own = OF_NEOX if family == "gpt_neox" else {}
    for other, key in own.items():
        if key in left and other not in left:
            raise ValueError(f"{key}={left[key]} without {other}, which is what transformers reads; write {other}")
    few = left.get("experts_per_token")
    if few is not None and left.get("num_experts_per_tok") is None:
        raise ValueError(f"experts_per_token={few} is not what transformers reads; write num_experts_per_tok={few} too")
    for other, key in (OTHER_NAMES | own).items():
        if other in left and left.setdefault(key, left[other]) != (found := left.pop(other)):
            raise ValueError(f"{key}={left[key]} contradicts {other}={found}")


def make_config_json(config: ModelConfig, kind: str, dtype: str, *, bos_id, eos_id, pad_id) -> dict:
    """The config.json of a model, as transformers (4 and 5), vLLM and lm-eval read it."""
    facts, scaling = config.facts, config.rope_scaling
    suffix = next(suffix for suffix, name in KINDS.items() if name == kind)
    raw = {
        "architectures": [architecture(facts, suffix)],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu" if facts.activation == "clamped" else facts.activation,
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }
    raw |= {theirs: getattr(config, ours) for ours, (theirs, _) in facts.keys.items()}
    scale = config.attention_scale or config.head_dim**-0.5
    if config.family == "granite":
        raw["attention_multiplier"] = scale
    if config.num_experts:
        raw |= {"num_experts": config.num_experts}
    if config.family in NARROW_EXPERTS:
        raw |= {"moe_intermediate_size": config.intermediate_size}
    if config.family == "gpt_neox":
        raw |= {"layer_norm_eps": raw.pop("rms_norm_eps"), "rotary_emb_base": config.rope_theta}
        raw |= {"rotary_pct": config.rotary_share, "use_parallel_residual": True}
        del raw["head_dim"], raw["num_key_value_heads"]
    if config.family.startswith("gemma"):
        raw |= {"query_pre_attn_scalar": round(scale**-2), "hidden_activation": facts.activation}
    raw |= write_layers(config)
    if scaling is not None and scaling["rope_type"] == "longrope":
        raw["max_position_embeddings"] = round(config.max_length * scaling["factor"])
        raw["original_max_position_embeddings"] = config.max_length
    if facts.partial_rotary:
        raw["partial_rotary_factor"] = config.rotary_share
    if facts.window_theta is not None:
        full = {"rope_theta": config.rope_theta, "rope_type": "default"} | (scaling or {})
        local = {"rope_theta": config.window_rope_theta, "rope_type": "default"}
        raw["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
    if config.family == "gpt_oss":  # without the key, transformers uses YaRN
        raw["rope_parameters"] = {"rope_theta": config.rope_theta, "rope_type": "default"} | (scaling or {})
    if kind != "policy":
        raw["id2label"], raw["label2id"] = {"0": kind}, {kind: 0}  # one label
    return raw
