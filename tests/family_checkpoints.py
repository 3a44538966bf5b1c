"""A tiny random checkpoint of every family, made by transformers, the oracle of tests/model/test_families.py."""

from pathlib import Path

import torch

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.3, 2.0], "long_factor": [1.5, 4.0, 9.0]}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,  # a padding_idx would zero one row's gradient
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
EXPERTS = {"num_experts_per_tok": 3}
NARROW = EXPERTS | {"moe_intermediate_size": 24}
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 16,
}
CASES = {  # name -> model_type, what differs from SIZES
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "ministral": ("ministral", {"sliding_window": 7, "layer_types": TYPES}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"attention_bias": True}),
    "qwen3 with windows": ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "layer_types": TYPES}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "smollm3 with windows": ("smollm3", {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 7}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"num_hidden_layers": 5, "sliding_window": 7, "rope_scaling": YARN, "rope_theta": 5e5}),
    "exaone4": ("exaone4", {"sliding_window": 7, "layer_types": TYPES}),
    "phi3": ("phi3", {"sliding_window": 7}),
    "phi4-mini": (
        "phi3",
        {"partial_rotary_factor": 0.75, "rope_scaling": LONGROPE, "original_max_position_embeddings": 48}
        | {"tie_word_embeddings": True},
    ),
    "granite": (
        "granite",
        {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.3, "logits_scaling": 6.0}
        | {"attention_bias": True},
    ),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 6, "norm_topk_prob": True} | NARROW),
    "qwen3_moe with windows": (
        "qwen3_moe",
        {"num_experts": 6, "use_sliding_window": True, "sliding_window": 7} | NARROW,
    ),
    "qwen3_moe with dense layers": (
        "qwen3_moe",
        {"num_experts": 6, "num_hidden_layers": 5, "mlp_only_layers": [1], "decoder_sparse_step": 2} | NARROW,
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {"num_experts": 6, "shared_expert_intermediate_size": 20, "mlp_only_layers": [0]}
        | {"use_sliding_window": True, "sliding_window": 7}
        | NARROW,
    ),
    "olmoe": ("olmoe", {"num_experts": 6} | EXPERTS),
    "mixtral": ("mixtral", {"num_local_experts": 6, "sliding_window": 7} | EXPERTS),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": 6, "rotary_pct": 0.5}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 6, "sliding_window": 7, "rope_scaling": YARN} | EXPERTS),
    "gemma2": ("gemma2", {"sliding_window": 7, "query_pre_attn_scalar": 20} | {"tie_word_embeddings": True}),
    "gemma2 with low caps": ("gemma2", {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}),
    "gpt_oss wide": ("gpt_oss", {"num_local_experts": 4, "hidden_size": 64, "intermediate_size": 96} | EXPERTS),
    "qwen3_5": (
        "qwen3_5_text",
        {"layer_types": ["linear_attention", "linear_attention", "full_attention"], "head_dim": 16} | LINEAR,
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {"layer_types": ["linear_attention", "linear_attention", "full_attention"], "head_dim": 16, "num_experts": 6}
        | {"shared_expert_intermediate_size": 20}
        | LINEAR
        | NARROW,
    ),
    "qwen3_next": (
        "qwen3_next",
        {"full_attention_interval": 2, "head_dim": 16, "num_experts": 6, "shared_expert_intermediate_size": 20}
        | {"norm_topk_prob": False}
        | LINEAR
        | NARROW,
    ),
    "qwen3_next with dense layers": (
        "qwen3_next",
        {"full_attention_interval": 2, "head_dim": 16, "num_experts": 6, "shared_expert_intermediate_size": 20}
        | {"mlp_only_layers": [1]}
        | LINEAR
        | NARROW,
    ),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 7, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 5e4, "rope_local_base_freq": 300.0},
    ),
}


def oracle(name: str):
    """transformers' own model of this case with large random weights, biases and norms included."""
    import transformers

    model_type, changes = CASES[name]
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return shake(model)


def shake(model):
    """The model with large random weights that its config's norms and biases cannot hide behind."""
    with torch.no_grad():
        for number, (name, weight) in enumerate(model.named_parameters()):
            draw = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
            if "A_log" in name:  # states that are remembered for tens of tokens
                weight.copy_(draw - 2)
            elif "conv1d" in name:
                weight.copy_(0.6 * draw)
            else:
                weight.copy_(0.15 * draw if weight.ndim > 1 or "bias" in name else 1 + 0.2 * draw)
    return model


def checkpoint(name: str, directory: Path):
    """The oracle, saved there as transformers saves it; for a test to load."""
    model = oracle(name)
    model.save_pretrained(directory)
    return model
