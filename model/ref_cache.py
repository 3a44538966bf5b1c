"""Reference log-probs on disk: each row is computed once, checked when read, and shared by every run of a sweep.

    DIRECTORY/<key>/<rows>.safetensors   16-byte keys and float32 log-probs of up to PART_ROWS rows, with a checksum

<key> is the sha256 of what computes: the weights and the precision. A row's key is that of its ids and mask (in which
data, tokenizer, chat template and max_length are all seen). So another model never finds an old cache, other files and
longer runs find the rows that they share, and a run that was interrupted goes on with the rows that are missing.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.weights.adapter import find_base, is_adapter
from model.weights.hf import save_tensors
from model.weights.paths import find_model
from runtime.files import sync

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
    compute: Callable[[list[dict]], Tensor], rows: Iterable[dict], *, directory: Path, weights: str, precision: str,
    rank: int, world_size: int,
) -> dict[bytes, float]:  # fmt: skip
    """The log-prob of every row's completion in nats, by `row_key`; what the disk lacks is computed, a share a rank.

    Args:
        compute: (n,) log-probs of n rows; called on consecutive rows, so that rows of one prompt stay together.
        rows: {"input_ids", "completion_mask"}; every rank passes all of them. They are read once, in their order.
        weights: `weights_digest` of the model behind `compute`.
    Raises:
        ValueError: a file was damaged, or belongs to another model; it says which.
    """
    key = hashlib.sha256(f"{weights}\n{precision}".encode()).hexdigest()
    home = Path(directory) / key[:32]
    home.mkdir(parents=True, exist_ok=True)
    table, wanted = _read_all(home, key), {}
    if dist.is_initialized():
        dist.barrier()  # all have read before one writes: the ranks' lists of what is missing are the same
    for number, part in enumerate(_missing_parts(rows, table, wanted)):
        if number % world_size == rank:
            _write(home, list(part), compute(list(part.values())), key)
    if dist.is_initialized():
        dist.barrier()
    table = _read_all(home, key) if wanted.keys() - table.keys() else table
    if lacking := wanted.keys() - table.keys():
        raise ValueError(f"{home} lacks {len(lacking)} rows that another rank was to compute")
    return {known: table[known] for known in wanted}


def _missing_parts(
    rows: Iterable[dict], table: dict[bytes, float], wanted: dict[bytes, None]
) -> Iterator[dict[bytes, dict]]:
    """What the table lacks, up to PART_ROWS rows by their keys; `wanted` gets the key of every row."""
    part: dict[bytes, dict] = {}
    for row in rows:
        key = row_key(row)
        if key not in wanted and key not in table:
            part[key] = row
        wanted[key] = None
        if len(part) == PART_ROWS:
            yield part
            part = {}
    if part:
        yield part


def _write(home: Path, keys: list[bytes], logprobs: Tensor, key: str) -> None:
    logprobs = logprobs.detach().float().cpu().contiguous()
    names = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), 16)
    path = home / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:32]}.safetensors"
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # runs of a sweep may write the same part at once
    tensors = {"keys": names, "logprobs": logprobs}
    save_tensors(tensors, aside, {"key": key, "sha256": _checksum(names, logprobs)})
    sync(aside)
    os.replace(aside, path)


def _read_all(home: Path, key: str) -> dict[bytes, float]:
    """Every row that the directory holds."""
    table: dict[bytes, float] = {}
    for path in sorted(home.glob("*.safetensors")):
        names, logprobs = _read(path, key)
        whole = names.numpy().tobytes()
        table |= zip((whole[i : i + 16] for i in range(0, len(whole), 16)), logprobs.tolist(), strict=True)
    return table


def _read(path: Path, key: str) -> tuple[Tensor, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            names, logprobs, written = file.get_tensor("keys"), file.get_tensor("logprobs"), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it, and it will be computed again") from None
    if written.get("key") != key:
        raise ValueError(f"{path} is stale: it was computed by another model; delete it")
    if written.get("sha256") != _checksum(names, logprobs):
        raise ValueError(f"{path} is damaged: its checksum differs; delete it, and it will be computed again")
    return names, logprobs


def _checksum(names: Tensor, logprobs: Tensor) -> str:
    return hashlib.sha256(names.numpy().tobytes() + logprobs.numpy().tobytes()).hexdigest()
