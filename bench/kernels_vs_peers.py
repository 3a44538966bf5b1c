"""Compare the log-prob kernel with liger-kernel's, cut-cross-entropy's and TRL's, in one run with the same counters.

    .venv-bench/bin/python -m bench.kernels_vs_peers

It runs in the environment of bench/requirements.txt. `predict`: operations, bytes and the time of an H100 at full size,
by the same rules for all (nothing is timed). `bytes`: counted by the interpreter at a small size. `binary`: registers
and spills on four GPUs. `time`: milliseconds and scratch memory on this machine's GPU, or on the CPU for those that
can run there.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from cut_cross_entropy import cce
from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.errors import OutOfResources
from trl.kernels import chunked_logprob

from bench.kernels import bench_time
from bench.kernels.bench import FULL_SIZE, run_part, table
from bench.kernels.bench_cases import FORMULAS, IMPLEMENTATIONS, logprob_inputs
from bench.kernels.cost import PRODUCTS_PER_SECOND, Formula, counting
from kernels import logprob
from kernels.backend import kernels_as
from kernels.logprob import TILES, linear_logprob

SMALL = (256, 128, 1024)
CPU_SIZE = (512, 576, 49152)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -linear_logprob(hidden, weight, targets).sum()


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    arguments = (None, None, -100, 0.0, 0.0, "sum")  # Liger's defaults, with a sum
    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, *arguments)[0]


def liger_fp32(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    arguments = (None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32)  # accumulates as exactly as ours
    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, *arguments)[0]


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    parameters = cce.CCEParams(targets, None, None, "sum", None, False, targets.shape)
    return cce.linear_cross_entropy_apply(hidden, weight, parameters)


def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    arguments = (None, targets, 1.0, CHUNK["trl"], None, 1.0, ())
    return -chunked_logprob.ChunkedLogProbFunction.apply(hidden, weight, *arguments)[0].sum()


CHUNK = {"trl": 8192}  # columns of TRL's tile
PEERS = {
    "ours": ours,
    "naive": naive,
    "liger": liger,
    "liger fp32 sums": liger_fp32,
    "cut-cross-entropy": cut_cross_entropy,
    "trl": trl,
}


def as_on_a_gpu() -> None:
    """TRL selects its GPU path by the device's name. Here tensors of the GPU path are on another device."""
    chunked_logprob._use_triton = lambda device: True
    torch.is_autocast_enabled = lambda *device: False
    chunked_logprob._addmm_fp32 = lambda total, a, b: torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _forward_product(e, c, *args, **options):
    """cut-cross-entropy's forward: all logits in registers. It must at least read both inputs."""
    return 2 * e.shape[0] * c.shape[0] * e.shape[1], _bytes(e, c)


def _backward_products(e, c, *args, **options):
    """Its backward: the logits again and both gradients, accumulated in memory.

    Each is at least read and written once.
    """
    return 6 * e.shape[0] * c.shape[0] * e.shape[1], 3 * _bytes(e, c)


PEER_FORMULAS: dict[str, Formula] = FORMULAS | {
    "_cce_lse_forward_kernel": _forward_product,
    "_cce_backward_kernel": _backward_products,
    "_indexed_neg_dot_forward_kernel": lambda e, *args, **rest: (0, 2 * _bytes(e)),
    "liger_cross_entropy_kernel": lambda X_ptr, **rest: (0, 3 * _bytes(X_ptr)),  # read twice and written once
    "element_mul_kernel": lambda *args, **rest: (0, 0),  # skipped if the gradient is 1
    "_forward_kernel": lambda tile, *args, **rest: (0, _bytes(tile)),
    "_backward_kernel": lambda tile, *args, **rest: (0, 2 * _bytes(tile)),
}


def part_predict() -> list[dict]:
    as_on_a_gpu()
    rows = []
    for size in FULL_SIZE:
        M, D, V = size
        for name, function in PEERS.items():
            inputs = logprob_inputs(*size, torch.bfloat16, "meta")
            with kernels_as("triton"), counting(PEER_FORMULAS, item=M) as cost:
                function(*inputs).backward()
            rows.append(
                {
                    "size": list(size),
                    "implementation": name,
                    "operations_over_8NDV": cost.operations / (8 * M * D * V),
                    "gigabytes": cost.bytes / 1e9,
                    "over_minimum": cost.bytes / (2 * _bytes(*inputs[:2])),
                    "scratch_mb": (cost.peak - _bytes(*inputs[:2])) / 1e6,
                    "launches": cost.launches,
                    "milliseconds": 1e3 * cost.seconds,
                    "over_8NDV": cost.seconds * PRODUCTS_PER_SECOND / (8 * M * D * V),
                }
            )
    return rows


def part_bytes() -> list[dict]:
    from bench.kernels.interpreter import repair
    from bench.kernels.traffic import Traffic

    repair()
    as_on_a_gpu()
    TILES["cpu"] = CHUNK["trl"] = SMALL[2] // 8  # eight tiles, as at full size on a GPU
    rows = []
    for name, function in PEERS.items():
        hidden, weight, targets = logprob_inputs(*SMALL, torch.bfloat16, "cpu")
        truth = torch.autograd.grad(naive(hidden.double(), weight.double(), targets), (hidden, weight))
        with kernels_as("triton"), Traffic() as traffic:
            logprob._add_product = chunked_logprob._addmm_fp32 = _gpu_addmm(traffic)
            loss = function(hidden, weight, targets)
            loss.backward()
        minimum = 2 * _bytes(hidden, weight) + _bytes(targets) + 4 * SMALL[0]
        errors = [(x.grad - t).norm() / t.norm() for x, t in zip((hidden, weight), truth, strict=True)]
        rows.append(
            {
                "implementation": name,
                "requested": traffic.requested / minimum,
                "unique": traffic.unique / minimum,
                "triton_launches": sum(count.launches for count in traffic.kernels.values()),
                "torch_calls": sum(count.launches for count in traffic.operations.values()),
                "hidden_gradient_error": errors[0].item(),
                "weight_gradient_error": errors[1].item(),
            }
        )
    return rows


def _gpu_addmm(traffic) -> Callable[..., None]:
    """A float32 total += a @ b of bfloat16 factors is one library call on a GPU, and counts as one."""

    def add(total: Tensor, a: Tensor, b: Tensor) -> None:
        with _disable_current_modes():
            total.addmm_(a.float(), b.float())
        count, moved = traffic.operations["addmm"], _bytes(a, b) + 2 * _bytes(total)
        count.launches, count.requested, count.unique = (
            count.launches + 1,
            count.requested + moved,
            count.unique + moved,
        )

    return add


def part_binary() -> list[dict]:
    from bench.kernels.ahead_of_time import ARCHS, capture

    as_on_a_gpu()
    chunked_logprob._addmm_fp32 = lambda total, a, b: None  # nothing is computed during the capture of kernels
    rows = []
    for arch in ARCHS:
        for name in ("ours", "liger", "cut-cross-entropy", "trl"):
            inputs = logprob_inputs(16, 128, 4096, torch.bfloat16, "cpu")
            with kernels_as("triton"), capture(arch) as binaries:
                try:
                    PEERS[name](*inputs).backward()
                except OutOfResources as error:
                    binaries.append({"arch": arch, "kernel": f"refused: {error}"})
            rows += [{"implementation": name} | row for row in binaries]
    return rows


def part_time() -> list[dict]:
    if torch.cuda.is_available():
        return [row for size in FULL_SIZE for row in _time_on_gpu(size, rounds=7)]
    names = ["naive", "ours", "trl"]  # the others have no path without a GPU
    steps = {"naive": IMPLEMENTATIONS["naive"], "ours": IMPLEMENTATIONS["tiles"], "trl": _trl_with_entropy}
    bench_time.IMPLEMENTATIONS.update(steps)
    times = bench_time.measure_time(CPU_SIZE, names, rounds=5)
    first = times[names[0]]["cpu_seconds"]
    ratios = {name: {"cpu_ratio": timing["cpu_seconds"] / first} for name, timing in times.items()}
    return [{"size": list(CPU_SIZE), "implementation": name} | times[name] | ratios[name] for name in names]


def _time_on_gpu(size: tuple[int, int, int], rounds: int) -> list[dict]:
    """Medians of interleaved rounds, forward + backward in bfloat16, without the first two rounds."""
    inputs, rate = logprob_inputs(*size, torch.bfloat16, "cuda"), product_rate()
    peaks = {}
    seconds: dict[str, list[float]] = {name: [] for name in PEERS}
    for number, name in itertools.product(range(rounds + 2), PEERS):
        inputs[0].grad = inputs[1].grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        spent = elapsed(lambda function=PEERS[name]: function(*inputs).backward())
        peaks[name] = torch.cuda.max_memory_allocated() - before - _bytes(*inputs[:2])
        seconds[name] += [spent] if number >= 2 else []
    middle = {name: statistics.median(all_of_it) for name, all_of_it in seconds.items()}
    return [
        {
            "size": list(size),
            "implementation": name,
            "milliseconds": 1e3 * middle[name],
            "times_ours": middle[name] / middle["ours"],
            "over_8NDV": middle[name] * rate / (8 * math.prod(size)),
            "scratch_mb": peaks[name] / 1e6,
            "product_tflops": rate / 1e12,
        }
        for name in PEERS
    ]


def product_rate() -> float:
    """Operations per second of a bfloat16 product of 8192 x 8192 matrices on this GPU."""
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    return 2 * 8192**3 / statistics.median([elapsed(lambda: a @ b) for _ in range(12)][2:])


def elapsed(work: Callable[..., object]) -> float:
    """Seconds of `work` on this GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _trl_with_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    arguments = (None, targets, 1.0, 8192, None, 1.0, ("entropy",))
    return chunked_logprob.ChunkedLogProbFunction.apply(hidden, weight, *arguments)[:2]


PARTS: dict[str, Callable[[], list[dict]]] = {
    "predict": part_predict,
    "bytes": part_bytes,
    "binary": part_binary,
    "time": part_time,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="print one part's rows as JSON")
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts, by commas")
    parser.add_argument("--out", type=Path, default=Path("artifacts/kernels"), help="folder of the report")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(PARTS[args.only]()))
        return
    report = {part: run_part(part, [], module="bench.kernels_vs_peers") for part in args.parts.split(",")}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "peers.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    for part, rows in report.items():
        print(f"\n== {part}\n{table(rows)}")


if __name__ == "__main__":
    main()
