"""The text part of a multimodal checkpoint: its config.json, and its weights under the names of a text model."""

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from model.config import ModelConfig

log = logging.getLogger(__name__)

TEXT = {  # multimodal architecture -> its model_type, that of the text part, the text model's architecture
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", "qwen3_5_text", "Qwen3_5ForCausalLM"),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5_moe", "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"),
    "Gemma3ForConditionalGeneration": ("gemma3", "gemma3_text", "Gemma3ForCausalLM"),
}
OF_PICTURES = {  # keys outside of text_config that have no effect on text
    "vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
    "image_token_index", "boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id", "mm_tokens_per_image",
}  # fmt: skip
GEMMA3 = {  # transformers' defaults for keys that are missing in Gemma 3's published text_config
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
}
# Prefixes of the text part's weights in older and newer files -> those of the text model.
PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
LEFT_OUT = {  # the parts that are not read
    "model.visual.": "vision",
    "visual.": "vision",
    "model.vision_tower.": "vision",
    "vision_tower.": "vision",
    "model.multi_modal_projector.": "vision",
    "multi_modal_projector.": "vision",
    "mtp.": "multi-token prediction",
}


def has_other_parts(config: ModelConfig) -> bool:
    """Whether files of this family may hold other parts than the text model."""
    return any(config.family == family for _, family, _ in TEXT.values())


def text_config(raw: dict, directory: Path) -> dict:
    """The config.json of the text part. Without other parts, `raw` is returned as it is.

    Raises:
        ValueError: the text part does not fit the architecture, or the two parts contradict each other.
    """
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    if not isinstance(name, str) or name not in TEXT:
        return raw
    whole_type, text_type, architecture = TEXT[name]
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"{directory}/config.json: {name} needs a text_config, got {text!r}")
    for key, found, meant in (
        ("model_type", raw.get("model_type"), whole_type),
        ("text_config.model_type", text.get("model_type"), text_type),
    ):
        if found not in (None, meant):
            raise ValueError(f"{directory}/config.json contradicts itself: {name} with {key}={found!r}")
    ties = {part["tie_word_embeddings"] for part in (raw, text) if part.get("tie_word_embeddings") is not None}
    if len(ties) > 1:
        raise ValueError(
            f"{directory}/config.json contradicts itself: tie_word_embeddings differs in text_config and outside of "
            "it; correct the one that is wrong"
        )
    outer = {key: value for key, value in raw.items() if key not in OF_PICTURES | {"text_config"}}
    defaults = GEMMA3 if text_type == "gemma3_text" else {}
    return defaults | outer | text | {"architectures": [architecture], "model_type": text_type}


def text_names(names: Iterable[str], directory: Path) -> dict[str, str]:
    """name in the text model -> name in the file. The names of other parts are left out, and their number is logged."""
    found = {}
    left: Counter[str] = Counter()
    for name in names:
        other = next((part for prefix, part in LEFT_OUT.items() if name.startswith(prefix)), None)
        if other is not None:
            left[other] += 1
            continue
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        found[PREFIXES.get(prefix, "") + name.removeprefix(prefix)] = name
    if left:
        parts = " and ".join(f"{count} weights of its {part} part" for part, count in left.items())
        log.info("%s: only the text part is read; %s are left out, also from exported models", directory, parts)
    return found
