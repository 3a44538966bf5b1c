"""Hugging Face directories, both ways: config.json and safetensors <-> ModelConfig and tensors."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import ROPE_KEYS, ROPE_OPTIONS, ModelConfig

MODEL_TYPES = {"Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3"}
KINDS = {"ForCausalLM": "policy", "ForSequenceClassification": "reward", "ForTokenClassification": "value"}
ARCHITECTURES = {f"{t}{k}": (family, kind) for t, family in MODEL_TYPES.items() for k, kind in KINDS.items()}


# What transformers' classifiers lack beside ours: a bias, and the normalisation of scores.
NEUTRAL = {"score.bias": torch.zeros(1), "score.gain": torch.ones(()), "score.shift": torch.zeros(())}


class HFReader:
    """Weights of a directory by Hugging Face name, read when asked for."""

    def __init__(self, directory: Path):
        self.path = directory
        self.raw = read_json(directory / "config.json")
        self.config, self.kind = parse_config(self.raw, directory)
        self.absent = {} if self.kind == "policy" else NEUTRAL
        self.files = {}  # name -> open file
        for path in weight_files(directory):
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is truncated or no safetensors file ({error}); copy it again") from error
            self.files.update(dict.fromkeys(file.keys(), file))

    def names(self) -> set[str]:
        return {name for name in self.files if not name.endswith("rotary_emb.inv_freq")} | set(self.absent)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape() if name in self.files else self.absent[name].shape)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or these rows of it, of which only they are read."""
        if name not in self.files:
            return self.absent[name]
        whole = rows is None or not self.shape(name)
        return self.files[name].get_tensor(name) if whole else self.files[name].get_slice(name)[rows]


def read_json(path: Path) -> dict:
    """The object in the file. Raises ValueError that names the file and what is wrong with it."""
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; a model directory needs config.json and *.safetensors") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, not a JSON object")
    return raw


def weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the files that model.safetensors.index.json names."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise ValueError(f"{index} needs a weight_map from tensor to file")
        names = set(files.values())
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{index} names files outside its directory")
        files = [directory / name for name in sorted(names)]
    else:
        files = [directory / "model.safetensors"]
    missing = [path.name for path in files if not path.exists()]
    if not missing:
        return files
    if list(directory.glob("*.bin")):
        raise ValueError(
            f"{directory} holds its weights as pickle (.bin), which can run code when loaded; "
            "rewrite them as safetensors with transformers' save_pretrained and pass that directory"
        )
    raise ValueError(f"{directory} lacks {', '.join(missing)}")


def parse_config(raw: dict, directory: Path) -> tuple[ModelConfig, str]:
    """ModelConfig and kind (policy, reward, value) of a config.json. Raises ValueError on what we do not compute."""
    names = raw.get("architectures") or [None]
    name = names[0] if isinstance(names, list) else names
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"{directory}: unknown architecture {name!r}; known: {', '.join(ARCHITECTURES)}")
    family, kind = ARCHITECTURES[name]
    for key, wanted in (("hidden_act", "silu"), ("mlp_bias", False), ("use_sliding_window", False)):
        if raw.get(key, wanted) != wanted:
            raise ValueError(f"{directory}: {key}={raw[key]!r} in config.json is not supported, only {wanted!r}")
    if raw.get("attention_bias", False) and family != "qwen2":
        raise ValueError(f"{directory}: attention_bias=true in config.json is not supported for {name}")
    try:
        theta, scaling = parse_rope(raw)
        config = ModelConfig(
            family=family,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            max_length=raw["max_position_embeddings"],
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=raw["rms_norm_eps"],
            tie_embeddings=raw.get("tie_word_embeddings", False),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            sliding_window=raw.get("sliding_window") if family == "mistral" else None,
        )
    except KeyError as error:
        raise ValueError(f"{directory}/config.json lacks {error}") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:  # a value of another kind than meant
        raise ValueError(f"{directory}/config.json: {error}") from None
    return config, kind


def parse_rope(raw: dict) -> tuple[float, dict | None]:
    """rope_theta and scaling, from transformers 5's rope_parameters or the older rope_theta and rope_scaling."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    known = ROPE_KEYS.get(kind, set()) | ROPE_OPTIONS.get(kind, set())
    scaling = {"rope_type": kind} | {key: value for key, value in rope.items() if key in known}
    if kind == "yarn":
        scaling.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    return float(theta), scaling


def make_config_json(config: ModelConfig, kind: str, dtype: str, *, bos_id, eos_id, pad_id) -> dict:
    """config.json that transformers (4 and 5), vLLM and lm-eval read."""
    title = next(title for title, family in MODEL_TYPES.items() if family == config.family)
    suffix = next(suffix for suffix, name in KINDS.items() if name == kind)
    raw = {
        "architectures": [title + suffix],
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
        "rope_scaling": config.rope_scaling,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }
    if config.family == "mistral":
        raw["sliding_window"] = config.sliding_window
    if config.family == "qwen2":
        raw["use_sliding_window"] = False
    if kind != "policy":
        raw["id2label"], raw["label2id"] = {"0": kind}, {kind: 0}  # one label
    return raw
