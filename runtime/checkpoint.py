"""Checkpoints of the training state: sharded tensors by DCP, all else as JSON. A checkpoint is complete or absent.

    checkpoints/step_000100/   rank_0.tensors, index.json   every tensor, each rank's shards (runtime/tensor_store.py)
                               rank_0.json   all that is no tensor: loader position, random states, counters
                               meta.json     step, tokens seen, git sha; the config and the sha256 of every input
                               checksums     sha256 of every file above; the text itself is compared whole
    checkpoints/latest         -> step_000100        moves last

Nothing is unpickled, because a run directory may come from somebody else.
"""

import json
import math
import os
import re
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

from runtime.files import named_in_errors, remove, sha256_of, sync
from runtime.tensor_store import TensorReader, TensorWriter

CHECKSUMS = "checksums"


def save_checkpoint(root: Path, step: int, state: dict[str, Any], meta: dict[str, Any], *, rank: int) -> Path:
    """Write to a temporary directory, sync it, rename it to `root/step_NNNNNN`, then move `latest`. All ranks call it.

    Args:
        state: nested dicts and lists of tensors (sharded or equal on all ranks) and JSON values (per rank).
    Raises:
        OSError: the disk is full or cannot be written. Earlier checkpoints stay.
    """
    target, tmp_path = root / f"step_{step:06d}", root / f".step_{step:06d}.tmp"
    if rank == 0:
        remove(tmp_path)
        tmp_path.mkdir(parents=True)
    _wait()
    tensors: dict[str, Tensor] = {}
    tree = _split(state, "", tensors)
    try:
        with _single_process_is_meant():
            dcp.save(tensors, storage_writer=TensorWriter(tmp_path), no_dist=not dist.is_initialized())
    except CheckpointException as error:  # it is not an Exception, so it would pass every handler
        with named_in_errors(tmp_path):
            raise next(iter(error.failures.values()))[0] from None
    with named_in_errors(tmp_path):
        (tmp_path / f"rank_{rank}.json").write_text(json.dumps(tree), encoding="utf-8")
    _wait()
    if rank == 0:
        with named_in_errors(tmp_path):
            (tmp_path / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
            (tmp_path / CHECKSUMS).write_text(_checksums(tmp_path), encoding="utf-8")
        for path in [*tmp_path.iterdir(), tmp_path]:
            sync(path)
        remove(target)  # only a damaged one can exist
        os.replace(tmp_path, target)
        sync(root)
        point_latest(target)
    _wait()
    return target


def load_checkpoint(directory: Path, current: dict[str, Any], *, rank: int) -> dict[str, Any]:
    """The saved state. Tensors of `current` (same structure) are filled in place, so sharded ones load sharded.

    The number of ranks may differ from that of the writers. A rank without its own file reads that of rank 0.

    Raises:
        ValueError: its files contradict each other.
    """
    reader = TensorReader(directory)
    own = directory / f"rank_{rank}.json"
    tree = json.loads((own if own.exists() else directory / "rank_0.json").read_text(encoding="utf-8"))
    templates: dict[str, Tensor] = {}
    _split(current, "", templates)
    tensors = {}
    for key, stored in reader.tensors.items():
        here = templates.get(key)
        fits = here is not None and here.shape == stored.size and here.dtype == stored.properties.dtype
        tensors[key] = here if fits else torch.empty(stored.size, dtype=stored.properties.dtype)
    with _single_process_is_meant():
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    return _join(tree, tensors)


def find_checkpoint(root: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """(newest complete checkpoint, its meta), or None. Damaged ones are skipped, with a warning through `warn`.

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
    """The fault of a checkpoint, or None. Every byte of every file is checked."""
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
    """The name of the checkpoint whose row has the lowest `metric`, or the highest one for -metric."""
    if metric is None:
        return set()
    sign, name = (-1, metric[1:]) if metric.startswith("-") else (1, metric)
    figures = {f"step_{row['step']:06d}": sign * row[name] for row in rows if math.isfinite(row.get(name, math.nan))}
    there = [path.name for path in _checkpoints(root) if path.name in figures]
    return {min(there, key=figures.get)} if there else set()


def prune_checkpoints(root: Path, *, step: int, keep_last: int, keep: set[str]) -> None:
    """Delete all but the newest `keep_last` checkpoints up to `step`, which was just saved, and those named in `keep`.

    Checkpoints after `step` exist only if a resumed run skipped them, because they are damaged.
    """
    for tmp_path in root.glob(".step_*.tmp"):  # left by a save that was killed
        remove(tmp_path)
    paths = _checkpoints(root)
    kept = [path for path in paths if step_of(path) <= step][-keep_last:]
    for path in paths:
        if path not in kept and path.name not in keep:
            remove(path)


def step_of(path: Path) -> int:
    """The number of completed steps in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


def point_latest(target: Path) -> None:
    """Let the link `latest` beside a checkpoint point to it."""
    link = target.with_name("latest")
    tmp_path = target.with_name(".latest.tmp")
    tmp_path.unlink(missing_ok=True)
    tmp_path.symlink_to(target.name)
    os.replace(tmp_path, link)
    sync(link.parent)


def _checkpoints(root: Path) -> list[Path]:
    """All checkpoints, complete or damaged, oldest first. Directories with other names are ignored."""
    found = [path for path in root.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name) and path.is_dir()]
    return sorted(found, key=step_of)  # as a number: step_1000000 comes after step_999999


def _split(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON part of a nested state. Each tensor is moved into `tensors` and replaced by its key."""
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
            lines.append(f"{sha256_of(path)}  {path.name}\n")
    return "".join(lines)


@contextmanager
def _single_process_is_meant() -> Iterator[None]:
    """Suppress DCP's warning about a missing process group, although no_dist=True is set."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
