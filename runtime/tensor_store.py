"""Storage for torch's distributed checkpoint (DCP): raw bytes and an index in JSON. Nothing is unpickled.

    rank_0.tensors   the shards of rank 0, each starting at a multiple of 64 bytes
    index.json       {name: {"dtype", "size", "chunks": [{"offsets", "sizes", "file", "start"}, ...]}}

The number of ranks may change between writing and reading: DCP's planner maps parts of chunks to tensors. The index is
checked against the files before any tensor is allocated.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, SavePlan, SavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

INDEX = "index.json"
ALIGNED = 64  # bytes
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


class TensorWriter(StorageWriter):
    """Writes into an existing, empty directory. `dcp.save` calls its methods."""

    def __init__(self, directory: Path):
        self.directory = directory

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name, results = f"rank_{dist.get_rank() if dist.is_initialized() else 0}.tensors", []
        with open(self.directory / name, "wb") as file:
            for item in plan.items:
                file.write(bytes(-file.tell() % ALIGNED))
                start, tensor = file.tell(), planner.resolve_data(item)
                file.write(memoryview(_as_bytes(tensor.detach().cpu().contiguous()).numpy()))
                results.append(WriteResult(item.index, file.tell() - start, {"file": name, "start": start}))
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {result.index: result.storage_data for of_rank in results for result in of_rank}
        index = {}
        for name, tensor in metadata.state_dict_metadata.items():
            chunks = [
                {
                    "offsets": list(chunk.offsets),
                    "sizes": list(chunk.sizes),
                    **places[MetadataIndex(name, chunk.offsets)],
                }
                for chunk in tensor.chunks
            ]
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            index[name] = {"dtype": dtype, "size": list(tensor.size), "chunks": chunks}
        (self.directory / INDEX).write_text(json.dumps(index), encoding="utf-8")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class TensorReader(StorageReader):
    """Reads the files of TensorWriter. Raises ValueError if the index and the files contradict each other."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.places: dict[MetadataIndex, tuple[str, int, ChunkStorageMetadata, torch.dtype]] = {}
        self.tensors: dict[str, TensorStorageMetadata] = {}
        path = directory / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            for name, stored in index.items():
                self._add(name, stored)
            self._check_bytes()
        except FileNotFoundError as error:
            raise ValueError(f"{directory} is not a checkpoint of this program: it lacks {error.filename}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} does not describe the tensors beside it ({error}); the checkpoint was not read"
            ) from None

    def _add(self, name: str, stored: dict) -> None:
        size, dtype = torch.Size(_whole_numbers(stored["size"])), DTYPES[stored["dtype"]]
        chunks = []
        for given in stored["chunks"]:
            offsets, sizes, start = (
                torch.Size(_whole_numbers(numbers)) for numbers in (given["offsets"], given["sizes"], [given["start"]])
            )
            if not len(offsets) == len(sizes) == len(size):
                raise ValueError(f"{name}: a chunk has another number of dimensions")
            if any(o + s > whole for o, s, whole in zip(offsets, sizes, size, strict=True)):
                raise ValueError(f"{name}: a chunk is outside of its tensor")
            if not re.fullmatch(r"rank_\d{1,6}\.tensors", given["file"]):
                raise ValueError(f"{name}: {given['file']!r} is not a file of tensors")
            chunks.append(ChunkStorageMetadata(offsets, sizes))
            self.places[MetadataIndex(name, offsets)] = (given["file"], start[0], chunks[-1], dtype)
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
            raise ValueError(f"{name}: its chunks are not the whole tensor")
        self.tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)

    def _check_bytes(self) -> None:
        """Raise ValueError unless chunks lie in their files without overlap: no small file may fill a large tensor."""
        spans: dict[str, list[tuple[int, int]]] = {}
        for file, start, chunk, dtype in self.places.values():
            spans.setdefault(file, []).append((start, start + math.prod(chunk.sizes) * dtype.itemsize))
        for file, of_file in spans.items():
            ends = [0, *(end for _, end in sorted(of_file))]
            if any(start < end for (start, _), end in zip(sorted(of_file), ends, strict=False)):
                raise ValueError(f"two chunks share bytes of {file}")
            if ends[-1] > (self.directory / file).stat().st_size:
                raise ValueError(f"{file} is shorter than its chunks")

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(state_dict_metadata=dict(self.tensors))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            name, start, chunk, dtype = self.places[item.storage_index]
            tensor = torch.empty(chunk.sizes, dtype=dtype)
            with open(self.directory / name, "rb") as file:
                file.seek(start)
                if file.readinto(memoryview(_as_bytes(tensor).numpy())) != tensor.nbytes:
                    raise OSError(f"{self.directory / name} ended early")
            for dimension, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                tensor = tensor.narrow(dimension, offset, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(tensor)
            planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def _as_bytes(tensor: Tensor) -> Tensor:
    """A view of the same memory as uint8."""
    return tensor.reshape(-1).view(torch.uint8)


def _whole_numbers(values: Any) -> list[int]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**48 for value in values):
        raise ValueError(f"{str(values)[:80]} must list whole numbers")
    return values


def _done(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future
