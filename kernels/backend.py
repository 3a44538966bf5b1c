"""Which implementation of a kernel runs, and why: Triton on a GPU, the torch definition elsewhere."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

try:
    import triton  # noqa: F401

    HAS_TRITON = True
except ImportError:  # platforms without wheels run the torch definitions
    HAS_TRITON = False

CHOICES = ("auto", "torch", "triton")
_choice = "auto"
_kernels_run = True
_printed: set[str] = set()
_compared: set[str] = set()  # files whose kernel was held against its definition in this run
AGREEMENT = 1e-3  # of the largest value; rounding in float32 is far below, an edit above


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
    _compared.clear()


def agreed(file: str, kernel: Callable, definition: Callable, *inputs) -> Tensor:
    """What the kernel computes of these inputs; the first time in a run it is held against its definition.

    An edit of a definition would otherwise change nothing on a GPU.

    Raises:
        ValueError: they differ by more than float32's rounding; it names the file.
    """
    out = kernel(*inputs)
    check_agreement(file, lambda: [(out, definition(*inputs))])
    return out


def check_agreement(file: str, both: Callable[[], list[tuple[Tensor, Tensor]]]) -> None:
    """The first time in a run that `file` asks: each pair of `both()`, a kernel's result and its definition's, agrees.

    Raises:
        ValueError: they differ by more than rounding; it names the file.
    """
    if file in _compared or not _kernels_run:
        return
    _compared.add(file)
    for got, expected in both():
        got, expected = got.detach().double(), expected.detach().double()
        scale = expected[expected.isfinite()].abs().amax().item() if expected.numel() else 0.0
        if not torch.allclose(got, expected, rtol=AGREEMENT, atol=AGREEMENT * max(scale, 1e-6), equal_nan=True):
            worst = (got - expected).abs().max().item()
            raise ValueError(
                f"the Triton kernel of {file} and its definition in torch differ by {worst:.3g} where the values reach "
                f"{scale:.3g}: one of the two was edited. kernels=torch runs the definition"
            )


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Kernels are only compiled inside the block: there are no results to hold against a definition."""
    global _kernels_run
    _kernels_run = False
    try:
        yield
    finally:
        _kernels_run = True


@contextmanager
def kernels_as(choice: str) -> Iterator[None]:
    """Another choice for as long as the block lasts; what is counted or compiled needs no GPU."""
    global _choice
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before


def use_triton(tensor: Tensor) -> bool:
    """True where the Triton kernel runs on this tensor. Says so once per kind of device, on the first rank."""
    chosen = _choice == "triton" or (_choice == "auto" and HAS_TRITON and tensor.is_cuda)
    device = tensor.device.type
    if device not in _printed:
        _printed.add(device)
        if os.environ.get("RANK", "0") == "0":
            print(f"kernels={_choice}: {'Triton' if chosen else 'torch'} on {device}", file=sys.stderr)
    return chosen


def fused(tensor: Tensor) -> bool:
    """True where a layer takes its fused kernels: as `use_triton`, and on meta tensors, which stand for a GPU's.

    They compute in float32, so float64 keeps the torch definitions.
    """
    if tensor.is_meta:
        return HAS_TRITON and _choice == "auto" and tensor.dtype != torch.float64
    return tensor.dtype != torch.float64 and use_triton(tensor)


def programs(device: torch.device) -> int:
    """Programs of a kernel that adds up over rows: two for each multiprocessor (of an H100, where there is no GPU)."""
    return 2 * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132)


def operator(schema: str):
    """Decorator: a function as the operator `helpful::schema` on every device; `.shapes` decorates its meta twin."""

    def register(function):
        name = schema.partition("(")[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        overload = getattr(torch.ops.helpful, name).default
        overload.shapes = torch.library.register_fake(f"helpful::{name}", lib=_LIBRARY)
        return overload

    return register


_LIBRARY = torch.library.Library("helpful", "DEF")


def interpreting() -> bool:
    """True where Triton kernels are stepped through on the CPU instead of being compiled."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
