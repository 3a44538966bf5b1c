"""The choice between a kernel's two implementations: Triton on a GPU, the torch definition elsewhere."""

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
_compared: set[str] = set()  # files whose kernel was already compared with its definition in this run
AGREEMENT = 1e-3  # tolerance, relative to the largest value: float32 rounding is far below it


def set_kernels(choice: str) -> None:
    """Set the implementation for the whole process: auto (Triton on CUDA, torch elsewhere), torch or triton.

    Raises:
        ValueError: the choice is unknown, or it is triton on a machine that cannot run it.
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
    """The kernel's result on these inputs. The first time in a run, it is compared with its definition's result.

    Without the comparison, editing a definition would have no effect on a GPU and nobody would notice.

    Raises:
        ValueError: the results differ by more than float32 rounding. The message names the file.
    """
    out = kernel(*inputs)
    check_agreement(file, lambda: [(out, definition(*inputs))])
    return out


def check_agreement(file: str, both: Callable[[], list[tuple[Tensor, Tensor]]]) -> None:
    """Compare each pair of `both()`, a kernel's result and its definition's, once per run and file.

    Raises:
        ValueError: a pair differs by more than rounding. The message names the file.
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
    """Inside the block kernels are compiled and not run, so there are no results to compare with a definition."""
    global _kernels_run
    _kernels_run = False
    try:
        yield
    finally:
        _kernels_run = True


@contextmanager
def kernels_as(choice: str) -> Iterator[None]:
    """Set the implementation inside the block. Unlike `set_kernels`, it allows triton without a GPU, for counting."""
    global _choice
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before


def use_triton(tensor: Tensor) -> bool:
    """True where the Triton kernel runs on this tensor. Rank 0 prints the choice once per device type."""
    chosen = _choice == "triton" or (_choice == "auto" and HAS_TRITON and tensor.is_cuda)
    device = tensor.device.type
    if device not in _printed:
        _printed.add(device)
        if os.environ.get("RANK", "0") == "0":
            print(f"kernels={_choice}: {'Triton' if chosen else 'torch'} on {device}", file=sys.stderr)
    return chosen


def fused(tensor: Tensor) -> bool:
    """True where a layer uses its fused kernels: where `use_triton` does, and on meta tensors, which stand for a GPU.

    The kernels compute in float32, so float64 tensors use the torch definitions.
    """
    if tensor.is_meta:
        return HAS_TRITON and _choice == "auto" and tensor.dtype != torch.float64
    return tensor.dtype != torch.float64 and use_triton(tensor)


def programs(device: torch.device) -> int:
    """Number of programs of a kernel that sums over rows: two per multiprocessor (an H100's where there is no GPU)."""
    return 2 * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132)


def operator(schema: str):
    """Decorator that registers a function as the operator `helpful::schema` on every device.

    Its attribute `.shapes` is the decorator for the operator's meta implementation.
    """

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
    """True where Triton's interpreter runs kernels on the CPU instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
