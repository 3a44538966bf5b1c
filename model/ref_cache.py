"""Reference log-probs on disk: each row is computed once, checked when read, and shared by every run of a sweep.

    DIRECTORY/<key>/part_00000.safetensors   float32 log-probs of the first PART_ROWS rows, with key and checksum
    DIRECTORY/<key>/part_00001.safetensors   ...

The key is the sha256 of everything that decides the numbers: the weights, the precision, and the ids and masks of every
row (in which data, tokenizer, chat template and max_length are all seen). So another model or another file never finds
an old cache, and a run that was interrupted goes on with the part that is missing.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.weights.adapter import find_base, is_adapter
from model.weights.paths import find_model

PART_ROWS = 512  # rows of a file: what an interruption can cost


def row_key(row: dict) -> bytes:
    """16 bytes that stand for a row's ids and mask."""
    digest = hashlib.sha256(torch.as_tensor(row["input_ids"], dtype=torch.int64).numpy().tobytes())
    digest.update(torch.as_tensor(row["completion_mask"], dtype=torch.bool).numpy().tobytes())
    return digest.digest()[:16]


def weights_digest(path: str | Path) -> str:
    """sha256 of a checkpoint's configs and weights, as files, its base's included where it is an adapter.

    Equal digests are equal models.
    """
    found = find_model(path)
    names = ("*.safetensors", "config.json", "adapter_config.json")
    files = sorted(file for name in names for file in found.glob(name)) if found.is_dir() else [found]
    digest = hashlib.sha256()
    if found.is_dir() and is_adapter(found):
        digest.update(weights_digest(find_base(found)).encode())
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def cached_logprobs(
    compute: Callable[[list[dict]], Tensor], rows: Sequence[dict], *, directory: Path, weights: str, precision: str,
    rank: int, world_size: int,
) -> dict[bytes, float]:  # fmt: skip
    """The log-prob of every row's completion in nats, by `row_key`; what the disk lacks is computed, a share a rank.

    Args:
        compute: (n,) log-probs of n rows; called on consecutive rows, so that rows of one prompt stay together.
        rows: {"input_ids", "completion_mask"}; every rank passes all of them.
        weights: `weights_digest` of the model behind `compute`.
    Raises:
        ValueError: a file was damaged, or belongs to another cache; it says which.
    """
    keys = [row_key(row) for row in rows]
    key = hashlib.sha256("\n".join([weights, precision, *(k.hex() for k in keys)]).encode()).hexdigest()
    home = Path(directory) / key[:32]
    home.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(rows), PART_ROWS)
    for number, start in enumerate(starts):
        path = home / f"part_{number:05d}.safetensors"
        if number % world_size == rank and not path.exists():
            _write(path, compute(list(rows[start : start + PART_ROWS])), key)
    if dist.is_initialized():
        dist.barrier()
    parts = [_read(home / f"part_{number:05d}.safetensors", key) for number in range(len(starts))]
    return dict(zip(keys, torch.cat(parts).tolist(), strict=True))


def _write(path: Path, logprobs: Tensor, key: str) -> None:
    logprobs = logprobs.detach().float().cpu().contiguous()
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # runs of a sweep may write the same part at once
    save_file({"logprobs": logprobs}, aside, metadata={"key": key, "sha256": _checksum(logprobs)})
    os.replace(aside, path)


def _read(path: Path, key: str) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            logprobs, written = file.get_tensor("logprobs"), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it, and it will be computed again") from None
    if written.get("key") != key:
        raise ValueError(f"{path} is stale: it was computed for another model or other data; delete it")
    if written.get("sha256") != _checksum(logprobs):
        raise ValueError(f"{path} is damaged: its checksum differs; delete it, and it will be computed again")
    return logprobs


def _checksum(logprobs: Tensor) -> str:
    return hashlib.sha256(logprobs.numpy().tobytes()).hexdigest()
