"""Compile Triton kernels for GPUs that this machine does not have, and read the binaries.

Inside `capture(arch)` the real Python wrappers run on CPU tensors. Every launch compiles the kernel for that target and
computes nothing. For each binary there is one row: registers, spills, shared memory, thread blocks that fit on a
multiprocessor, and the tensor-core instruction that it uses. This does not work under TRITON_INTERPRET=1.
"""

import contextlib
import os
import re
import subprocess
import tempfile
import time

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.backend import nothing_runs

ARCHS = (80, 90, 100, "gfx942")  # A100, H100, B200, MI300X
MAX_SHARED = {80: 166912, 90: 232448, 100: 232448, "gfx942": 65536}  # largest shared memory of a block, bytes
NVIDIA_SM = {80: 167936, 90: 233472, 100: 233472}  # shared bytes of a multiprocessor; 65,536 registers, 2,048 threads
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


@contextlib.contextmanager
def capture(arch: int | str):
    """Compile for `arch` instead of running. Yields a list that gets one row of `resources` per distinct binary."""
    rows, seen, old_driver, old_run = [], set(), driver._active, JITFunction.run

    def run(self, *args, grid, warmup, **options):
        started = time.perf_counter()
        kernel = old_run(self, *args, grid=grid, warmup=warmup, **options)
        if kernel is not None and kernel.hash not in seen:
            seen.add(kernel.hash)
            rows.append({"arch": arch} | resources(kernel) | {"seconds": round(time.perf_counter() - started, 2)})
        return kernel

    driver.set_active(_Driver(arch))
    JITFunction.run = run
    try:
        with nothing_runs():
            yield rows
    finally:
        JITFunction.run, driver._active = old_run, old_driver


def resources(kernel) -> dict:
    """The resources of a compiled kernel, read from its binary. Spills are bytes on NVIDIA and registers on AMD."""
    meta = kernel.metadata
    row = {"kernel": kernel.name, "shared": meta.shared, "warps": meta.num_warps}
    return row | (_nvidia(kernel) if "cubin" in kernel.asm else _amd(kernel))


def _nvidia(kernel) -> dict:
    meta, ptx, arch = kernel.metadata, kernel.asm["ptx"], kernel.metadata.target.arch
    with tempfile.TemporaryDirectory() as folder:
        cubin, source = os.path.join(folder, "kernel.cubin"), os.path.join(folder, "kernel.ptx")
        with open(cubin, "wb") as file:
            file.write(kernel.asm["cubin"])
        with open(source, "w", encoding="utf-8") as file:
            file.write(ptx)
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
        name = f"--gpu-name={re.search(r'[.]target (sm_[0-9]+[a-z]?)', ptx)[1]}"  # ptxas -v reports exact spills
        command = [get_ptxas(arch).path, "-v", "--regAllocOptLevel=2", name, source, "-o", os.devnull]
        verbose = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"REG:(\d+)", usage.stdout)[1])
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", verbose)
    assert spills, f"ptxas reported no spills: {verbose!r}"
    threads = meta.num_warps * 32
    fit = (65536 // (-(-registers // 8) * 8 * threads), 2048 // threads, NVIDIA_SM[arch] // (meta.shared + 1024), 32)
    instructions = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
    return {
        "registers": registers,
        "spills": sum(map(int, spills)),
        "blocks_per_sm": min(fit),
        "tensor_core": next((name for name in instructions if name in ptx), None),
    }


def _amd(kernel) -> dict:
    code = kernel.asm["amdgcn"]

    def count(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", code)[1])

    return {
        "registers": count("vgpr_count"),
        "spills": count("vgpr_spill_count") + count("sgpr_spill_count"),
        "blocks_per_sm": None,
        "tensor_core": "mfma" if "v_mfma" in code else None,
    }


class _Driver:
    """A driver for a device that this machine does not have: it answers the questions that Triton asks."""

    def __init__(self, arch: int | str):
        self.arch, self.utils = arch, _Utils(arch)
        self.launcher_cls = lambda src, metadata: lambda *args, **options: None

    def get_current_target(self):
        nvidia = isinstance(self.arch, int)
        return GPUTarget("cuda", self.arch, 32) if nvidia else GPUTarget("hip", self.arch, 64)

    def get_current_device(self):
        return str(self.arch)  # Triton's kernel cache is keyed by this: one entry per target

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_benchmarker(self):
        return lambda function, quantiles=None: [0.0] * len(quantiles) if quantiles else 0.0

    def map_python_to_cpp_type(self, kind):
        return kind


class _Utils:
    def __init__(self, arch: int | str):
        self.arch = arch

    def load_binary(self, name, kernel, shared, device):
        return 1, 1, 0, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        sizes = {"max_shared_mem": MAX_SHARED[self.arch], "multiprocessor_count": 132, "max_num_regs": 65536}
        clocks = {"sm_clock_rate": 1755000, "mem_clock_rate": 2619000, "mem_bus_width": 5120}
        return sizes | clocks | {"warpSize": 32 if isinstance(self.arch, int) else 64}
