"""Training state on disk: sharded tensors through DCP, the rest as JSON; complete and checked, or not there.

    checkpoints/step_000100/   *.distcp, .metadata   every tensor, each rank's shards
                               rank_0.json           what is not a tensor: loader place, random states, counters
                               meta.json             step, tokens seen, git sha
                               checksums             sha256 of every file above; the text itself is compared whole
    checkpoints/latest         -> step_000100        moves last

A checkpoint is read only by the run that wrote it; weights from elsewhere come through model.build (never pickle).
"""

import errno
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

CHECKSUMS = "checksums"
PICKLED = re.compile(  # all that DCP's .metadata names
    r"torch\.distributed\.checkpoint\.(metadata\.\w+|filesystem\._StorageInfo)|torch\.(Size|b?float\d+|u?int\d+|bool)"
    r"|torch\.serialization\._get_layout|pathlib\.\w+"
)


def save_checkpoint(root: Path, step: int, state: dict[str, Any], meta: dict[str, Any], *, rank: int) -> Path:
    """Write `root/step_NNNNNN` aside, make it durable, rename it, then move `latest`. All ranks call it.

    Args:
        state: nested dicts and lists of tensors (sharded or equal on all ranks) and JSON values (per rank).
    Raises:
        OSError: the disk is full or cannot be written; what was there before stays.
    """
    target, aside = root / f"step_{step:06d}", root / f".step_{step:06d}.tmp"
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    _wait()
    tensors: dict[str, Tensor] = {}
    tree = _split(state, "", tensors)
    try:
        with _single_process_is_meant():
            dcp.save(tensors, checkpoint_id=aside, no_dist=not dist.is_initialized())
    except CheckpointException as error:  # no Exception: it would pass every handler
        raise _what_happened(next(iter(error.failures.values()))[0]) from None
    (aside / f"rank_{rank}.json").write_text(json.dumps(tree), encoding="utf-8")
    _wait()
    if rank == 0:
        (aside / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        (aside / CHECKSUMS).write_text(_checksums(aside), encoding="utf-8")
        for path in [*aside.iterdir(), aside]:
            sync(path)
        shutil.rmtree(target, ignore_errors=True)  # only a damaged one can be there
        os.replace(aside, target)
        sync(root)
        point_latest(target)
    _wait()
    return target


def load_checkpoint(directory: Path, current: dict[str, Any], *, rank: int) -> dict[str, Any]:
    """The saved state. Tensors of `current` (same structure) are filled in place, so sharded ones load sharded.

    Any number of ranks may read what another number wrote: a rank that was not there reads what rank 0 left.

    Raises:
        ValueError: it was not written by DCP: its pickled metadata names something that could run code.
    """
    with open(directory / ".metadata", "rb") as file:
        _Metadata(file).load()
    own = directory / f"rank_{rank}.json"
    tree = json.loads((own if own.exists() else directory / "rank_0.json").read_text(encoding="utf-8"))
    reader = dcp.FileSystemReader(directory)
    templates: dict[str, Tensor] = {}
    _split(current, "", templates)
    tensors = {}
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata), f"{key} is not a tensor"
        here = templates.get(key)
        fits = here is not None and here.shape == stored.size and here.dtype == stored.properties.dtype
        tensors[key] = here if fits else torch.empty(stored.size, dtype=stored.properties.dtype)
    with _single_process_is_meant():
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    return _join(tree, tensors)


def find_checkpoint(root: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint and its meta; damaged ones are named through `warn` and passed over.

    Raises:
        ValueError: there are checkpoints, and every one is damaged.
    """
    candidates = _checkpoints(root)
    for path in reversed(candidates):
        damage = find_damage(path)
        if damage is None:
            return path, json.loads((path / "meta.json").read_text(encoding="utf-8"))
        warn(f"checkpoint {path} is damaged ({damage}); trying the one before")
    if candidates:
        raise ValueError(f"every checkpoint in {root} is damaged; start again with overwrite=true")
    return None


def find_damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every byte of every file counts."""
    try:
        written = (directory / CHECKSUMS).read_bytes()
    except OSError as error:
        return f"no {CHECKSUMS}: {error.strerror}"
    found = _checksums(directory).encode()
    if written == found:
        return None
    differ = sorted(set(written.splitlines()) ^ set(found.splitlines()))
    names = {line.split(b"  ")[-1].decode(errors="replace") for line in differ}
    return "checksum differs: " + ", ".join(sorted(names) or [CHECKSUMS])


def best_step(rows: Iterable[dict], root: Path, metric: str | None) -> set[str]:
    """The name of the checkpoint whose row has the lowest `metric` (the highest, where it is written -metric)."""
    if metric is None:
        return set()
    sign, name = (-1, metric[1:]) if metric.startswith("-") else (1, metric)
    figures = {f"step_{row['step']:06d}": sign * row[name] for row in rows if math.isfinite(row.get(name, math.nan))}
    there = [path.name for path in _checkpoints(root) if path.name in figures]
    return {min(there, key=figures.get)} if there else set()


def prune_checkpoints(root: Path, *, step: int, keep_last: int, keep: set[str]) -> None:
    """Delete all but the newest `keep_last` checkpoints up to `step`, which was just saved, and those named in `keep`.

    Later ones are there only where a resumed run passed over them, because they are damaged.
    """
    for aside in root.glob(".step_*.tmp"):  # of a save that was killed
        shutil.rmtree(aside)
    paths = _checkpoints(root)
    kept = [path for path in paths if step_of(path) <= step][-keep_last:]
    for path in paths:
        if path not in kept and path.name not in keep:
            shutil.rmtree(path)


def step_of(path: Path) -> int:
    """The number of completed steps in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


def point_latest(target: Path) -> None:
    """Let `latest` beside a checkpoint lead to it."""
    link = target.with_name("latest")
    aside = target.with_name(".latest.tmp")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target.name)
    os.replace(aside, link)
    sync(link.parent)


def sync(path: Path) -> None:
    """Wait until the file, or the directory's list of names, is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _what_happened(error: BaseException) -> BaseException:
    """The error of the disk behind what torch's archive writer raises: where a write fails, so does closing it."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return link
        link = link.__cause__ or link.__context__
    if isinstance(error, RuntimeError) and "inline_container" in str(error):  # of another rank: sent without its cause
        return OSError(errno.EIO, f"a file of the checkpoint could not be written ({error}); is the disk full?")
    return error


class _Metadata(pickle.Unpickler):
    """Reads only what DCP writes: a run directory may have come from somebody else."""

    def find_class(self, module: str, name: str) -> Any:
        if not PICKLED.fullmatch(f"{module}.{name}"):
            raise ValueError(f"the checkpoint's .metadata names {module}.{name}, which could run code; it was not read")
        return super().find_class(module, name)


def _checkpoints(root: Path) -> list[Path]:
    """Complete or damaged, oldest first. Whatever else lies there (a copy under another name) is not ours."""
    found = [path for path in root.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name) and path.is_dir()]
    return sorted(found, key=step_of)  # as a number: step_1000000 comes after step_999999


def _split(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON part of a nested state; each tensor moves into `tensors` and leaves its key behind."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, dict):  # as pairs: JSON would turn whole-number keys into text
        return {"pairs": [[k, _split(v, f"{key}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_split(v, f"{key}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _join(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_join(v, tensors) for v in tree]
    if isinstance(tree, dict):
        return tensors[tree["tensor"]] if "tensor" in tree else {k: _join(v, tensors) for k, v in tree["pairs"]}
    return tree


def _checksums(directory: Path) -> str:
    lines = []
    for path in sorted(directory.iterdir()):
        if path.name != CHECKSUMS:
            with open(path, "rb") as file:
                lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    return "".join(lines)


@contextmanager
def _single_process_is_meant() -> Iterator[None]:
    """DCP warns of a missing process group although it is told that there is none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
