"""What a forward keeps for its backward pass, waiting in host memory instead of the device's."""

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def on_host() -> saved_tensors_hooks:
    """Inside the block, floating tensors that autograd saves go to pinned host memory and come back when needed.

    Both copies stand in the device's own queue: the host waits for neither.
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
