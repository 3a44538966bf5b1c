"""The cost of each kernel, as a table, JSON and a roofline plot: `python -m bench.kernels.bench --help`.

There are five parts, each in its own process:
    bytes       Triton's interpreter counts loads and stores
    binary      the kernels are compiled for four GPUs, which need not be present
    predict     the cost of the log-prob at full size, counted on the meta device
    time        milliseconds and peak memory on this machine's device, beside eager torch and torch.compile
    bandwidth   the kernels alone, on a GPU
Only the last two measure time.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

from bench.kernels.bench_cases import (
    CASES,
    FORMULAS,
    IMPLEMENTATIONS,
    MINIMUM,
    gpu_kernels,
    logprob_inputs,
)
from bench.kernels.bench_time import measure_memory, measure_time
from bench.kernels.cost import BYTES_PER_SECOND, PRODUCTS_PER_SECOND, counting
from kernels.backend import kernels_as

PARTS = ("bytes", "binary", "predict", "time", "bandwidth")
FULL_SIZE = [(8192, 4096, 32000), (8192, 4096, 128256)]  # M, D, V of the prediction
VECTORS_PER_SECOND = 60e12  # float32 of an H100 outside tensor cores
CPU_SIZES = [(2048, 576, 49152), (512, 2048, 128256)]
GPU_SIZES = FULL_SIZE


def part_bytes() -> list[dict]:
    """Bytes that each launch moves over the minimum, which is inputs once and outputs once. Interpreted, small size."""
    from bench.kernels.interpreter import repair
    from bench.kernels.traffic import Traffic

    repair()
    rows = []
    for name, step in CASES.items():
        minimum = MINIMUM[name]
        with kernels_as("triton"), Traffic() as traffic:
            step()
        for kernel, count in traffic.kernels.items():
            best = minimum[kernel] * count.launches
            ratios = {key: round(getattr(count, key) / best, 3) for key in ("unique", "requested", "sectors")}
            row = {"case": name, "kernel": kernel, "launches": count.launches, "minimum": best} | ratios
            rows.append(row | {"operations_per_byte": round(count.operations / count.unique, 2)})
    return rows


def part_binary() -> list[dict]:
    """Registers, spills, shared memory and tensor-core instruction of every binary, on four targets."""
    from bench.kernels.ahead_of_time import ARCHS, capture

    rows = []
    for arch in ARCHS:
        for name, step in CASES.items():
            with kernels_as("triton"), capture(arch) as binaries:
                step()
            rows += [{"case": name} | row for row in binaries]
    return rows


def part_predict() -> list[dict]:
    """Operations, bytes, scratch and H100 time of the log-prob with entropy, forward and both gradients."""
    rows = []
    for M, D, V in FULL_SIZE:
        for name, step in {"forward": forward_step, "forward + backward": full_step}.items():
            hidden, weight, targets = logprob_inputs(M, D, V, torch.bfloat16, "meta")
            with kernels_as("triton"), counting(FORMULAS) as cost:
                step(hidden, weight, targets)
            floor = (2 if name == "forward" else 8) * M * D * V
            grads = 0 if name == "forward" else 2 * (hidden.numel() + weight.numel())
            rows.append(
                {
                    "size": [M, D, V],
                    "step": name,
                    "operations": cost.operations / floor,
                    "gigabytes": cost.bytes / 1e9,
                    "scratch_mb": (cost.peak - grads) / 1e6,
                    "launches": cost.launches,
                    "milliseconds": 1e3 * cost.seconds,
                    "over_floor": cost.seconds / (floor / PRODUCTS_PER_SECOND),
                }
            )
    return rows


def forward_step(hidden, weight, targets):
    """Log-probs without gradients, as a reference model computes them."""
    with torch.no_grad():
        IMPLEMENTATIONS["tiles"](hidden, weight, targets)


def full_step(hidden, weight, targets):
    """Log-probs, entropy and both gradients."""
    logprobs, entropy = IMPLEMENTATIONS["tiles"](hidden, weight, targets)
    (logprobs.sum() + entropy.sum()).backward()


def part_time(rounds: int, names: list[str]) -> list[dict]:
    """Milliseconds (medians of interleaved rounds) and peak MB above the inputs, on this machine."""
    rows = []
    for size in GPU_SIZES if torch.cuda.is_available() else CPU_SIZES:
        times = measure_time(size, names, rounds)
        for name, timing in times.items():
            first = times[names[0]]
            ratios = {"ratio": timing["seconds"] / first["seconds"]}
            ratios["cpu_ratio"] = timing["cpu_seconds"] / first["cpu_seconds"]
            if torch.cuda.is_available():
                ratios["over_8NDV"] = timing["seconds"] * PRODUCTS_PER_SECOND / (8 * math.prod(size))
            labels: dict = {"size": list(size), "implementation": name}
            rows.append(labels | timing | ratios | measure_memory(size, name))
    return rows


def part_bandwidth() -> list[dict]:
    """The bandwidth of each kernel on this GPU: its required bytes divided by its time; and that of a copy."""
    if not torch.cuda.is_available():
        return []
    from triton.testing import do_bench

    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    copied = 2 * source.numel() / do_bench(lambda: torch.empty_like(source).copy_(source), return_mode="median") * 1e3
    rows = [{"kernel": "copy", "gigabytes_per_second": copied / 1e9, "of_copy": 1.0}]
    for name, (moved, step) in gpu_kernels().items():
        rate = moved / do_bench(step, return_mode="median") * 1e3
        rows.append({"kernel": name, "gigabytes_per_second": rate / 1e9, "of_copy": rate / copied})
    return rows


def run_part(part: str, options: list[str], module: str = "bench.kernels.bench") -> list[dict]:
    """The rows of a part, run in a new process, because importing Triton fixes whether it interprets or compiles."""
    environment = os.environ | {"TRITON_INTERPRET": "1" if part == "bytes" else "0"}
    command = [sys.executable, "-m", module, "--only", part, *options]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def table(rows: list[dict]) -> str:
    """Rows with the same columns as an aligned text table."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    cells = [header] + [[_cell(row.get(key)) for key in header] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value is None else " x ".join(map(str, value)) if isinstance(value, list) else str(value)


def draw_roofline(report: dict, path: Path) -> None:
    """Draw a roofline: operations per byte, and the operations per second an H100 could reach. Nothing is timed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 4.5))
    axes.set_prop_cycle(color=[plt.get_cmap("tab20")(i) for i in range(20)])
    for peak, name in ((PRODUCTS_PER_SECOND, "tensor cores, bfloat16"), (VECTORS_PER_SECOND, "float32")):
        intensity = [0.3, peak / BYTES_PER_SECOND, 5000]
        axes.loglog(intensity, [min(peak, x * BYTES_PER_SECOND) / 1e12 for x in intensity], color="black", lw=1)
        axes.annotate(name, (5000, peak / 1e12), ha="right", va="bottom", fontsize=8)
    for row in report.get("bytes", []):
        if row["minimum"] > 4:  # leave out launches that read only one number
            x = row["operations_per_byte"]
            axes.plot(x, x * BYTES_PER_SECOND / row["unique"] / 1e12, "o", label=f"{row['case']}: {row['kernel'][1:]}")
    for row in report["predict"]:
        M, D, V = row["size"]
        operations = (2 if row["step"] == "forward" else 8) * M * D * V
        x, y = operations / (row["gigabytes"] * 1e9), operations / row["milliseconds"] / 1e9
        axes.plot(x, y, "s", label=f"step, V {V}, {row['step']}: {row['over_floor']:.2f}x its floor")
    axes.set(xlabel="operations per byte", ylabel="TFLOP/s", title="Roofline of an H100 (predicted, not measured)")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="print one part's rows as JSON")
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts, by commas")
    parser.add_argument("--out", type=Path, default=Path("artifacts/kernels"), help="folder of the report")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of the timing")
    parser.add_argument("--implementations", default="naive,tiles,tiles_bf16,compiled", help="what to time, by commas")
    args = parser.parse_args()
    if args.only:
        inputs = [args.rounds, args.implementations.split(",")] if args.only == "time" else []
        print(json.dumps(globals()[f"part_{args.only}"](*inputs)))
        return
    options = ["--rounds", str(args.rounds), "--implementations", args.implementations]
    report = {part: run_part(part, options) for part in args.parts.split(",")}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "bench.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    for part, rows in report.items():
        print(f"\n== {part}\n{table(rows)}")
    if "predict" in report:
        draw_roofline(report, args.out / "roofline.png")
    print(f"\n{args.out}/bench.json, {args.out}/roofline.png")


if __name__ == "__main__":
    main()
