"""Shares of operators in the time of an SFT step, a DPO step and of decoding: the table of docs/speed.md.

    python bench/where_time_goes.py

SmolLM2-135M and the rows of bench/vs_peers.py in bf16. The shares are of the self time of all operators on the CPU
(torch.profiler) in the fourth step, or in the second call of the sampler.
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.vs_peers import GGUF, Bench  # noqa: E402
from data.chat import encode_prompt  # noqa: E402
from losses import dpo_loss, sft_loss  # noqa: E402
from model.build import load_policy  # noqa: E402
from model.packing import make_rows  # noqa: E402
from model.sampling import generate  # noqa: E402
from runtime.host import tune_allocator  # noqa: E402
from runtime.report import print_table  # noqa: E402

KINDS = {  # an operator belongs to the first kind with a word in its name
    "attention: products, softmax": ("bmm", "softmax", "scaled_dot", "attention"),
    "matrix products of layers and vocabulary": ("::mm", "addmm", "linear", "matmul"),
    "AdamW": ("adamw",),
    "copies and casts": ("copy", "::to", "cat", "contiguous", "clone"),
    "norms, SwiGLU, rotary embedding, sums": ("mul", "add", "sub", "div", "sigmoid", "silu", "rsqrt", "mean", "sum",
                                              "exp", "norm", "neg", "pow", "vecdot", "max"),
}  # fmt: skip


def kind_of(operator: str) -> str:
    found = (kind for kind, words in KINDS.items() if any(word in operator.lower() for word in words))
    return next(found, "the rest")


def shares(step: Callable[[], object], warm_up: int) -> dict[str, float]:
    """Percent of operator time by kind."""
    for _ in range(warm_up):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    spent: Counter[str] = Counter()
    for event in profile.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total
    return {kind: 100 * spent[kind] / spent.total() for kind in [*KINDS, "the rest"]}


def training_step(bench: Bench, file: str) -> Callable[[], None]:
    policy = load_policy(GGUF, precision="bf16")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    batch = make_rows(bench.rows(file), bench.tokenizer.pad_id)

    def step() -> None:
        logprobs = policy.logprobs(*batch)
        if file == "SFT":
            loss, _ = sft_loss(logprobs, batch.completion_mask, num_tokens=batch.completion_mask.sum().float())
        else:
            chosen, rejected = logprobs.sum(1).view(-1, 2).unbind(1)
            reference = chosen.detach(), rejected.detach()
            loss, _ = dpo_loss(chosen, rejected, *reference, beta=0.1, label_smoothing=0.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoding(bench: Bench, rows: int) -> Callable[[], object]:
    policy = load_policy(GGUF, precision="bf16", frozen=True)
    prompts = [encode_prompt(row["prompt"], bench.tokenizer, max_length=400) for row in bench.files["PROMPTS"][:rows]]
    return lambda: generate(
        policy, prompts, slots=rows, seeds=list(range(rows)), max_new_tokens=48, temperature=1.0, top_k=0, top_p=1.0,
        stop_ids=[], pad_id=0,
    )  # fmt: skip


def main() -> None:
    tune_allocator()
    bench = Bench(Path(tempfile.mkdtemp()))
    columns = {
        "SFT step": shares(training_step(bench, "SFT"), 3),
        "DPO step": shares(training_step(bench, "PAIRS"), 3),
        "decode, 1 row": shares(decoding(bench, 1), 1),
        "decode, 64 rows": shares(decoding(bench, 64), 1),
    }
    rows = [(kind, *(f"{column[kind]:.0f} %" for column in columns.values())) for kind in [*KINDS, "the rest"]]
    print_table("share of operator time", ("", *columns), rows)


if __name__ == "__main__":
    main()
