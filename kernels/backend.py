"""Which implementation of a kernel runs, and why: Triton on a GPU, the torch definition elsewhere."""

import os
import sys

import torch
from torch import Tensor

try:
    import triton  # noqa: F401

    HAS_TRITON = True
except ImportError:  # platforms without wheels run the torch definitions
    HAS_TRITON = False

CHOICES = ("auto", "torch", "triton")
_choice = "auto"
_printed: set[str] = set()


def set_kernels(choice: str) -> None:
    """Choose for the whole process: auto (Triton on CUDA, torch elsewhere), torch or triton.

    Raises:
        ValueError: unknown choice, or triton where nothing can run it.
    """
    global _choice
    if choice not in CHOICES:
        raise ValueError(f"kernels={choice} is not one of {', '.join(CHOICES)}")
    can_run = HAS_TRITON and (torch.cuda.is_available() or interpreting())
    if choice == "triton" and not can_run:
        raise ValueError(
            "kernels=triton needs a GPU (or TRITON_INTERPRET=1 to step through a kernel); use kernels=auto"
        )
    _choice = choice
    _printed.clear()


def use_triton(tensor: Tensor) -> bool:
    """True where the Triton kernel runs on this tensor. Says so once per kind of device, on the first rank."""
    chosen = _choice == "triton" or (_choice == "auto" and HAS_TRITON and tensor.is_cuda)
    device = tensor.device.type
    if device not in _printed:
        _printed.add(device)
        if os.environ.get("RANK", "0") == "0":
            print(f"kernels={_choice}: {'Triton' if chosen else 'torch'} on {device}", file=sys.stderr)
    return chosen


def interpreting() -> bool:
    """True where Triton kernels are stepped through on the CPU instead of being compiled."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
