"""Random flags of every family: what `config.json` says is computed as in transformers, or it is refused by name.

Both read the same directory. Its config.json is written by transformers and then edited: positions in the older and the
newer spelling, and keys left out.
"""

import json
import random

import pytest
import torch

from model.build import export_model, load_policy
from tests.family_checkpoints import LONGROPE, SIZES, shake
from tests.model.test_families import Words, our_logprobs, their_logprobs
from tests.tiny_models import random_ids

transformers = pytest.importorskip("transformers")
ROWS = [(random_ids(5, 0), random_ids(36, 1)), (random_ids(5, 0), random_ids(9, 2))]
TYPES = ("full_attention", "sliding_attention")
YARN = {"rope_type": "yarn", "factor": 3.0, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.7}
SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    YARN | {"truncate": False},
    YARN | {"attention_factor": 0.9},
    {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5],
        "long_factor": [2.0, 2.5, 3.0, 4.0, 6.0, 9.0],
    }
    | {"original_max_position_embeddings": 48},
]
WINDOWS = {"sliding_window": [3, 7, 40, 200]}
SWITCHED = WINDOWS | {"use_sliding_window": [True, True, False], "max_window_layers": [0, 1, 28]}
EXPERTS = {"num_experts_per_tok": [1, 2, 4]}
SOME_DENSE = {"decoder_sparse_step": [1, 2, 3], "mlp_only_layers": [[], [0], [1], None]}
FLAGS = {  # family -> key -> its values, of which one is drawn, or the key is left out
    "llama": {"attention_bias": [True], "mlp_bias": [True]},
    "mistral": {"sliding_window": [3, 40, None]},
    "ministral": WINDOWS | {"layer_types": TYPES},
    "qwen2": SWITCHED,
    "qwen3": SWITCHED | {"layer_types": TYPES, "attention_bias": [True]},
    "smollm3": SWITCHED | {"layer_types": TYPES, "no_rope_layer_interval": [1, 2, 3], "no_rope_layers": (0, 1)},
    "olmo2": {"attention_bias": [True]},
    "olmo3": WINDOWS | {"layer_types": TYPES},
    "phi3": {"sliding_window": [3, 40, None], "partial_rotary_factor": [0.5]},
    "granite": {"embedding_multiplier": [3.0], "residual_multiplier": [0.5], "attention_multiplier": [0.2]}
    | {"logits_scaling": [3.0]},
    "qwen2_moe": SWITCHED | EXPERTS | SOME_DENSE | {"layer_types": TYPES, "qkv_bias": [True, True, False]},
    "qwen3_moe": SWITCHED | EXPERTS | SOME_DENSE | {"moe_intermediate_size": [12, 20], "norm_topk_prob": [True, False]},
    "olmoe": EXPERTS | {"norm_topk_prob": [True, False], "clip_qkv": [None, None, 0.5]},
    "mixtral": EXPERTS | {"sliding_window": [3, 40, None]},
    "gpt_neox": {"rotary_pct": [0.5, 1.0], "use_parallel_residual": [True, False], "attention_bias": [True, False]},
    "gpt_oss": EXPERTS | WINDOWS | {"layer_types": TYPES},
    "gemma2": WINDOWS | {"layer_types": TYPES, "query_pre_attn_scalar": [4, 13], "attn_logit_softcapping": [None, 2.0]},
    "gemma3_text": WINDOWS
    | {"layer_types": TYPES, "query_pre_attn_scalar": [4, 13], "final_logit_softcapping": [3.0]}
    | {"attn_logit_softcapping": [None, None, 2.0]},
    "qwen3_5_moe_text": EXPERTS | {"layer_types": ("linear_attention", "full_attention")},
    "qwen3_next": EXPERTS | SOME_DENSE | {"full_attention_interval": [2, 3], "norm_topk_prob": [True, False]},
    "qwen3_5_text": {"layer_types": ("linear_attention", "full_attention"), "linear_num_value_heads": [2, 4]}
    | {"attn_output_gate": [True, True, False], "linear_conv_kernel_dim": [2, 4]},
}
ALWAYS = dict.fromkeys(("qwen3_moe", "olmoe"), {"num_experts": 5})
ALWAYS |= dict.fromkeys(("mixtral", "gpt_oss"), {"num_local_experts": 5})
LINEAR = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 4,
}
NARROW = {"num_experts": 5, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
ALWAYS |= {"gpt_neox": {"rotary_pct": 0.5}, "qwen3_5_text": LINEAR} | dict.fromkeys(
    ("qwen3_next", "qwen3_5_moe_text"), LINEAR | NARROW
)
ALWAYS |= {"qwen2_moe": NARROW}
SEEDS = {  # of each family, the first that gives a file that both read
    "llama": 1, "mistral": 1, "ministral": 1, "qwen2": 1, "qwen3": 1, "smollm3": 5, "olmo2": 1, "olmo3": 6,
    "phi3": 9, "granite": 1, "qwen2_moe": 3, "qwen3_moe": 8, "olmoe": 2, "mixtral": 4, "gpt_neox": 6, "gpt_oss": 1,
    "gemma2": 1, "gemma3_text": 2, "qwen3_5_moe_text": 2, "qwen3_next": 5, "qwen3_5_text": 10,
}  # fmt: skip
MAY_BE_MISSING = (
    "head_dim",
    "num_key_value_heads",
    "layer_types",
    "use_sliding_window",
    "sliding_window",
    "hidden_act",
)
MAY_BE_MISSING += ("norm_topk_prob", "query_pre_attn_scalar", "no_rope_layers", "attention_bias", "tie_word_embeddings")


def draw_config(family: str, dice: random.Random) -> dict:
    heads, layers = dice.choice([2, 4, 6]), dice.choice([2, 3])
    keys = heads if family == "gpt_neox" else dice.choice([k for k in (1, 2, 3, 6) if heads % k == 0])
    drawn = {"num_attention_heads": heads, "num_key_value_heads": keys, "num_hidden_layers": layers, "head_dim": 12}
    drawn |= {"hidden_size": 12 * heads, "vocab_size": 97, "tie_word_embeddings": dice.random() < 0.4}
    drawn |= {"layer_norm_eps" if family == "gpt_neox" else "rms_norm_eps": dice.choice([1e-6, 1e-5, 1e-3])}
    drawn |= ALWAYS.get(family, {})
    if dice.random() < 0.1:
        drawn["hidden_act"] = dice.choice(["gelu", "relu", "gelu_pytorch_tanh", "silu"])
    for key, values in FLAGS[family].items():
        if dice.random() < 0.6:  # a tuple: one per layer
            several = isinstance(values, tuple)
            drawn[key] = [dice.choice(values) for _ in range(layers)] if several else dice.choice(values)
    return SIZES | drawn


def edit(raw: dict, family: str, dice: random.Random) -> None:
    """Another spelling of the positions, and keys that are missing."""
    scaling, theta = dice.choice(SCALINGS), dice.choice([500.0, 1e6])
    name = "rope_type" if dice.random() < 0.7 else "type"
    scaling = scaling and {name if key == "rope_type" else key: value for key, value in scaling.items()}
    shares = {"partial_rotary_factor": raw["partial_rotary_factor"]} if "partial_rotary_factor" in raw else {}
    spelling = dice.choice(["as it is", "old", "new", "by kind", "both"])
    if spelling != "as it is":
        for key in ("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq"):
            raw.pop(key, None)
    if spelling in ("old", "both"):
        base = "rotary_emb_base" if family == "gpt_neox" and dice.random() < 0.7 else "rope_theta"
        raw |= {base: theta, "rope_scaling": scaling}
    if spelling in ("new", "both"):
        raw["rope_parameters"] = {"rope_theta": theta} | shares | (scaling or {"rope_type": "default"})
    if spelling == "by kind":
        local = {"rope_type": "default", "rope_theta": dice.choice([100.0, 1e4])}
        full = {"rope_type": "default", "rope_theta": theta} | (scaling or {})
        raw["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
    for key in MAY_BE_MISSING:
        if dice.random() < 0.06:
            raw.pop(key, None)


def compare(family: str, seed: int, directory) -> str:
    """equal, refused here, or nobody, where transformers fails. AssertionError where the log-probs differ."""
    dice = random.Random(f"{family} {seed}")
    settings = draw_config(family, dice)
    torch.manual_seed(seed)
    try:
        config = transformers.AutoConfig.for_model(family, **settings)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except Exception:  # noqa: BLE001 - transformers refuses in any way
        return "nobody"
    shake(model.eval()).save_pretrained(directory)
    raw = json.loads((directory / "config.json").read_text())
    edit(raw, family, dice)
    (directory / "config.json").write_text(json.dumps(raw))
    with torch.no_grad():
        try:
            ours = our_logprobs(load_policy(directory), ROWS)
        except ValueError:
            return "refused"
        try:
            theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
            expected = their_logprobs(theirs, ROWS)
        except Exception:  # noqa: BLE001
            return "nobody"
    worst = (ours - expected).abs().max() / expected.abs().max()
    assert worst < 2e-5, f"{worst:.2g} with {raw}"
    return "equal"


@pytest.mark.parametrize("family", FLAGS)
def test_random_flags_are_computed_as_in_transformers_or_refused(family, tmp_path):
    assert compare(family, SEEDS[family], tmp_path) == "equal"


@pytest.mark.slow
@pytest.mark.parametrize("family", FLAGS)
def test_many_random_flags_are_computed_as_in_transformers_or_refused(family, tmp_path):
    found = [compare(family, seed, tmp_path / str(seed)) for seed in range(1, 60)]
    print(family, {kind: found.count(kind) for kind in ("equal", "refused", "nobody")})
    assert found.count("equal") > 1


@pytest.mark.parametrize(
    "family, edits, problem",
    [
        ("gpt_neox", {"rope_parameters": None, "rope_theta": 500.0}, "without rotary_emb_base"),
        ("gpt_neox", {"rope_parameters": None, "partial_rotary_factor": 1.0}, "without rotary_pct"),
        ("gemma3_text", {"attn_logit_softcapping": 2.0}, "attn_logit_softcapping=2.0"),
        (
            "gemma3_text",
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 8.0}},
            "write rope_type",
        ),
        ("olmo3", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "must be by kind of layer"),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "'linear' is not one of a phi3 model"),
        ("llama", {"rope_parameters": LONGROPE | {"short_factor": [1.0] * 9}}, "short_factor has 9 numbers for 4"),
        ("llama", {"rotary_emb_base": 77}, "rotary_emb_base=77 of a llama model, which this code does not know"),
        ("phi3", {"rotary_pct": 0.5}, "rotary_pct=0.5 of a phi3 model, which this code does not know"),
        (
            "olmo3",
            {"rope_parameters": None, "rope_local_base_freq": 50.0},
            "rope_local_base_freq=50.0 of a olmo3 model",
        ),
        ("mixtral", {"num_experts_per_tok": None, "experts_per_token": 1}, "write num_experts_per_tok=1"),
        ("gpt_oss", {"num_experts_per_tok": 2, "experts_per_token": 1}, "contradicts experts_per_token=1"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_scaling.factor='2' must be a number"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 0}},
            "rope_scaling.factor=0 must be a number above",
        ),
        ("llama", {"rope_parameters": None, "rope_theta": "x"}, "rope_theta='x' must be a number above 0"),
        ("llama", {"num_hidden_layers": 3.0}, "num_hidden_layers=3.0 must be a whole number"),
        ("llama", {"hidden_size": "48"}, "hidden_size='48' must be a whole number"),
    ],
)
def test_what_transformers_reads_otherwise_or_not_at_all_is_refused(family, edits, problem, tmp_path):
    config = transformers.AutoConfig.for_model(family, **(SIZES | {"num_key_value_heads": 6, "hidden_size": 48}))
    shake(transformers.AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | edits
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=problem):
        load_policy(tmp_path)


def saved(family: str, directory, **changes):
    """A small model of transformers with these settings, saved and read again."""
    config = transformers.AutoConfig.for_model(family, **(SIZES | {"num_key_value_heads": 6} | changes))
    shake(transformers.AutoModelForCausalLM.from_config(config)).save_pretrained(directory)
    return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


@pytest.mark.parametrize("family", ["ministral", "olmo3", "gpt_oss", "gemma2", "gemma3_text"])
def test_an_export_none_of_whose_layers_has_a_window_is_read_by_transformers(family, tmp_path):
    """It makes the mask of the windows all the same, and fails without their size."""
    theirs = saved(family, tmp_path / "theirs", layer_types=["full_attention"] * 3, sliding_window=7)
    policy = load_policy(tmp_path / "theirs")
    export_model(policy, tmp_path / "ours", Words())
    assert load_policy(tmp_path / "ours").config == policy.config
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.allclose(their_logprobs(back, ROWS), their_logprobs(theirs, ROWS), atol=1e-5)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("slow", [1.0, 2.5, 20.0])
def test_yarn_of_a_window_that_no_pair_turns_in_is_that_of_transformers(slow, truncate, tmp_path):
    """Then its ramp ends before its first pair."""
    yarn = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 7, "beta_slow": slow}
    theirs = saved("llama", tmp_path, rope_scaling=yarn | {"truncate": truncate, "rope_theta": 300.0})
    with torch.no_grad():
        ours, expected = our_logprobs(load_policy(tmp_path), ROWS), their_logprobs(theirs, ROWS)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
