"""One command that checks this project on the GPU of this machine: correctness, speed, and the distance to its limits.

    python -m bench.gpu

It takes less than ten minutes: the most important tests of `make test-gpu` (kernels, attention, the four scripts), the
limits of the card (a large product, a large copy), SFT, reward model, DPO and PPO steps, decoding of 1 to 256 rows for
three sizes, transformers for comparison if it is installed, and each prediction of docs/kernels.md with its
measurement. It writes gpu.json, gpu.md and gpu.png into --out. With --tiny it runs on any device in a minute, as in a
test.
"""

import argparse
import gc
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from bench import gpu_work as work  # noqa: E402
from kernels.backend import HAS_TRITON  # noqa: E402
from model.attention import Blocks, attend_flex  # noqa: E402
from runtime.devices import own_device  # noqa: E402
from runtime.plots import pyplot, save_figure  # noqa: E402

ESSENTIAL = ["tests/kernels/test_kernels_gpu.py", "tests/model/test_transformer.py", "tests/test_scripts_gpu.py"]
SECONDS = 540  # parts that would begin later are left out and named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--tiny", action="store_true", help="small shapes, few rounds, no tests: on any device")
    args = parser.parse_args()
    device, started = own_device(), time.monotonic()
    if device.type != "cuda" and not args.tiny:
        raise SystemExit("error: this machine has no GPU; use --tiny to run on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict = {"machine": machine(device), "left_out": []}
    parts = {"limits": limits, "attention": attention, "training": training, "ppo": ppo, "decoding": decoding}
    if not args.tiny:
        parts = {"tests": tests} | parts | {"kernels": kernels}
    for name, part in parts.items():
        if time.monotonic() - started > SECONDS:
            result["left_out"].append(name)
            continue
        print(f"{name} ...", file=sys.stderr)
        result[name] = part(device, args.tiny, result)
        (args.out / "gpu.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    text = tables(result)
    (args.out / "gpu.md").write_text(text, encoding="utf-8")
    draw(result, args.out / "gpu.png")
    print(f"{text}\ndone in {time.monotonic() - started:.0f} s: {args.out}")


def machine(device: torch.device) -> dict[str, str]:
    """The properties of the machine that determine the figures."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    triton = __import__("triton").__version__ if HAS_TRITON else "none"
    return {"device": card, "torch": torch.__version__, "triton": triton, "python": platform.python_version()}


def tests(device: torch.device, tiny: bool, result: dict) -> dict:
    """Run the tests on which the other figures depend. Returns pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *ESSENTIAL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    return {"exit": done.returncode, "summary": done.stdout.strip().splitlines()[-1] if done.stdout else done.stderr}


def limits(device: torch.device, tiny: bool, result: dict) -> dict:
    """TFLOP/s of a product of square bf16 matrices, GB/s of a copy (bytes read and written)."""
    size, copied = (256, 2**20) if tiny else (8192, 2**30)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    source = torch.randn(copied, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    product, _ = work.time_step(lambda: a @ a, device, 10)
    copy, _ = work.time_step(lambda: target.copy_(source), device, 10)
    return {"tflops": 2 * size**3 / product / 1e12, "gigabytes_per_second": 4 * copied / copy / 1e9}


def attention(device: torch.device, tiny: bool, result: dict) -> list[dict]:
    """Causal attention over documents, forward and backward: flex_attention as in our model, and torch's varlen."""
    heads, kv_heads, width, length, count = (4, 2, 16, 32, 2) if tiny else (32, 8, 64, 1024, 16)
    tokens = length * count
    spans = [(n * length, (n + 1) * length) for n in range(count)]
    numbers = torch.arange(count, device=device).repeat_interleave(length)
    answers, positions = torch.zeros_like(numbers), torch.arange(length, device=device).repeat(count)
    blocks = Blocks(list(map(list, spans)), numbers, answers, positions, length)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q = torch.randn(tokens, heads, width, device=device, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(tokens, kv_heads, width, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    ways = {"flex_attention": lambda: attend_flex(q, k, v, blocks, None)}
    if device.type == "cuda":
        ends = torch.arange(0, tokens + 1, length, device=device, dtype=torch.int32)
        ways["varlen_attn"] = lambda: varlen(q, k, v, ends, length)
    flops = 3 * 2 * 2 * heads * width * count * length * (length + 1) / 2  # forward, and twice as much backward
    rows = []
    for name, run in ways.items():
        try:
            seconds, _ = work.time_step(lambda run=run: run().sum().backward(), device, 1 if tiny else 10)
            rows.append({"name": name, "seconds": seconds, "tflops": flops / seconds / 1e12})
        except (RuntimeError, ImportError) as error:
            rows.append({"name": name, "error": str(error).splitlines()[0]})
    return rows


def varlen(q, k, v, ends, longest: int):
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=True)


def training(device: torch.device, tiny: bool, result: dict) -> list[dict]:
    """SFT, reward model and DPO steps of every shape, and transformers' SFT step."""
    rows = []
    for shape in work.TINY if tiny else work.SHAPES:
        for name in ("sft", "rm", "dpo"):
            rows.append(row(shape, name, lambda s=shape, n=name: work.training(n, s, device, 1 if tiny else 5), result))
        other = guarded(lambda s=shape: work.transformers_sft(s, device, 1 if tiny else 5))
        if isinstance(other, tuple):
            rows.append(row(shape, f"sft by {other[0]}", lambda o=other: o[1], result))
        elif other is not None:
            rows.append({"shape": shape.name, "work": "sft by transformers", "error": other})
    return rows


def ppo(device: torch.device, tiny: bool, result: dict) -> list[dict]:
    """A PPO step by phase."""
    rows = []
    for shape in work.TINY if tiny else work.SHAPES:
        timed = guarded(lambda s=shape: work.ppo_phases(s, device, 1 if tiny else 3))
        if isinstance(timed, str):
            rows.append({"shape": shape.name, "work": "ppo", "error": timed})
            continue
        rows += [row(shape, f"ppo: {phase}", lambda t=t: t, result) for phase, t in timed.items()]
    return rows


def decoding(device: torch.device, tiny: bool, result: dict) -> list[dict]:
    """Seconds of a decoding step, and the time to read weights and cache at the copy's bandwidth."""
    rows = []
    for shape in work.TINY[:1] if tiny else work.SHAPES:
        for count in (1, 4) if tiny else (1, 16, 64, 256):
            timed = guarded(lambda s=shape, c=count: work.decoding(s, c, device, 1 if tiny else 3))
            if isinstance(timed, str):
                rows.append({"shape": shape.name, "rows": count, "error": timed})
                continue
            floor = timed[1] / (result["limits"]["gigabytes_per_second"] * 1e9)
            rows.append({"shape": shape.name, "rows": count, "seconds": timed[0], "floor": floor})
    return rows


def kernels(device: torch.device, tiny: bool, result: dict) -> dict:
    """The last lines of `bench.kernels.bench`, run in its own process: each kernel's prediction and its time."""
    command = [sys.executable, "-m", "bench.kernels.bench", "--parts", "time", "bandwidth"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    return {"exit": done.returncode, "output": (done.stdout + done.stderr)[-6000:]}


def row(shape: work.Shape, name: str, timed, result: dict) -> dict:
    """One line of the table of steps."""
    found = guarded(timed)
    if isinstance(found, str):
        return {"shape": shape.name, "work": name, "error": found}
    share = found.flops / found.seconds / (result["limits"]["tflops"] * 1e12)
    return {"shape": shape.name, "work": name, **found._asdict(), "share": share}


def guarded(job):
    """The result of the job, or its error on one line, because a size that does not fit must not end the other jobs."""
    try:
        return job()
    except (torch.OutOfMemoryError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def tables(result: dict) -> str:
    """The whole result as Markdown."""
    lines = [f"# {result['machine']['device']}", "", ", ".join(f"{k} {v}" for k, v in result["machine"].items())]
    if "tests" in result:
        lines.append(f"Tests: {result['tests']['summary']} (exit {result['tests']['exit']})")
    known = result["limits"]
    lines.append(
        f"Limits: {known['tflops']:.1f} TFLOP/s in bf16 products, {known['gigabytes_per_second']:.0f} GB/s copied"
    )
    lines += ["", "| attention, forward and backward | ms | TFLOP/s |", "| --- | --- | --- |"]
    lines += [
        line(r["name"], "", r, lambda r: (f"{1e3 * r['seconds']:.2f}", f"{r['tflops']:.1f}"))
        for r in result["attention"]
    ]
    lines += [
        "",
        "| model | step | ms | tokens/s | share of the product limit | peak GB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in result.get("training", []) + result.get("ppo", []):
        lines.append(line(r["shape"], r["work"], r, lambda r: (
            f"{1e3 * r['seconds']:.1f}", f"{r['tokens'] / r['seconds']:,.0f}", f"{100 * r['share']:.1f} %",
            f"{r['gigabytes']:.1f}",
        )))  # fmt: skip
    lines += ["", "| model | rows | ms a decoding step | reading alone | ratio |", "| --- | --- | --- | --- | --- |"]
    for r in result.get("decoding", []):
        lines.append(
            line(
                r["shape"],
                str(r["rows"]),
                r,
                lambda r: (f"{1e3 * r['seconds']:.2f}", f"{1e3 * r['floor']:.2f}", f"{r['seconds'] / r['floor']:.2f}"),
            )
        )
    if "kernels" in result:
        lines += ["", "```", result["kernels"]["output"].strip(), "```"]
    if result["left_out"]:
        lines += ["", f"Left out after {SECONDS} s: {', '.join(result['left_out'])}"]
    return "\n".join(lines) + "\n"


def line(first: str, second: str, row: dict, cells) -> str:
    """A row of a table, or the reason why it has no figures."""
    names = [first, second] if second else [first]
    return "| " + " | ".join([*names, *([row["error"]] if "error" in row else cells(row))]) + " |"


def draw(result: dict, path: Path) -> None:
    """Each step's share of the product limit."""
    rows = [r for r in result.get("training", []) + result.get("ppo", []) if "share" in r]
    figure, axis = pyplot().subplots(figsize=(7, 0.3 * len(rows) + 1))
    axis.barh([f"{r['shape']}: {r['work']}" for r in rows][::-1], [100 * r["share"] for r in rows][::-1])
    axis.set_xlabel("share of the measured product limit, %")
    axis.set_title(f"{result['machine']['device']}, torch {result['machine']['torch']}", fontsize=9)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
