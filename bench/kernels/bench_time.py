"""Milliseconds and peak memory of log-prob implementations on this machine's device."""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from bench.kernels.bench_cases import IMPLEMENTATIONS, logprob_inputs


def measure_time(size: tuple[int, int, int], names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of log-prob + entropy + both gradients. Each round runs every implementation once.

    `cpu_seconds` is processor time, which stays comparable where other processes use the machine. `share` is processor
    time / (wall time x threads): it is below 1 where other processes took time away.
    """
    dtype, device = _where()
    inputs = logprob_inputs(*size, dtype=dtype, device=device)
    for name in names:
        _step(name, inputs)  # warm up, compile
    wall: dict[str, list[float]] = {name: [] for name in names}
    used: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            began = time.process_time()
            wall[name].append(_step(name, inputs))
            used[name].append(time.process_time() - began)
    return {name: _timing(median(wall[name]), median(used[name])) for name in names}


def _timing(wall: float, used: float) -> dict[str, float]:
    return {"seconds": wall, "cpu_seconds": used, "share": used / wall / torch.get_num_threads()}


def measure_memory(size: tuple[int, int, int], name: str) -> dict[str, float]:
    """Peak MB of a step above its inputs, and the part of it that is gradients, measured in a new process."""
    command = [sys.executable, "-m", "bench.kernels.bench_time", name, *map(str, size)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _where() -> tuple[torch.dtype, str]:
    return (torch.bfloat16, "cuda") if torch.cuda.is_available() else (torch.float32, "cpu")


def _step(name: str, inputs) -> float:
    hidden, weight, targets = inputs
    hidden.grad = weight.grad = None
    _synchronize()
    started = time.perf_counter()
    logprobs, entropy = IMPLEMENTATIONS[name](hidden, weight, targets)
    (logprobs.sum() + 0.1 * entropy.sum()).backward()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_bytes() -> int:
    """The peak memory of this process since `_forget_peak`, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text(
            "5", encoding="ascii"
        )  # resets the kernel's high-water mark of this process


def _print_memory(name: str, size: tuple[int, int, int]) -> None:
    small = logprob_inputs(64, size[1], 256, *_where())
    _step(name, small)  # libraries allocate their own memory at the first product
    dtype, device = _where()
    inputs = logprob_inputs(*size, dtype=dtype, device=device)
    _forget_peak()
    before = _peak_bytes()
    _step(name, inputs)
    grads = sum(x.grad.numel() * x.grad.element_size() for x in inputs[:2])
    print(json.dumps({"peak_mb": (_peak_bytes() - before) / 1e6, "gradients_mb": grads / 1e6}))


if __name__ == "__main__":
    M, D, V = map(int, sys.argv[2:])
    _print_memory(sys.argv[1], (M, D, V))
