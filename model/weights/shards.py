"""A model's weights written as they come, into files of at most SHARD_BYTES: memory holds one file's at a time."""

import json
import os
from pathlib import Path

from torch import Tensor

from model.weights.hf import save_tensors
from runtime.files import write_whole

SHARD_BYTES = 5_000_000_000  # as transformers has it


class ShardWriter:
    """model.safetensors; where that would pass SHARD_BYTES, model-00001-of-0000N.safetensors, ... and their index."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.held: dict[str, Tensor] = {}
        self.files: list[tuple[Path, list[str]]] = []  # and the tensors in each
        self.size = self.total = 0  # bytes held, and of all

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor; writes what is held where this one would be too much beside it."""
        if self.held and self.size + tensor.nbytes > SHARD_BYTES:
            self.write()
        self.held[name] = tensor
        self.size, self.total = self.size + tensor.nbytes, self.total + tensor.nbytes

    def write(self) -> None:
        """One file of what is held, which is held no longer."""
        path = self.directory / f"model-{len(self.files) + 1:05d}.safetensors"
        save_tensors(self.held, path, {"format": "pt"})
        self.files.append((path, list(self.held)))
        self.held, self.size = {}, 0

    def close(self) -> None:
        """Writes what is left, and gives the files their names."""
        self.write()
        if len(self.files) == 1:
            os.replace(self.files[0][0], self.directory / "model.safetensors")
            return
        places: dict[str, str] = {}
        for path, names in self.files:
            final = path.with_name(f"{path.stem}-of-{len(self.files):05d}.safetensors")
            os.replace(path, final)
            places |= dict.fromkeys(names, final.name)
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(places.items()))}
        write_whole(self.directory / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
