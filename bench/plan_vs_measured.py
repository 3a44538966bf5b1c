"""Compare the memory plan of plan.py with measurements. Each script trains a small model in its own process.

    python -m bench.plan_vs_measured              a row per case: planned MB, measured MB, their ratio
    python -m bench.plan_vs_measured train_ppo    one case

On a CPU the measurement is the peak memory of a process in two steps, minus its memory before the first model was
built. Meanwhile every block above 64 KB has its own mapping, so that freed memory, which a training keeps, does not
count.
"""

import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import plan
from model.build import export_model, new_policy, new_reward_model
from model.config import ModelConfig

ROOT = Path(__file__).parents[1]
SHAPE: dict[str, Any] = dict(
    family="llama", vocab_size=8000, hidden_size=512, intermediate_size=1408, num_layers=8, num_heads=8, num_kv_heads=4,
    head_dim=64, max_length=512, rope_theta=10000.0, norm_eps=1e-5, tie_embeddings=False,
)  # fmt: skip
PROMPT, COMPLETION = 64, 64
BATCH = {"train_sft": 16, "train_rm": 8, "train_dpo": 8, "train_ppo": 16}  # rows, pairs or prompts in one forward
CASES = {name: (name, 0) for name in BATCH}  # name -> script, LoRA's rank
CASES |= {f"{name}_lora": (name, 16) for name in ("train_rm", "train_dpo", "train_ppo")}


def words_of(script: str, rank: int, home: Path) -> list[str]:
    """The script's settings: one forward per step, and only the training."""
    size, length = BATCH[script], PROMPT + COMPLETION
    data = {
        "train_ppo": [
            f"data.prompts=[{home}/prompts.jsonl]",
            f"reward_model={home}/reward",
            "kl_exact_every=0",
            f"minibatch_size={size}",
            "ppo_epochs=1",
            f"sampling.max_new_tokens={COMPLETION}",
            f"sampling.slots={size}",
        ]
    }
    pairs = [f"data.train=[{home}/pairs.jsonl]", f"data.max_length={length}", f"data.max_prompt_length={PROMPT}"]
    data |= {"train_rm": [*pairs, "normalise=none"], "train_dpo": [*pairs, "ref=live"]}
    data["train_sft"] = [f"data.train=[{home}/chats.jsonl]", f"data.max_length={length}"]
    return [
        *data[script], f"policy={home}/policy", "num_steps=2", f"batch_size={size}", f"micro_batch_size={size}",
        "eval_every=0", "sample_every=0", "save_every=0", "log.wandb=disabled", f"lora.rank={rank}", "overwrite=true",
        "precision=fp32",
    ]  # fmt: skip


def make_inputs(home: Path) -> None:
    """Write a policy and a reward model with random weights, and rows that fill their windows completely.

    No two rows share a prompt, because a batch stores a shared prompt once and would be smaller than one of real data.
    """
    from data.chat import encode_prompt
    from data.tokenizer import train_sentencepiece

    text = " ".join(f"{word} {number}" for number in range(80) for word in ("order", "coffee", "please"))
    tokenizer = train_sentencepiece([text], 300, home / "tokenizer")
    config = ModelConfig(**SHAPE)
    export_model(new_policy(config, seed=0), home / "policy", tokenizer)
    export_model(new_reward_model(config, seed=0, precision="fp32"), home / "reward", tokenizer)
    answer = {"role": "assistant", "content": text}
    num_tokens = lambda messages: len(encode_prompt(messages, tokenizer, max_length=9999))  # noqa: E731
    short = [whole_prompt(text[20 * row :], num_tokens) for row in range(32)]
    rows: dict[str, list[dict]] = {
        "chats": [{"messages": [*prompt, answer]} for prompt in short],
        "pairs": [{"prompt": prompt, "chosen": text, "rejected": text[::-1]} for prompt in short],
        "prompts": [{"prompt": prompt} for prompt in short],
    }
    for name, of_kind in rows.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_kind))


def whole_prompt(text: str, num_tokens: Callable[[list[dict]], int]) -> list[dict]:
    """The longest beginning of the text that makes a prompt of at most PROMPT tokens."""
    asked = ([{"role": "user", "content": text[:end]}] for end in range(6 * PROMPT, 0, -1))
    return next(messages for messages in asked if num_tokens(messages) <= PROMPT)


def planned(script: str, rank: int, home: Path) -> float:
    """MB by plan.py for the same settings on a CPU: one rank, written-out attention."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        overrides = json.dumps([f"++run_dir={home}/run", *words_of(script, rank, home)])
        plan_overrides = [f"script={script}", f"overrides={overrides}", "num_gpus=1"]
        plan_overrides += [f"prompt_tokens={PROMPT}", f"completion_tokens={COMPLETION}"]
        cfg = compose("plan", plan_overrides)
        parts = plan.memory(ModelConfig(**SHAPE), plan.read_job(cfg), cfg, fused_attention=False)
    return sum(parts.values()) / 1e6


def measured(script: str, rank: int, home: Path) -> float:
    """MB by which this process grows during the script."""
    import importlib

    from runtime import host, run

    module = importlib.import_module(script)
    host.tune_allocator = lambda: ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD
    host.tune_allocator()
    run.plot_metrics = lambda rows, path: None
    weight = torch.ones(256, 256, requires_grad=True)
    # initialises torch's own libraries and pools
    torch.nn.functional.linear(torch.ones(256, 256), weight).sum().backward()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of this process
    before = host.peak_memory_gb(torch.device("cpu"))
    sys.argv = [f"{script}.py", *words_of(script, rank, home), f"hydra.run.dir={home}/{script}"]
    run.main(module.train, script)
    rows = [json.loads(line) for line in (home / script / "metrics.jsonl").read_text().splitlines()]
    return 1000 * (rows[-1]["perf/peak_memory_gb"] - before)


def main(cases: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        make_inputs(home)
        for case in cases:
            child = [sys.executable, "-m", "bench.plan_vs_measured", "--measure", case, directory]
            output = subprocess.run(child, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE).stdout
            expected, found = planned(*CASES[case], home), float(output.split()[-1])
            ratio = expected / found
            print(f"{case:14s}  planned {expected:7.1f} MB  measured {found:7.1f} MB  {ratio:.3f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(measured(*CASES[sys.argv[2]], Path(sys.argv[3])))
    else:
        main(sys.argv[1:] or list(CASES))
