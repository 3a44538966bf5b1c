"""Estimate what a training needs, before it starts: memory per GPU, speed, hours, cost, and what would make it fit.

    python plan.py script=train_dpo model=mistral_7b gpu=h100 num_gpus=8 'overrides=["batch_size=128"]'

Memory is counted (model/footprint.py); time is a roofline with the efficiencies that conf/plan.yaml states. No GPU was
measured. docs/scaling.md has the assumptions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from hydra import compose
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from model.config import ModelConfig
from model.footprint import (
    Footprint,
    Forward,
    adapter_parameters,
    cache_bytes,
    count_parameters,
    forward_flops,
    kept_bytes,
)
from runtime.config import check_batch, check_choice, check_positive, check_whole
from runtime.devices import PRECISIONS
from runtime.script import enter

SCRIPTS = ("train_sft", "train_rm", "train_ppo", "train_dpo")
TILE = 4096  # columns of the vocabulary that the log-prob works on at a time
GB = 1e9
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64  # of a weight: its code, its share of a scale and of the scale's


@dataclass(frozen=True)
class Networks:
    """A number of networks of one size. Policies have an output matrix, reward and value models do not."""

    count: int
    outputs: int

    def parameters(self, P: Footprint) -> int:
        return self.count * (P.body + P.embedding) + self.outputs * P.output

    def ends(self, P: Footprint) -> int:
        """Parameters of embeddings and output matrices."""
        return self.count * P.embedding + self.outputs * P.output


@dataclass(frozen=True)
class Job:
    """The settings of the script on which the plan depends."""

    script: str
    dataset_rows: int  # of an optimizer step, over all ranks: conversations, pairs, or prompts of PPO
    rows: int  # sequences of it: two of a pair, samples_per_prompt of a prompt
    micro_rows: int  # sequences of a forward, per rank
    blocks: int  # of a forward, per rank: a prompt with what follows it
    block: int  # tokens of one in the packed stream: a shared prompt once
    length: int  # tokens of a sequence
    targets: int  # completion tokens of a forward, per rank
    epochs: int  # passes over a batch
    num_steps: int
    dtype: torch.dtype
    checkpointing: bool | str  # offload: layers' inputs in host memory
    lora_rank: int  # 0: every weight learns
    nf4: bool  # the layers of the bases in 4 bits
    optim: str
    learners: Networks  # those that are trained
    frozen: Networks  # those in memory that are not trained
    bases: Networks  # frozen weights under adapters; none without LoRA
    slots: int  # rows that a rank decodes together; 0 where nothing is sampled

    @property
    def tokens(self) -> int:
        """Of a forward, per rank."""
        return self.blocks * self.block


def check_plan(cfg: DictConfig) -> None:
    """Raise ValueError where settings are wrong."""
    if cfg.script not in SCRIPTS:
        raise ValueError(f"script={cfg.script!r} is none of {', '.join(SCRIPTS)}")
    if cfg.gpu not in cfg.gpus:
        raise ValueError(f"gpu={cfg.gpu!r} is not in the table; known: {', '.join(cfg.gpus)} (conf/plan.yaml)")
    check_whole(1, **{key: cfg[key] for key in ("num_gpus", "prompt_tokens", "completion_tokens")})
    check_whole(1, **{key: cfg[key] for key in ("shards", "dataset_rows") if cfg[key] is not None})
    shares = ("compute_efficiency", "memory_efficiency", "link_efficiency", "headroom")
    check_positive(node_gb_per_second=cfg.node_gb_per_second, **{key: cfg[key] for key in shares})
    if cfg.num_gpus % (cfg.shards or cfg.num_gpus):
        raise ValueError(f"shards={cfg.shards} must divide num_gpus={cfg.num_gpus}")


def read_job(cfg: DictConfig) -> Job:
    """The settings of the script's composed config. Raises ValueError where they contradict each other."""
    own = compose(cfg.script, list(cfg.overrides))
    rollout, pairs = cfg.script == "train_ppo", cfg.script in ("train_rm", "train_dpo")
    sides = 2 if pairs else 1
    micro = own.micro_batch_size
    batch = own.batch_size * own.samples_per_prompt if rollout else own.batch_size
    completion = own.sampling.max_new_tokens if rollout else cfg.completion_tokens
    check_whole(0, lora__rank=own.lora.rank)
    check_choice("precision", own.precision, PRECISIONS)
    lora = own.lora.rank > 0  # then the reference is the policy with its adapters off
    references = int(not lora and (rollout or own.get("ref") == "live"))
    scorers = int(rollout and own.get("reward") is None)
    outputs = int(cfg.script != "train_rm")
    learners = 2 if rollout and own.advantage == "gae" else 1
    shared = not rollout or (own.value_start == "policy" and cfg.num_gpus == 1)  # FSDP2 cannot share a weight
    if batch % cfg.num_gpus:
        raise ValueError(f"{batch} rows of a step do not divide over num_gpus={cfg.num_gpus}; change batch_size")
    key = "minibatch_size" if rollout else "batch_size"  # as the script will check it
    check_batch(own[key], micro, cfg.num_gpus, key)
    return Job(
        script=cfg.script, dataset_rows=own.batch_size, rows=batch * sides, micro_rows=micro * sides,
        blocks=micro, block=cfg.prompt_tokens + sides * completion, length=cfg.prompt_tokens + completion,
        targets=micro * sides * completion, epochs=own.get("ppo_epochs", 1), num_steps=own.num_steps,
        dtype=torch.float32 if own.precision == "fp32" else torch.bfloat16,  # auto: every GPU of the table has bf16
        checkpointing=own.activation_checkpointing, lora_rank=own.lora.rank, nf4=own.lora.base == "nf4",
        optim=own.optim.kind, learners=Networks(learners, outputs), frozen=Networks(references + scorers, references),
        bases=Networks(lora * (1 if shared else learners), lora * outputs),
        slots=min(own.sampling.slots, batch // cfg.num_gpus) if rollout else 0,
    )  # fmt: skip


def memory(config: ModelConfig, job: Job, cfg: DictConfig, *, fused_attention: bool = True) -> dict[str, float]:
    """Bytes per rank of each part at the peak, which is the end of the last forward of a step."""
    shards, P = cfg.shards or cfg.num_gpus, count_parameters(config)
    item, lora, sharded = job.dtype.itemsize, job.lora_rank > 0, shards > 1
    learners = job.learners.count
    trained = learners * adapter_parameters(config, job.lora_rank) if lora else job.learners.parameters(P)
    copies = not (sharded or lora or job.dtype == torch.float32)  # of float32 weights, for the products
    forward = Forward(
        rows=job.blocks,
        length=job.block,
        dtype=job.dtype,
        master=torch.float32 if copies else job.dtype,
        fused_attention=fused_attention,
        checkpointing=job.checkpointing,
    )
    kept = kept_bytes(config, forward)
    gradients, activations = trained * 4 / shards, learners * (config.num_layers * kept.layer + kept.rest)
    if job.rows <= job.micro_rows * cfg.num_gpus:  # one forward a step: they grow while the activations go
        gradients = max(0.0, gradients - activations)
    # On every rank, embeddings and outputs are gathered once used, and two layers: the current one and the next.
    ends = job.learners.ends(P) + job.frozen.ends(P)
    of_layers = adapter_parameters(config, job.lora_rank) if job.nf4 else P.body
    gathered = sharded * item * (2 * of_layers / config.num_layers + ends)
    largest = 2 * config.hidden_size * config.intermediate_size * item  # gate and up, out of 4 bits
    tiles = job.targets * (TILE * 4 * 2 + config.hidden_size * item)
    parts = {
        "weights": trained * 4 / shards + resting(job.bases, P, item, shards, nf4=job.nf4),
        "weights in the dtype of products": learners * P.body * item if copies else largest if job.nf4 else 0.0,
        "gradients": gradients,
        "optimizer": trained / shards * moment_bytes(job, P),
        "frozen networks": resting(job.frozen, P, item, shards),
        "gathered weights": gathered,
        "activations": activations,
        "log-prob tiles": tiles,
    }
    if job.slots:  # rollout and updates alternate: only what the rollout needs beyond the updates is added
        casts = P.total * item if lora and job.dtype == torch.float32 and not job.nf4 else 0  # merged weights
        casts += (P.output or P.embedding) * item if copies else 0  # the layers' copies are there
        whole = sharded * item * (of_layers + Networks(1, 1).ends(P))
        cache = cache_bytes(config, rows=job.slots, length=job.length, itemsize=item)
        rollout = whole + casts + cache
        parts["rollout beyond that"] = max(0.0, rollout - gathered - activations - gradients - tiles)
    return parts


def resting(networks: Networks, P: Footprint, item: int, shards: int, *, nf4: bool = False) -> float:
    """Bytes per rank of frozen networks: embeddings in float32, layers in bf16, or in 4 bits and whole on each rank."""
    ends = networks.count * P.embedding * 4 + networks.outputs * P.output * item
    return ends / shards + networks.count * P.body * (NF4_BYTES if nf4 else item / shards)


def moment_bytes(job: Job, P: Footprint) -> float:
    """Bytes of the optimizer's state by weight that learns."""
    if job.optim == "adamw8bit":
        return 2 + 8 / 256
    if job.optim == "muon":
        matrices = 1.0 if job.lora_rank else job.learners.count * P.body / job.learners.parameters(P)
        return 8 - 4 * matrices
    return 8.0


def seconds(config: ModelConfig, job: Job, cfg: DictConfig) -> dict[str, float]:
    """Seconds of one optimizer step (for PPO of one rollout with its updates), by part.

    For a forward with its backward, ranks that share a copy send the weights twice and the gradients once. Between
    copies (dist=hsdp), only a rank's share of the gradients is sent.
    """
    gpu, P, n = cfg.gpus[cfg.gpu], count_parameters(config).total, cfg.num_gpus
    shards, item = cfg.shards or n, job.dtype.itemsize
    forwards = -(-job.rows // (job.micro_rows * n))  # per rank and pass
    flops = forward_flops(config, tokens=job.tokens, length=job.length, targets=job.targets) * forwards
    speed = gpu.tflops * 1e12 * cfg.compute_efficiency
    near, far = (gb * 1e9 * cfg.link_efficiency for gb in (gpu.link_gb_per_second, cfg.node_gb_per_second))
    within, between = near if shards <= 8 else far, near if n <= 8 else far
    trained = adapter_parameters(config, job.lora_rank) if job.lora_rank else P
    of_base = count_parameters(config).ends if job.nf4 else P  # a base in 4 bits stays where it is
    weights = of_base * item * (shards - 1) / shards  # bytes that reach a rank when all are gathered
    travel = forwards * (2 * weights + 4 * trained * (shards - 1) / shards) / within
    travel += forwards * 2 * 4 * trained / shards * (1 - shards / n) / between
    backward = 2.0 + (job.checkpointing in (True, "offload"))
    passes = job.learners.count * job.epochs
    parts = {"updates": passes * max(flops * (1 + backward) / speed, travel)}
    once = P * item * (shards - 1) / shards / within * forwards  # a forward without gradients
    if job.frozen.count:
        parts["frozen networks"] = job.frozen.count * max(flops / speed, once)
    if job.slots:
        new, rows = job.targets // job.micro_rows, job.rows / n
        read = P * item + cache_bytes(config, rows=1, length=job.length - new // 2, itemsize=item) * job.slots
        token = max(read / (gpu.tb_per_second * 1e12 * cfg.memory_efficiency), 2 * P * job.slots / speed)
        parts["rollout"] = new * token * rows / job.slots + weights / within
        parts["old log-probs and values"] = 2 * max(flops / speed, weights / within * forwards)
    return parts


def changes(job: Job, cfg: DictConfig) -> list[dict[str, Any]]:
    """Single changes of the script's or the plan's settings, in the order in which they are tried."""
    tries: list[dict[str, Any]] = [] if job.checkpointing else [{"activation_checkpointing": "true"}]
    tries += [{"micro_batch_size": m} for m in (job.blocks // 2, 1) if 0 < m < job.blocks]
    tries += [{"shards": cfg.num_gpus}] if (cfg.shards or cfg.num_gpus) < cfg.num_gpus else []
    tries += [{"num_gpus": cfg.num_gpus * k} for k in (2, 4, 8, 16, 32)]
    return tries if job.lora_rank else [*tries, {"lora.rank": 64}]


def changed(cfg: DictConfig, change: dict[str, Any]) -> DictConfig:
    """The plan's config with a change. Keys that the plan does not have become overrides of the script."""
    words = [f"{key}={value}" for key, value in change.items() if key not in cfg]
    own = {key: value for key, value in change.items() if key in cfg}
    return OmegaConf.merge(cfg, own, {"overrides": [*cfg.overrides, *words]})


def suggest(config: ModelConfig, job: Job, cfg: DictConfig, room: float) -> str:
    """The first single change that makes the training fit and that the script accepts."""
    for change in changes(job, cfg):
        trial = changed(cfg, change)
        try:
            fits = sum(memory(config, read_job(trial), trial).values()) <= room
        except ValueError:  # a batch that does not divide, say
            continue
        if fits:
            return "".join(f"{name}={value}" for name, value in change.items())
    return "no single setting: combine lora.rank, a smaller micro_batch_size and more GPUs"


def report(cfg: DictConfig) -> dict:
    """The plan as a dict of numbers."""
    check_plan(cfg)
    config, job = ModelConfig(**OmegaConf.to_container(cfg.model)), read_job(cfg)
    parts, times = memory(config, job, cfg), seconds(config, job, cfg)
    room, total, step = cfg.gpus[cfg.gpu].memory_gb * GB * cfg.headroom, sum(parts.values()), sum(times.values())
    hours = job.num_steps * step / 3600
    result = {"parameters": count_parameters(config).total, "memory_gb": {k: v / GB for k, v in parts.items()}}
    result |= {"total_gb": total / GB, "room_gb": room / GB, "fits": total <= room, "seconds": times}
    result |= {"tokens_per_second": job.rows * job.length / step, "hours": hours}
    if cfg.dataset_rows:
        result["hours_per_epoch"] = cfg.dataset_rows / job.dataset_rows * step / 3600
    if cfg.price_per_gpu_hour:
        result["cost"] = hours * cfg.num_gpus * cfg.price_per_gpu_hour
    result["suggestion"] = None if result["fits"] else suggest(config, job, cfg, room)
    return result


def show(cfg: DictConfig) -> None:
    """Print the plan as two tables and a verdict."""
    result, console = report(cfg), Console()
    title = f"{cfg.script}, {result['parameters'] / 1e9:.2f} B parameters, {cfg.num_gpus} x {cfg.gpu}"
    table = Table("memory per GPU", "GB", title=title)
    for name, value in result["memory_gb"].items():
        table.add_row(name, f"{value:.2f}")
    table.add_row("logits", "0 (never stored)", end_section=True)
    table.add_row("total", f"{result['total_gb']:.2f} of {result['room_gb']:.1f}")
    console.print(table)
    times = Table("a step", "seconds")
    for name, value in result["seconds"].items():
        times.add_row(name, f"{value:.2f}")
    console.print(times)
    console.print(
        f"{result['tokens_per_second']:,.0f} tokens/s, {result['hours']:.2f} hours for the script's num_steps"
    )
    for name, text in (("hours_per_epoch", "hours an epoch"), ("cost", "cost of num_steps")):
        if name in result:
            console.print(f"{result[name]:,.2f} {text}")
    console.print("it fits" if result["fits"] else f"it does not fit; it would fit with {result['suggestion']}")


if __name__ == "__main__":
    enter(show, "plan")
