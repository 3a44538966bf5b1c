"""Small random models and batches that several test files share."""

import torch

from model.config import ModelConfig
from model.packing import Rows

SIZES = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_layers=2, num_heads=6, num_kv_heads=2)
SIZES |= dict(head_dim=8, max_length=64, rope_theta=10000.0, norm_eps=1e-5, tie_embeddings=False)
FAMILY = {"llama": {}, "mistral": {"sliding_window": 5}, "qwen2": {"qkv_bias": True}, "qwen3": {}, "olmo2": {}}
FAMILY["gemma3_text"] = {"sliding_window": 5, "layer_kinds": ["window"] * 5 + ["full"], "window_rope_theta": 300.0}
FAMILY["gemma2"] = {"sliding_window": 5, "layer_kinds": ["window", "full"], "attention_softcap": 2.0}
FAMILY["gemma2"] |= {"logit_softcap": 9.0}
FAMILY["olmoe"] = {"num_experts": 4, "experts_per_token": 2}
FAMILY["qwen3_moe"] = FAMILY["olmoe"] | {"expert_layers": [False, True], "dense_size": 56}
FAMILY["gpt_oss"] = {"num_experts": 4, "experts_per_token": 2, "sliding_window": 5, "layer_kinds": ["window", "full"]}
FAMILY["gpt_oss"] |= {"qkv_bias": True}
FAMILY["gpt_neox"] = {"num_kv_heads": 6, "mlp_bias": True, "qkv_bias": True, "rotary_share": 0.5}
FAMILY["qwen3_5_text"] = {"layer_kinds": ["linear", "full"], "rotary_share": 0.5, "linear_key_heads": 2}
FAMILY["qwen3_5_text"] |= {"linear_value_heads": 4, "linear_key_dim": 8, "linear_value_dim": 12, "conv_size": 4}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "shared_expert_size": 20}
FAMILY["qwen2_moe"] = EXPERTS | {"qkv_bias": True}
FAMILY |= {family: FAMILY["qwen3_5_text"] | EXPERTS for family in ("qwen3_5_moe_text", "qwen3_next")}


def tiny_config(family: str = "llama", **changes) -> ModelConfig:
    return ModelConfig(**(SIZES | {"family": family} | FAMILY[family] | changes))


def batch_of(rows: list[tuple[list[int], list[int]]], padding: str, extra: int = 3) -> Rows:
    """Rows from (prompt, completion) pairs, padded with junk ids on the side named, by at least `extra` columns."""
    width = max(len(p) + len(c) for p, c in rows) + extra
    ids = torch.randint(1, 97, (len(rows), width))
    real, completion = torch.zeros(len(rows), width, dtype=torch.bool), torch.zeros(len(rows), width, dtype=torch.bool)
    for b, (p, c) in enumerate(rows):
        start = {"left": width - len(p) - len(c), "right": 0, "both": extra // 2}[padding]
        stop = start + len(p) + len(c)
        ids[b, start:stop] = torch.tensor(p + c)
        real[b, start:stop] = True
        completion[b, start + len(p) : stop] = True
    return Rows(ids, real, completion)


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(1, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def shaken(model):
    """Weights, biases and norms far from where they start, so that a forgotten one shows."""
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)), alpha=0.15)
    return model
