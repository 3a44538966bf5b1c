"""Configs from before `layer_types`: the kinds of their layers are those that transformers derives."""

import pytest
from transformers import Exaone4Config, Gemma2Config, Gemma3TextConfig, Qwen2Config, Qwen3Config, SmolLM3Config

from model.weights.hf_layers import LAYER_TYPES, read_layers

OLD = [
    (Gemma3TextConfig, "gemma3_text", {"sliding_window_pattern": 3, "sliding_window": 16}),
    (Gemma3TextConfig, "gemma3_text", {"sliding_window": 16}),
    (Exaone4Config, "exaone4", {"sliding_window_pattern": 3, "sliding_window": 16}),
    (Gemma2Config, "gemma2", {"sliding_window": 16}),
    (Qwen2Config, "qwen2", {"max_window_layers": 2, "use_sliding_window": True, "sliding_window": 16}),
    (Qwen3Config, "qwen3", {"max_window_layers": 5, "use_sliding_window": True, "sliding_window": 16}),
    (SmolLM3Config, "smollm3", {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 16}),
]


@pytest.mark.parametrize("config, family, keys", OLD)
def test_layer_kinds_without_layer_types_are_those_of_transformers(config, family, keys):
    theirs = config(num_hidden_layers=8, **keys)
    ours = read_layers(dict(keys), keys, family, 8)
    assert ours["sliding_window"] == 16
    assert list(ours["layer_kinds"]) == [LAYER_TYPES[name] for name in theirs.layer_types]
    if family == "smollm3":
        assert list(ours["rotary_layers"]) == [bool(turned) for turned in theirs.no_rope_layers]


@pytest.mark.parametrize("config, family", [(Qwen2Config, "qwen2"), (Qwen3Config, "qwen3"), (SmolLM3Config, "smollm3")])
def test_a_window_needs_use_sliding_window_in_the_families_that_have_the_key(config, family):
    theirs = config(num_hidden_layers=4, sliding_window=16, max_window_layers=0)
    ours = read_layers({"sliding_window": 16}, {"max_window_layers": 0}, family, 4)
    assert set(theirs.layer_types) == {"full_attention"} and "sliding_window" not in ours


def test_an_exaone_whose_window_no_layer_has_is_refused():
    keys = {"sliding_window": 16, "layer_types": ["full_attention"] * 4}
    with pytest.raises(ValueError, match="sliding_window=16 but no layer has it"):
        read_layers(dict(keys), keys, "exaone4", 4)
