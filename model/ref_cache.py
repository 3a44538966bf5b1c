"""Reference log-probs on disk. Each row is computed once, verified when read, and shared by the runs of a sweep.

    DIRECTORY/<key>/<rows>.safetensors   16-byte keys and float32 log-probs of up to PART_ROWS rows, with a checksum

<key> is the sha256 of the reference's weights and the precision, so another model never uses an old cache. The key of a
row is the hash of its ids and mask, which depend on data, tokenizer, chat template and max_length. So runs on other
files, longer runs and resumed runs reuse the rows that they have in common, and compute the missing ones.
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

PART_ROWS = 512  # rows per file: at most so many are lost by an interruption


def row_key(row: dict) -> bytes:
    """A 16-byte hash of a row's ids and mask."""
    digest = hashlib.sha256(torch.as_tensor(row["input_ids"], dtype=torch.int64).numpy().tobytes())
    digest.update(torch.as_tensor(row["completion_mask"], dtype=torch.bool).numpy().tobytes())
    return digest.digest()[:16]


def weights_digest(path: str | Path) -> str:
    """sha256 of the config and weight files of a checkpoint, and of its base's where it is an adapter.

    Checkpoints with equal digests are equal models.
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
    compute: Callable[[list[dict]], Tensor],
    rows: Iterable[dict],
    *,
    directory: Path,
    weights: str,
    precision: str,
    rank: int,
    world_size: int,
) -> dict[bytes, float]:
    """`row_key` -> log-prob of the row's completion in nats. Each rank computes a share of the rows not on disk.

    Args:
        compute: returns (n,) log-probs of n rows. It gets consecutive rows, so rows of a prompt stay together.
        rows: {"input_ids", "completion_mask"}. Every rank passes all rows. They are read once, in order.
        weights: `weights_digest` of the model that computes.
    Raises:
        ValueError: a file is damaged or belongs to another model. The message names the file.
    """
    key = hashlib.sha256(f"{weights}\n{precision}".encode()).hexdigest()
    home = Path(directory) / key[:32]
    home.mkdir(parents=True, exist_ok=True)
    table = _read_all(home, key)
    wanted: dict[bytes, None] = {}
    if dist.is_initialized():
        dist.barrier()  # all ranks read before one writes, so that they agree on the missing rows
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
    """Yield the rows that the table lacks, by key, PART_ROWS at a time. `wanted` collects the keys of all rows."""
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
    tmp_path = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # runs of a sweep may write the same part at once
    tensors = {"keys": names, "logprobs": logprobs}
    save_tensors(tensors, tmp_path, {"key": key, "sha256": _checksum(names, logprobs)})
    sync(tmp_path)
    os.replace(tmp_path, path)


def _read_all(home: Path, key: str) -> dict[bytes, float]:
    """row key -> log-prob of every row in the directory."""
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
