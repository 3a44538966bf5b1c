"""Offload activations: what a forward keeps for its backward pass is stored in host memory."""

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def on_host() -> saved_tensors_hooks:
    """Inside the block, float tensors that autograd saves are moved to pinned host memory and back when needed.

    Both copies are asynchronous, so the host does not wait.
    """
    return saved_tensors_hooks(_leave, _return)


def _leave(tensor: Tensor) -> tuple[torch.device, Tensor]:
    if not tensor.is_floating_point():
        return tensor.device, tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return tensor.device, host.copy_(tensor, non_blocking=True)


def _return(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, tensor = packed
    return tensor.to(device, non_blocking=True)
