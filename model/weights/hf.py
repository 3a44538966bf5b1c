"""Read and write Hugging Face directories: config.json and safetensors <-> ModelConfig and tensors."""

import errno
import json
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.weights.hf_config import parse_config
from model.weights.mxfp4 import dequantise
from model.weights.text_part import has_other_parts, text_config, text_names
from runtime.files import check_sums

MAX_JSON = 1 << 26  # bytes; the largest known index of a model has 5 MB
# Weights of our heads that transformers' classifiers do not have: a bias, and the normalisation of scores.
NEUTRAL = {"score.bias": torch.zeros(1), "score.gain": torch.ones(()), "score.shift": torch.zeros(())}


# Tensors in older files that are no weights: transformers computes them at loading.
BUFFERS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")


STACKS = (".experts.gate_up_proj", ".experts.down_proj")  # of all experts in one tensor, as in Qwen3.5's files


class HFReader:
    """Weights of a directory by Hugging Face name, read lazily."""

    def __init__(self, directory: Path):
        self.path = directory
        if not dist.is_initialized() or dist.get_rank() == 0:  # one rank reads all files
            weights = [path.name for path in directory.glob("*.safetensors")]
            check_sums(directory, ["config.json", "model.safetensors", "model.safetensors.index.json", *weights])
        self.raw = text_config(read_json(directory / "config.json"), directory)
        self.config, self.kind = parse_config(self.raw, directory)
        self.absent = {} if self.kind == "policy" else NEUTRAL
        self.packed = set()  # names whose tensors are stored as MXFP4 blocks
        stored = {}
        for path in weight_files(directory):
            file = open_safetensors(path)
            stored.update(dict.fromkeys(file.keys(), file))
        names = text_names(stored, directory) if has_other_parts(self.config) else {name: name for name in stored}
        self.files = {name: (stored[there], there) for name, there in names.items()}  # open file, its name there
        self.stacked = {}  # the matrices of experts that are stacked in one tensor
        if self.config.num_experts and self.config.family != "gpt_oss":
            shapes = {name: self.shape(name) for name in self.files if name.endswith(STACKS)}
            self.stacked = each_expert(shapes)
        if (self.raw.get("quantization_config") or {}).get("quant_method") == "mxfp4":
            self.packed = {name.removesuffix("_blocks") for name in self.files if name.endswith("_blocks")}

    def names(self) -> set[str]:
        names = {name for name in self.files if not name.endswith(BUFFERS)} | set(self.absent)
        names -= {f"{name}_{kind}" for name in self.packed for kind in ("blocks", "scales")}
        return names - {whole for whole, *_ in self.stacked.values()} | self.packed | set(self.stacked)

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.packed:
            count, out, groups, _ = self.shape(name + "_blocks")
            return count, 32 * groups, out
        if name in self.stacked:
            whole, _, start, stop = self.stacked[name]
            return stop - start, *self.shape(whole)[2:]
        if name not in self.files:
            return tuple(self.absent[name].shape)
        file, there = self.files[name]
        return tuple(file.get_slice(there).get_shape())

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or only these rows of it, which are then the only ones read."""
        if name in self.packed:
            return dequantise(self.read(name + "_blocks", rows), self.read(name + "_scales", rows))
        if name in self.stacked:
            whole, expert, start, stop = self.stacked[name]
            first, last, _ = (rows or slice(None)).indices(stop - start)
            file, there = self.files[whole]
            return file.get_slice(there)[expert : expert + 1, start + first : start + last].squeeze(0)
        if name not in self.files:
            return self.absent[name]
        file, there = self.files[name]
        if rows is None or not self.shape(name):
            return file.get_tensor(there)
        return file.get_slice(there)[rows]


def each_expert(stacks: dict[str, tuple[int, ...]]) -> dict[str, tuple[str, int, int, int]]:
    """name of one expert's matrix -> the stack (E, rows, in) that holds it, the expert, its first and its last row.

    stacks: name -> shape. Raises ValueError where a stack does not have three dimensions.
    """
    found = {}
    for name, shape in stacks.items():
        if len(shape) != 3:
            raise ValueError(f"{name} has shape {shape}, but all experts in one tensor have three dimensions")
        place, _, leaf = name.rpartition(".")
        kinds = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        height = shape[1] // len(kinds)
        for expert in range(shape[0]):
            for number, kind in enumerate(kinds):
                found[f"{place}.{expert}.{kind}.weight"] = name, expert, number * height, (number + 1) * height
    return found


def save_tensors(weights: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file. Raises OSError where the disk is full or cannot be written."""
    try:
        save_file(weights, path, metadata=metadata)
    except SafetensorError as error:  # the library raises only this type
        raise OSError(errno.EIO, f"{path} could not be written ({error}); is the disk full?") from error


def read_json(path: Path, *, limit: int = MAX_JSON) -> dict:
    """The JSON object in the file. Raises ValueError that names the file and the fault."""
    try:
        if path.stat().st_size > limit:
            raise ValueError(f"it has {path.stat().st_size} bytes, more than {limit}")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; a model directory needs config.json and *.safetensors") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, not a JSON object")
    return raw


def open_safetensors(path: Path):
    """The open safetensors file. Raises ValueError where it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); copy it again") from error


def weight_files(directory: Path) -> list[Path]:
    """The weight files: model.safetensors if it exists, as in transformers, else the files named in the index."""
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
