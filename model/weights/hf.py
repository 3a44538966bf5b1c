"""Hugging Face directories, both ways: config.json and safetensors <-> ModelConfig and tensors."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.weights.hf_config import parse_config

# What transformers' classifiers lack beside ours: a bias, and the normalisation of scores.
NEUTRAL = {"score.bias": torch.zeros(1), "score.gain": torch.ones(()), "score.shift": torch.zeros(())}


# What older files hold beside the weights: transformers computes these anew.
BUFFERS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")


class HFReader:
    """Weights of a directory by Hugging Face name, read when asked for."""

    def __init__(self, directory: Path):
        self.path = directory
        self.raw = read_json(directory / "config.json")
        self.config, self.kind = parse_config(self.raw, directory)
        self.absent = {} if self.kind == "policy" else NEUTRAL
        self.files = {}  # name -> open file
        for path in weight_files(directory):
            file = open_safetensors(path)
            self.files.update(dict.fromkeys(file.keys(), file))

    def names(self) -> set[str]:
        return {name for name in self.files if not name.endswith(BUFFERS)} | set(self.absent)

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


def open_safetensors(path: Path):
    """The open file. Raises ValueError where it is none."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); copy it again") from error


def weight_files(directory: Path) -> list[Path]:
    """model.safetensors, which goes before an index as in transformers, or the files that the index names."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise ValueError(f"{index} needs a weight_map from tensor to file")
        names = set(files.values())
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{index} names files outside its directory")
        missing = sorted(name for name in names if not (directory / name).exists())
        if missing:
            listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ValueError(f"{directory} lacks {len(missing)} of {len(names)} weight files: {listed}; copy them too")
        return [directory / name for name in sorted(names)]
    if list(directory.glob("*.bin")) or list(directory.glob("*.pth")):
        raise ValueError(
            f"{directory} holds its weights as pickle (.bin or .pth), which can run code when loaded; "
            "rewrite them as safetensors with transformers' save_pretrained and pass that directory"
        )
    raise ValueError(f"{directory} lacks model.safetensors and model.safetensors.index.json; copy its weights too")
