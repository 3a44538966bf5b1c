"""Ranks: the process group, sharding (FSDP2), means over ranks."""

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from runtime.devices import own_device

STRATEGIES = ("single", "fsdp", "hsdp")


def start_ranks(strategy: str) -> tuple[int, int, torch.device]:
    """(rank, world size, device) of this process. It joins the process group if there are several processes.

    Raises:
        ValueError: the strategy is unknown, or does not fit how the process was started.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"dist.strategy={strategy!r} is unknown; use one of {', '.join(STRATEGIES)}")
    name_submitit_ranks()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if strategy == "single" and world_size > 1:
        raise ValueError(f"dist=single in a world of {world_size} processes; start one process, or set dist=fsdp")
    device = own_device()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    if strategy != "single" and device.type == "mps":
        raise ValueError(f"dist={strategy} joins CUDA GPUs or CPUs, not Apple's GPU; set dist=single")
    if strategy != "single" and not dist.is_initialized():
        if "RANK" not in os.environ:
            raise ValueError(
                f"dist={strategy} needs several ranks: `python launch.py --nproc-per-node 2 train_sft.py "
                f"dist={strategy}`, and in a sweep hydra.launcher.tasks_per_node=2"
            )
        dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo", device_id=device if cuda else None)
        atexit.register(gc.collect)  # after a failed run, whose traceback keeps the models alive; see stop_ranks
    return int(os.environ.get("RANK", "0")), world_size, device


def name_submitit_ranks() -> None:
    """Set torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, ...) in a job of submitit that has several tasks.

    Each task of a sweep's job (`hydra.launcher.tasks_per_node`) calls the script in a process of submitit's own. A
    process that such a task starts inherits the job's variables, but has not imported submitit and is no task.
    """
    if "submitit" not in sys.modules or "RANK" in os.environ:
        return
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    try:
        num_tasks = JobEnvironment().num_tasks
    except RuntimeError:  # this process starts the jobs
        return
    if num_tasks > 1:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


def stop_ranks() -> None:
    """Leave the process group, so that the next job of a sweep can start in this process.

    Gloo's threads end when the last reference to a group is gone. Sharded models, which have reference cycles, and
    DTensor's cache of layouts hold references. A thread that still holds a tensor when the interpreter ends aborts the
    process ("terminate called without an active exception", exit code -6).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        _clear_sharding_prop_cache()
        gc.collect()


def shard_model(model: nn.Module, device: torch.device, *, shard_size: int | None, cpu_offload: bool) -> nn.Module:
    """Shard every layer's weights over the ranks with FSDP2. `forward_methods` of a model lists its other entry points.

    FSDP2 averages gradients over ranks, so a loss must be a local sum over the mean of the ranks' token counts.
    Where matmuls are in bf16, weights are stored in their own dtype and sent in bf16, also norms and embeddings.
    Gradients are summed over ranks in float32. A head, which has one row, stays in float32.

    Args:
        shard_size: number of ranks that share one copy of the weights (HSDP). None: all ranks share one copy.
        cpu_offload: keep weights, gradients and moments in host memory, and run the optimizer there.
    Raises:
        ValueError: shard_size does not divide the number of ranks.
    """
    ranks = dist.get_world_size()
    if shard_size is not None and (shard_size < 1 or ranks % shard_size):
        raise ValueError(f"dist.shard_size={shard_size} must divide the {ranks} ranks; use the GPUs of one machine")
    shape = (ranks,) if shard_size is None else (ranks // shard_size, shard_size)
    settings = {"mesh": init_device_mesh(device.type, shape, mesh_dim_names=("copy", "shard")[-len(shape) :])}
    if cpu_offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    if hasattr(model, "head"):
        fully_shard(model.head, **settings)
    if model.transformer.compute_dtype == torch.bfloat16:
        settings["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in model.transformer.layers:
        fully_shard(layer, **settings, reshard_after_forward=True)
    fully_shard(
        model, **settings, reshard_after_forward=False
    )  # embedding and output: the backward pass needs them again immediately
    for name in model.forward_methods:
        register_fsdp_forward_method(model, name)
    if hasattr(model, "read_weights"):  # the model has only shapes so far (model/build.py): each rank reads its rows
        home = torch.device("cpu") if cpu_offload else device
        model._apply(lambda tensor: torch.empty_like(tensor, device=home) if tensor.is_meta else tensor)
        model.read_weights()
        del model.read_weights
    return model


def own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """(the rows of a tensor on this rank, the index of the first one). All rows, if the tensor is not sharded.

    FSDP2 shards dimension 0 like torch.chunk, over the last dimension of the mesh.
    """
    if not isinstance(tensor, DTensor):
        return tensor, 0
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    share = -(-rows // mesh.size(mesh.ndim - 1))
    return tensor.to_local(), min(rows, share * mesh.get_local_rank(mesh.ndim - 1))


@contextmanager
def gathered(*models: nn.Module) -> Iterator[None]:
    """Inside the block, weights are whole, in the dtype of matmuls. So ranks may run different numbers of forwards.

    It is for forwards without gradients, such as sampling. All ranks must enter and leave. A model that is not sharded,
    or is gathered already, does not change.
    """
    parts = [part for part in _parts(*models) if not getattr(part, "is_gathered", False)]
    for part in parts:
        _gather(part)
    try:
        yield
    finally:
        for part in parts:
            _split(part)


@contextmanager
def split(model: nn.Module) -> Iterator[None]:
    """Inside the block, also within `gathered`, parameters are sharded master weights: each rank has its own rows."""
    parts = [part for part in _parts(model) if getattr(part, "is_gathered", False)]
    for part in parts:
        _split(part)
    try:
        yield
    finally:
        for part in parts:
            _gather(part)


def _parts(*models: nn.Module) -> list[FSDPModule]:
    return list(dict.fromkeys(part for model in models for part in model.modules() if isinstance(part, FSDPModule)))


def _gather(part: FSDPModule) -> None:
    part.set_reshard_after_forward(False, recurse=False)  # a forward inside must not reshard it
    part.unshard()
    part.is_gathered = True


def _split(part: FSDPModule) -> None:
    part.is_gathered = False
    part.set_reshard_after_forward(not hasattr(part, "transformer"), recurse=False)  # as in shard_model
    part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor. A sharded one is gathered, and then all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean over ranks, in float32 or wider. With one rank: the value itself."""
    value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def from_main(value: Any) -> Any:
    """The value of rank 0, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is True on any rank."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)
