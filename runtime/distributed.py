"""Ranks: the process group, sharding (FSDP2), means over ranks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

STRATEGIES = ("single", "fsdp")


def start_ranks(strategy: str) -> tuple[int, int, torch.device]:
    """Rank, world size and device of this process; joins the process group when there is more than one.

    Raises:
        ValueError: the strategy is unknown, or does not fit how the process was started.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"dist.strategy={strategy!r} is unknown; use one of {', '.join(STRATEGIES)}")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if strategy == "single" and world_size > 1:
        raise ValueError(f"dist=single in a world of {world_size} processes; start one process, or say dist=fsdp")
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if strategy == "fsdp" and not dist.is_initialized():
        if "RANK" not in os.environ:
            raise ValueError("dist=fsdp wants torchrun, e.g. `torchrun --nproc-per-node 2 train_sft.py dist=fsdp`")
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return int(os.environ.get("RANK", "0")), world_size, device


def stop_ranks() -> None:
    """Leave the process group: the next job of a sweep starts in this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Split every layer's weights over the ranks. A model names its entry points beside forward in `forward_methods`.

    FSDP2 averages gradients over ranks, so a loss is a local sum over the *mean* over ranks of the token count.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.transformer.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name in model.forward_methods:
        register_fsdp_forward_method(model, name)
    return model


@contextmanager
def gathered(*models: nn.Module) -> Iterator[None]:
    """Whole weights for as long as the block lasts: ranks may run unequal numbers of forwards, as sampling does."""
    parts = [part for model in models for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean over ranks, in at least float32. One rank: the value itself."""
    value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up on any rank."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)
