"""The device that this process computes on, and the precision that suits it."""

import functools
import logging
import os
import time

import torch

log = logging.getLogger(__name__)

PRECISIONS = ("auto", "fp32", "bf16")
BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # as torch names them


def own_device() -> torch.device:
    """The GPU of this rank, an Apple GPU, or the CPU if there is neither."""
    if torch.cuda.is_available():
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def widest(device: torch.device) -> torch.dtype:
    """The widest float dtype of the device: float64, or float32 on Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


@functools.cache
def native_bf16(device_type: str) -> bool:
    """Whether the device has instructions for bf16 matmuls, so that they are not emulated."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return device_type == "cpu" and bool(bf16_instructions())


def bf16_instructions() -> list[str]:
    """The bf16 instructions of this CPU, by torch's names."""
    has = torch.cpu.get_capabilities()
    return [name for name in BF16_INSTRUCTIONS if has.get(name)]


def choose_precision(precision: str, device: torch.device) -> str:
    """`precision`; auto becomes bf16 where the device has bf16 instructions, else fp32.

    bf16 on a CPU that emulates it is accepted, with a warning that has its measured speed.
    """
    native = native_bf16(device.type)
    if precision == "auto":
        precision = "bf16" if native else "fp32"
        _say(precision, device.type)
    elif precision == "bf16" and not native:
        _warn(device.type)
    return precision


@functools.cache  # once per process
def _say(precision: str, device_type: str) -> None:
    have = "has" if precision == "bf16" else "has no"
    log.info("precision=auto: %s, as this %s %s bf16 instructions", precision, device_type.upper(), have)


@functools.cache
def _warn(device_type: str) -> None:
    bf16, fp32 = (product_gflops(device_type, dtype) for dtype in (torch.bfloat16, torch.float32))
    log.warning(
        "precision=bf16 on a %s without bf16 instructions: its products are emulated. Just measured: %.0f GFLOP/s in "
        "bf16, %.0f in fp32; precision=auto takes fp32 here",
        device_type.upper(),
        bf16,
        fp32,
    )


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy of a host tensor on `device`. It goes to a GPU from pinned memory, so that the host does not wait."""
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def any_on_host(flags: torch.Tensor) -> bool:
    """Whether any flag is True, for tensors on the host. On a GPU it returns False, because reading would block."""
    return flags.device.type == "cpu" and bool(flags.any())


def product_gflops(device_type: str, dtype: torch.dtype, size: int = 256) -> float:
    """GFLOP/s of a matmul of square matrices, the best of three after a warm-up."""
    a, seconds = torch.ones(size, size, dtype=dtype, device=device_type), []
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:]) / 1e9
