"""Growth of an SFT step's time and memory with length, batch, vocabulary and model size: ours and transformers' model.

    python experiments/growth.py --out runs/growth      minutes on two cores; the peer needs `make bench-peers`

Weights and tokens are random, every row is full (so that padding has no effect), products are bf16 under float32
weights, both sides use fused AdamW, and the last half of each row are targets. Each point is measured in its own
process: one warm-up step, then the median of two; the peak memory is the process's. It writes OUT/growth.json (existing
points are kept) and OUT/growth.png.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PEER = ROOT / ".venv-bench/bin/python"
BASE = {"length": 128, "rows": 4, "vocab": 49152, "layers": 6, "width": 576}
SERIES = {
    "length": [64, 128, 256, 512],
    "rows": [2, 4, 8, 16],
    "vocab": [4096, 16384, 49152, 131072],
    "layers": [3, 6, 12, 24],
}


def our_step(point: dict) -> Callable[[], None]:
    """A step of our policy on full rows."""
    import torch

    from losses import sft_loss
    from model.build import new_policy
    from model.config import ModelConfig
    from runtime.host import tune_allocator

    tune_allocator()
    width = point["width"]
    config = ModelConfig(
        family="llama", vocab_size=point["vocab"], hidden_size=width, intermediate_size=8 * width // 3,
        num_layers=point["layers"], num_heads=width // 64, num_kv_heads=width // 192, head_dim=64, max_length=1024,
        rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True,
    )  # fmt: skip
    policy = new_policy(config, seed=0, precision="bf16")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(point["vocab"], (point["rows"], point["length"]))
    real, targets = torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    targets[:, point["length"] // 2 :] = True

    def step() -> None:
        loss, _ = sft_loss(policy.logprobs(ids, real, targets), targets, num_tokens=targets.sum().float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peer_step(point: dict) -> Callable[[], None]:
    """A step of transformers' Llama under autocast on full rows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    width = point["width"]
    config = LlamaConfig(
        vocab_size=point["vocab"],
        hidden_size=width,
        intermediate_size=8 * width // 3,
        tie_word_embeddings=True,
        num_hidden_layers=point["layers"],
        num_attention_heads=width // 64,
        num_key_value_heads=width // 192,
        max_position_embeddings=1024,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(point["vocab"], (point["rows"], point["length"]))
    labels = ids.clone()
    labels[:, : point["length"] // 2] = -100

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(side: str, point: dict) -> dict:
    """Seconds and peak GB of a point. It is called in its own process."""
    step, seconds = {"ours": our_step, "peer": peer_step}[side](point), []
    for _ in range(3):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"seconds": statistics.median(seconds[1:]), "gigabytes": gigabytes}


def plot(rows: list[dict], path: Path) -> None:
    """Time above, memory below, one column per growing quantity; both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(2, len(SERIES), figsize=(3.2 * len(SERIES), 5.4), layout="tight", squeeze=False)
    for column, (name, values) in enumerate(SERIES.items()):
        for side, label in (("ours", "ours"), ("peer", "transformers")):
            found = {row["point"][name]: row for row in rows if row["side"] == side and row["series"] == name}
            for line, figure_name in enumerate(("seconds", "gigabytes")):
                known = [value for value in values if value in found]
                axes[line][column].loglog(known, [found[v][figure_name] for v in known], "o-", label=label)
        axes[0][column].set_title(name)
        for line in (0, 1):
            axes[line][column].set_xticks(values, map(str, values))
            axes[line][column].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes[line][column].yaxis.set_major_formatter("{x:g}")
            axes[line][column].minorticks_off()
    axes[0][0].set_ylabel("seconds a step")
    axes[1][0].set_ylabel("peak GB")
    axes[0][0].legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/growth")
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "POINT"), help="one point, as JSON")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], json.loads(args.measure[1]))))
        return
    sides = {"ours": sys.executable} | ({"peer": str(PEER)} if os.path.exists(PEER) else {})
    report = args.out / "growth.json"
    args.out.mkdir(parents=True, exist_ok=True)
    rows = json.loads(report.read_text()) if report.exists() else []
    for series, values in SERIES.items():
        for value, side in itertools.product(values, sides):
            point = BASE | {series: value}
            same = [row for row in rows if row["side"] == side and row["point"] == point]
            if any(row["series"] == series for row in same):
                continue
            command = [sides[side], __file__, "--measure", side, json.dumps(point)]
            found = same[0] if same else json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
            row = {"series": series, "side": side, "point": point}
            rows.append(row | {name: found[name] for name in ("seconds", "gigabytes")})
            print(f"{series} {value:6} {side}: {found['seconds']:6.2f} s {found['gigabytes']:5.2f} GB", flush=True)
            report.write_text(json.dumps(rows, indent=1))
    plot(rows, args.out / "growth.png")


if __name__ == "__main__":
    main()
