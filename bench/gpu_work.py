"""The work that bench/gpu.py times: our steps, our sampler, and transformers' training step for comparison.

Weights and tokens are random, because speed does not depend on them.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from kernels.clips import Clips
from losses import PolicyTerms, ValueTerms, dpo_loss, ppo_loss, reward_loss, sft_loss
from model.build import empty, init_weights, new_policy
from model.config import ModelConfig, make_config
from model.footprint import forward_flops
from model.heads import Policy, RewardModel, ValueModel
from model.lora import add_lora
from model.packing import Rows, make_rows
from model.sampling import generate

ROOT = Path(__file__).parents[1]
LORA: dict[str, Any] = {"alpha": 32.0, "targets": ["qkv", "out", "gate_up", "down"], "seed": 0}


class Shape(NamedTuple):
    """A model, and the rows of one forward: their number, prompt and completion tokens."""

    name: str
    model: str  # name in conf/model
    rank: int  # rank of LoRA; 0 = full training
    rows: int
    prompt: int
    completion: int

    @property
    def config(self) -> ModelConfig:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("train_sft", [f"model={self.model}", "policy=null"])
        return make_config(cfg.model, cfg.model.vocab_size or 300)


SHAPES = (
    Shape("135M", "smollm2_135m", 0, 16, 512, 512),
    Shape("1.7B", "smollm2_1_7b", 0, 16, 512, 512),
    Shape("8B, LoRA", "llama3_8b", 16, 8, 512, 512),
)
TINY = (Shape("tiny", "tiny", 0, 4, 12, 8), Shape("tiny, LoRA", "tiny", 4, 4, 12, 8))


class Timed(NamedTuple):
    """Seconds of one step, its required operations, its tokens, and the peak memory in GB (0 on a CPU)."""

    seconds: float
    flops: float
    tokens: int
    gigabytes: float


def time_step(step: Callable[..., None], device: torch.device, rounds: int) -> tuple[float, float]:
    """(median seconds, peak GB) of `rounds` steps after one or two warm-up steps."""
    for _ in range(min(2, rounds)):
        step()
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        step()
        wait(device)
        seconds.append(time.perf_counter() - started)
    return median(seconds), torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def random_rows(shape: Shape, device: torch.device, copies: int = 1) -> Rows:
    """Rows of equal lengths. Each prompt occurs `copies` times, each time with another completion."""
    config, generator = shape.config, torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(config.vocab_size, (n,), generator=generator).tolist()  # noqa: E731
    mask, rows = [False] * shape.prompt + [True] * shape.completion, []
    for _ in range(shape.rows // copies):
        prompt = draw(shape.prompt)
        rows += [{"input_ids": prompt + draw(shape.completion), "completion_mask": mask} for _ in range(copies)]
    return make_rows(rows, pad_id=0).to(device)


def network(kind: type, shape: Shape, device: torch.device, *, frozen: bool):
    """A network with random weights: bf16 if it is frozen or has adapters, else with fp32 masters."""
    if kind is Policy and not frozen and not shape.rank:
        return new_policy(shape.config, seed=0, precision="bf16").to(device)
    model = init_weights(empty(kind, shape.config, "bf16", frozen or shape.rank > 0), 0)
    model = model if frozen else add_lora(model, rank=shape.rank, **LORA)
    return model.to(device)


def training(name: str, shape: Shape, device: torch.device, rounds: int) -> Timed:
    """One optimizer step of `sft`, `rm` or `dpo` (with known reference log-probs), including clipping and AdamW."""
    model = network(RewardModel if name == "rm" else Policy, shape, device, frozen=False)
    rows = random_rows(shape, device, copies=1 if name == "sft" else 2)
    loss_of = {"sft": sft, "rm": rm, "dpo": dpo}[name]
    step = optimizer_step(lambda: loss_of(model, rows), model)
    seconds, peak = time_step(step, device, rounds)
    tokens = len(rows.stream.tokens)
    passes = 2 if shape.rank else 3  # a frozen weight has no gradient
    flops = passes * forward_flops(
        shape.config,
        tokens=tokens,
        length=shape.prompt + shape.completion,
        targets=0 if name == "rm" else len(rows.stream.targets),
    )
    return Timed(seconds, flops, tokens, peak)


def optimizer_step(loss: Callable[[], Tensor], *models: torch.nn.Module) -> Callable[[], None]:
    """The whole step: loss, gradients, clipping, AdamW."""
    weights = [p for model in models for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def sft(policy: Policy, rows: Rows) -> Tensor:
    return sft_loss(policy.logprobs(*rows), rows.completion_mask, num_tokens=len(rows.stream.targets))[0]


def rm(model: RewardModel, rows: Rows) -> Tensor:
    chosen, rejected = model.score(*rows).view(-1, 2).unbind(1)
    ones = torch.ones_like(chosen)
    return reward_loss(chosen, rejected, ones, 0 * ones, ones < 0, center_coef=0.0, num_groups=len(ones))[0]


def dpo(policy: Policy, rows: Rows) -> Tensor:
    chosen, rejected = policy.logprobs(*rows).sum(1).view(-1, 2).unbind(1)
    zeros = torch.zeros_like(chosen)
    return dpo_loss(chosen, rejected, zeros, zeros, beta=0.1, label_smoothing=0.0)[0]


def ppo_phases(shape: Shape, device: torch.device, rounds: int) -> dict[str, Timed]:
    """A PPO step by phase: sampling, forwards of the frozen networks, one epoch of updates in one minibatch.

    One network stands for both the reference and the reward model. They are read one after the other and have no state.
    """
    policy, value = (network(kind, shape, device, frozen=False) for kind in (Policy, ValueModel))
    frozen = network(Policy, shape, device, frozen=True)
    rows, config, length = random_rows(shape, device), shape.config, shape.prompt + shape.completion
    tokens, targets, mask = len(rows.stream.tokens), len(rows.stream.targets), rows.completion_mask
    prompts = [ids[: shape.prompt].tolist() for ids in rows.input_ids.cpu()]

    def sample() -> None:
        sampled(policy, prompts, shape.completion)

    @torch.no_grad()
    def read() -> None:
        policy.logprobs_and_entropy(*rows), frozen.logprobs(*rows), value(*rows), frozen.logprobs(*rows)

    with torch.no_grad():
        old, values = policy.logprobs(*rows), value(*rows)
    advantages = torch.randn_like(old)

    def loss() -> Tensor:
        loss, _ = ppo_loss(
            PolicyTerms(policy.logprobs(*rows), old, advantages, mask),
            ValueTerms(value(*rows), values, values + advantages, mask),
            Clips(policy=0.2, dual=None, value=0.2, value_coef=0.1),
            num_tokens=float(targets),
            num_states=float(targets),
        )
        return loss

    with_head = forward_flops(config, tokens=tokens, length=length, targets=targets)
    without = forward_flops(config, tokens=tokens, length=length, targets=0)
    flops = {
        "rollout": with_head,
        "read": 3 * with_head + without,
        "learn": (2 if shape.rank else 3) * (with_head + without),
    }
    steps = {"rollout": sample, "read": read, "learn": optimizer_step(loss, policy, value)}
    timed = {}
    for name, step in steps.items():
        seconds, peak = time_step(step, device, rounds)
        timed[name] = Timed(seconds, flops[name], tokens, peak)
    return timed


def sampled(policy: Policy, prompts: list[list[int]], tokens: int) -> None:
    generate(
        policy, prompts, max_new_tokens=tokens, slots=len(prompts), seeds=list(range(len(prompts))), temperature=1.0,
        top_k=0, top_p=1.0, stop_ids=[], pad_id=0,
    )  # fmt: skip


def decoding(shape: Shape, rows: int, device: torch.device, rounds: int) -> tuple[float, float]:
    """(seconds of one decoding step of `rows` rows, bytes that it must read: weights, and keys and values so far).

    Completions of two lengths are sampled. The difference of their times is decoding alone.
    """
    policy = network(Policy, shape, device, frozen=True)
    prompts = [[1 + row % 7] * shape.prompt for row in range(rows)]
    short, long = max(2, shape.completion // 8), max(4, shape.completion // 2)
    took = [time_step(lambda n=n: sampled(policy, prompts, n), device, rounds)[0] for n in (short, long)]
    config = policy.config
    weights = 2 * sum(
        p.numel() for name, p in policy.named_parameters() if "embed" not in name or config.tie_embeddings
    )
    cache = 4 * rows * config.num_layers * config.num_kv_heads * config.head_dim * (shape.prompt + (short + long) // 2)
    return (took[1] - took[0]) / (long - short), weights + cache


def transformers_sft(shape: Shape, device: torch.device, rounds: int) -> tuple[str, Timed] | None:
    """transformers' Llama of the same shape on the same rows, with SDPA, and with Liger's kernels if installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    config = shape.config
    if shape.rank or config.family != "llama":
        return None
    name = "transformers"
    if device.type == "cuda":
        try:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
            name += " + Liger"
        except ImportError:
            pass
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            head_dim=config.head_dim,
            num_key_value_heads=config.num_kv_heads,
            tie_word_embeddings=config.tie_embeddings,
            max_position_embeddings=config.max_length,
            attn_implementation="sdpa",
        )
    ).to(device)
    rows = random_rows(shape, device)
    labels = rows.input_ids.masked_fill(~rows.completion_mask, -100)

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model(input_ids=rows.input_ids, labels=labels).loss

    seconds, peak = time_step(optimizer_step(loss, model), device, rounds)
    tokens = len(rows.stream.tokens)
    flops = 3 * forward_flops(config, tokens=tokens, length=shape.prompt + shape.completion, targets=tokens)
    return name, Timed(seconds, flops, tokens, peak)
