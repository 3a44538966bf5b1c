"""Loads a policy, under torchrun a share of it, and prints by how many MB the rank's own memory grew at most.

Pages of the file do not count: they are the system's cache, which all ranks of a machine share.
"""

import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import load_file

from model.build import load_policy
from model.weights.names import parts_of
from runtime.distributed import shard_model, start_ranks, stop_ranks, whole


def own_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024 / 1e6


def main(path: str) -> None:
    _, ranks, device = start_ranks("fsdp" if "WORLD_SIZE" in os.environ else "single")
    before, seen, done = own_megabytes(), [], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(own_megabytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    policy = load_policy(path)
    if ranks > 1:
        policy = shard_model(policy, device, shard_size=None, cpu_offload=False)
    seen.append(own_megabytes())
    done.set()
    watcher.join()
    print(f"peak_mb {max(seen) - before:.1f}", flush=True)

    stored = load_file(Path(path) / "model.safetensors")
    for name, weight in policy.named_parameters():
        assert torch.equal(whole(weight), torch.cat([stored[part] for part in parts_of(name, policy.config)])), name


if __name__ == "__main__":
    main(sys.argv[1])
    stop_ranks()
