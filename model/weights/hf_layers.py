"""What differs between the layers of a model, in config.json: windows, DeltaNets, positions, experts."""

from model.config import ModelConfig
from model.families import FAMILIES

LAYER_TYPES = {"full_attention": "full", "sliding_attention": "window", "linear_attention": "linear"}


def read_layers(left: dict, raw: dict, family: str, num_layers: int) -> dict:
    """Fields of ModelConfig: the window, the layers that have it, and the layers without rotary positions."""
    facts, layers = FAMILIES[family], range(num_layers)
    options = {}
    if family == "smollm3":
        interval = raw.get("no_rope_layer_interval", 4)
        turned = left.pop("no_rope_layers", None) or [(i + 1) % interval != 0 for i in layers]  # 1: it has positions
        options["rotary_layers"] = tuple(bool(x) for x in turned)
    if facts.linear:
        every = raw.get("full_attention_interval", 4)
        types = left.pop("layer_types", None) or [
            "full_attention" if not (i + 1) % every else "linear_attention" for i in layers
        ]
        return {"layer_kinds": tuple(kinds_of(types, num_layers))}
    if not facts.windowed:
        return options
    switch = family.startswith(("qwen", "smollm3"))  # these families have the key use_sliding_window
    window = left.pop("sliding_window", 4096 if family.startswith("qwen") else facts.window)
    types = left.pop("layer_types", None) if facts.own_layer_types else None
    if switch and not left.pop("use_sliding_window", False):
        window = None
    if types is not None:
        kinds = kinds_of(types, num_layers)
    elif family in ("gemma3_text", "exaone4"):
        every = raw.get("sliding_window_pattern", len(facts.kinds))
        kinds = ["window" if (i + 1) % every else "full" for i in layers]
    elif facts.kinds:
        kinds = [facts.kinds[i % len(facts.kinds)] for i in layers]
    elif family in ("qwen2", "qwen3"):
        kinds = ["window" if i >= raw.get("max_window_layers", 28) else "full" for i in layers]
    elif family == "qwen2_moe":
        kinds = ["full" if i % 2 or i >= raw.get("max_window_layers", 28) else "window" for i in layers]
    elif family == "smollm3":
        kinds = ["full" if turned else "window" for turned in options["rotary_layers"]]
    else:
        kinds = ["window"] * num_layers
    if window is None and types is not None and "window" in kinds:
        raise ValueError("layer_types names sliding_attention, but sliding_window or use_sliding_window turns it off")
    if facts.windows_rotate and window is not None and "window" not in kinds:
        raise ValueError(f"sliding_window={window} but no layer has it, so that no layer would rotate; set it to null")
    if window is None or "window" not in kinds:
        return options
    return options | {"sliding_window": window, "layer_kinds": tuple(kinds)}


def read_dense(left: dict, num_layers: int) -> dict:
    """Fields of ModelConfig: the layers that have experts, and the width of the MLP in the others."""
    step, dense = left.pop("decoder_sparse_step", 1), left.pop("mlp_only_layers", None) or []
    experts = tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers))
    return {} if all(experts) else {"expert_layers": experts, "dense_size": left.pop("intermediate_size")}


def kinds_of(types: list[str], num_layers: int) -> list[str]:
    """The kinds of layers in a config.json. Raises ValueError on unknown ones."""
    if unknown := set(types) - set(LAYER_TYPES):
        raise ValueError(f"layer_types holds {sorted(unknown)}; known: {', '.join(LAYER_TYPES)}")
    if len(types) != num_layers:
        raise ValueError(f"layer_types names {len(types)} layers, num_hidden_layers={num_layers}")
    return [LAYER_TYPES[name] for name in types]


def write_layers(config: ModelConfig) -> dict:
    """The keys of config.json that `read_layers` and `read_dense` read."""
    raw: dict = {}
    facts, layers = config.facts, range(config.num_layers)
    if facts.windowed:
        raw["sliding_window"] = config.sliding_window
        if facts.own_layer_types and not facts.windows_rotate and config.sliding_window is None:
            raw["sliding_window"] = facts.window  # no layer has it, but transformers fails without a number
    if facts.own_layer_types:
        names = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
        raw["layer_types"] = [names[config.kind(i)] for i in layers]
    if config.family in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3"):
        raw["use_sliding_window"] = config.sliding_window is not None
    if config.family == "smollm3":
        raw["no_rope_layers"] = [int(config.turns(i)) for i in layers]
    if config.expert_layers:
        dense = [i for i in layers if not config.has_experts(i)]
        raw |= {"intermediate_size": config.dense_size, "mlp_only_layers": dense, "decoder_sparse_step": 1}
    return raw
