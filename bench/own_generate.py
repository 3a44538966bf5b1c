"""Our sampler on the rows and lengths of bench/peer.py generate. Writes {"seconds": [per repetition]}."""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from data.chat import encode_prompt  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from model.build import load_policy  # noqa: E402
from model.sampling import generate  # noqa: E402
from runtime.host import tune_allocator  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "rows", "out", "lengths", "precision"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    tune_allocator()
    lengths, tokenizer = json.loads(args.lengths), load_tokenizer(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_policy(args.model, precision=args.precision, frozen=True).to(device)
    with open(args.rows) as file:
        prompts = [encode_prompt(json.loads(line)["prompt"], tokenizer, max_length=400) for line in file]
    seconds = []
    for _ in range(args.steps):
        began = time.perf_counter()
        generate(
            policy,
            prompts[: len(lengths)],
            max_new_tokens=lengths,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            slots=args.batch,
            stop_ids=[],
            seeds=list(range(len(lengths))),
            pad_id=tokenizer.pad_id,
        )
        seconds.append(time.perf_counter() - began)
    memory = {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if device == "cuda" else {}
    with open(args.out, "w") as file:
        json.dump({"seconds": seconds} | memory, file)


if __name__ == "__main__":
    main()
