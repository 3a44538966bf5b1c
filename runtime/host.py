"""The machine and the process of a run: allocator, random states, memory, commit of the code."""

import ctypes
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from runtime.files import read_object, write_whole

ROOT = Path(__file__).parents[1]


TRIM_EVERY = 16  # steps; after a trim the next step maps memory again, which costs a sixth of a step


def tune_allocator() -> None:
    """Keep freed memory in the process. glibc would return large blocks, and every step would map them again (1.2x)."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def trim_memory(step: int) -> None:
    """Return freed memory every TRIM_EVERY steps.

    Rows differ in length, so memory becomes fragmented and a long run would grow. A model of 135M parameters grew
    from 4.1 to 7.1 GB in 130 steps.
    """
    if step % TRIM_EVERY == 0 and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB (1e9 bytes): allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, where getrusage also counts the memory of the parent at the start of this process
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS counts bytes


def seed_all(seed: int) -> torch.Generator:
    """Seed all random generators of the process, and return another one."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def random_state(rng: torch.Generator, device: torch.device) -> dict[str, Any]:
    """The states of all random generators of the process, as JSON values."""
    name, keys, *rest = np.random.get_state()
    states = {"torch": torch.get_rng_state(), "run": rng.get_state()}
    if device.type != "cpu":
        states[device.type] = torch.mps.get_rng_state() if device.type == "mps" else torch.cuda.get_rng_state(device)
    hexes = {key: state.numpy().tobytes().hex() for key, state in states.items()}
    return hexes | {"numpy": [name, keys.tolist(), *rest], "python": random.getstate()}


def set_random_state(saved: dict[str, Any], rng: torch.Generator, device: torch.device) -> None:
    """Restore the states that `random_state` returned."""
    states = {key: torch.frombuffer(bytearray.fromhex(saved[key]), dtype=torch.uint8) for key in ("torch", "run")}
    torch.set_rng_state(states["torch"])
    rng.set_state(states["run"])
    if device.type in saved:
        state = torch.frombuffer(bytearray.fromhex(saved[device.type]), dtype=torch.uint8)
        torch.mps.set_rng_state(state) if device.type == "mps" else torch.cuda.set_rng_state(state, device)
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))


def job_name(name: str) -> str:
    """The overrides that a sweep varies, "optim.lr=0.001, seed=0"; outside a sweep the run's own name.

    It is cut at 128 characters, because wandb refuses longer names.
    """
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return name[:128]
    words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    given = OverridesParser.create().parse_overrides(words)
    fixed = {override.key_or_group for override in given if not override.is_sweep_override()}
    swept = [word for word in HydraConfig.get().overrides.task if word.split("=")[0].lstrip("+~") not in fixed]
    return (", ".join(swept) or name)[:128]


def git_sha() -> str:
    """The commit of the code, or "unknown" outside a git checkout."""
    return _git("rev-parse", "HEAD").strip() or "unknown"


def write_origin(cfg: DictConfig, directory: Path) -> None:
    """Write run.json and git.diff. With config.yaml they are enough to repeat the run."""
    paths = {key: value for key, value in cfg.items() if isinstance(value, str) and os.path.exists(value)}
    origin = {
        "command": sys.argv,
        "git_sha": git_sha(),
        "parents": {key: value for key, value in paths.items() if key != "run_dir"},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "started": time.time(),
    }
    write_whole(directory / "run.json", json.dumps(origin, indent=1))
    write_whole(directory / "git.diff", _git("diff", "HEAD"))


def write_finish(directory: Path, step: int) -> None:
    """Note in run.json that the run is complete."""
    finished = read_origin(directory) | {"finished": time.time(), "steps": step}
    write_whole(directory / "run.json", json.dumps(finished, indent=1))


def read_origin(directory: Path) -> dict:
    """The content of run.json, empty if there is none. Raises ValueError if it is damaged."""
    return read_object(directory / "run.json", "set overwrite=true to begin again")


def is_finished(directory: Path) -> bool:
    """Whether the run in the directory is complete."""
    return "finished" in read_origin(directory)


def _git(*args: str) -> str:
    try:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
