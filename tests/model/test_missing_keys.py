"""A config.json without a key has transformers' default for it, or is refused: never another value.

transformers reads the file and writes it whole, every default included. This project must read both files alike.
"""

import json

import pytest
import torch

from model.weights.hf_config import parse_config
from tests.family_checkpoints import CASES, SIZES

transformers = pytest.importorskip("transformers")


def whole(raw: dict, directory) -> dict:
    """What transformers makes of this config.json, with all its defaults."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    return transformers.AutoConfig.from_pretrained(directory).to_dict()


def older(raw: dict) -> dict:
    """The same config.json, with positions as transformers 4 wrote them."""
    rope = dict(raw["rope_parameters"])
    if "full_attention" in rope:
        local, rope = rope["sliding_attention"], dict(rope["full_attention"])
        raw = raw | ({"rope_local_base_freq": local["rope_theta"]} if raw["model_type"] == "gemma3_text" else {})
    outer = {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if raw["model_type"] == "gpt_neox":
        outer = {"rotary_emb_base": outer["rope_theta"], "rotary_pct": outer["partial_rotary_factor"]}
    scaling = None if rope["rope_type"] == "default" else rope
    return {key: value for key, value in raw.items() if key != "rope_parameters"} | outer | {"rope_scaling": scaling}


def without_one(raw: dict):
    """(name, a copy) without each key, and without each key of its positions."""
    for key, value in raw.items():
        yield key, {name: kept for name, kept in raw.items() if name != key}
        if key.startswith("rope_") and isinstance(value, dict):
            for inner, copy in without_one(value):
                yield f"{key}.{inner}", raw | {key: copy}


@pytest.mark.parametrize("spelling", ["new", "old"])
@pytest.mark.parametrize("case", CASES)
def test_a_missing_key_means_what_it_means_in_transformers_or_is_refused(case, spelling, tmp_path):
    family, changes = CASES[case]
    neox = family == "gpt_neox"
    own = {"layer_norm_eps": 3e-4, "rotary_emb_base": 500.0} if neox else {"rms_norm_eps": 3e-4, "rope_theta": 500.0}
    config = transformers.AutoConfig.for_model(family, **(SIZES | own | changes))
    raw = {key: value for key, value in config.to_dict().items() if value is not None}
    raw |= {"architectures": [transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]}
    raw = older(raw) if spelling == "old" else raw
    read = []
    for key, copy in without_one(raw):
        if key == "model_type":  # transformers does not read a file without it
            continue
        try:
            ours = parse_config(copy, tmp_path)[0]
        except ValueError:
            continue
        try:
            theirs = parse_config(whole(copy, tmp_path / "theirs"), tmp_path)[0]
        except Exception as error:
            raise AssertionError(f"{key}: {error}") from error
        assert ours == theirs, key
        read.append(key)
    assert {"tie_word_embeddings", next(iter(own))} <= set(read)  # these are never refused


def test_swish_is_the_other_name_of_silu(tmp_path):
    x = torch.linspace(-20, 20, 1001)
    assert torch.equal(transformers.activations.ACT2FN["swish"](x), torch.nn.functional.silu(x))
    raw = transformers.AutoConfig.for_model("qwen2", **SIZES).to_dict() | {"architectures": ["Qwen2ForCausalLM"]}
    configs = [parse_config(raw | {"hidden_act": name}, tmp_path) for name in ("swish", "silu")]
    assert configs[0] == configs[1]
    with pytest.raises(ValueError, match="hidden_act='gelu' is not what a qwen2 model computes"):
        parse_config(raw | {"hidden_act": "gelu"}, tmp_path)
