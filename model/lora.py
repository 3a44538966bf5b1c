"""LoRA: a frozen linear layer is trained through two low-rank matrices. Hu et al. 2021 (arXiv:2106.09685), Eq. 3.

add_lora(model, ...)      adapters on the named linear layers; all other weights except a head are frozen
value_on(policy)          a value model on the policy's frozen weights, with its own adapters
AdaptersOff(policy)       the same weights with the adapters off: a reference policy without a second copy
export_adapter(...)       the files that `peft` loads; export_model writes the merged model beside them
"""

import json
import logging
import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.experts import GroupedProduct, Stack
from model.heads import Policy, ValueModel
from model.linear import Linear
from model.lora_tensors import peft_tensors
from model.packing import Stream
from model.quantized import BASES, NF4Linear, quantize_layers
from model.weights.hf import save_tensors
from runtime.devices import widest
from runtime.distributed import whole
from runtime.files import named_in_errors, remove, sync, write_sums

log = logging.getLogger(__name__)

TARGETS = ("qkv", "out", "gate_up", "down")
TASKS = {"policy": "CAUSAL_LM", "reward": "SEQ_CLS", "value": "TOKEN_CLS"}


class Lora(nn.Module):
    """(alpha / rank) B A x, to be added to W x. A (rank, in) is random, B (out, rank) is 0, so training starts at W.

    On a Stack every expert has its own A and B, one below the other: A (E x rank, in), B (E x out, rank).
    """

    def __init__(self, linear: Linear, *, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self.on_experts, self.transposed = isinstance(linear, Stack), linear.weight.ndim == 3  # GPT-OSS: (E, in, out)
        self.count = linear.count if self.on_experts else 1
        self.parts = {"A": (rank,) * self.count, "B": linear.parts["weight"]}
        bound = 1 / math.sqrt(linear.in_features)
        A = torch.empty(self.count * rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.A, self.B = nn.Parameter(A), nn.Parameter(torch.zeros(self.count * linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(N, out) the adapter's part of the layer's output on x (N, in), in x's dtype."""
        low = nn.functional.linear(x, self.A.to(x.dtype))  # (N, rank)
        return nn.functional.linear(low, self.B.to(x.dtype)) * self.scale

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """(M, out) the same of a Stack, on rows (M, in) sorted by expert. The rows of expert e end at ends[e]."""
        for weight in (self.A, self.B):
            matrices = weight.unflatten(0, (self.count, -1)).transpose(1, 2)
            x = GroupedProduct.apply(x, matrices, matrices.detach().to(x.dtype), ends)
        return x * self.scale

    def delta(self) -> Tensor:
        """(out, in) float32, or a Stack's shape: the difference between the merged weight and the frozen one."""
        A, B = (whole(weight).unflatten(0, (self.count, -1)) for weight in (self.A, self.B))
        delta = B @ A * self.scale  # (E, out, in)
        return delta.transpose(1, 2) if self.transposed else delta.flatten(0, 1)


def add_lora(
    model: nn.Module, *, rank: int, alpha: float, targets: list[str], seed: int, base: str = "file"
) -> nn.Module:
    """The model, frozen except its head, with adapters drawn from `seed` on the linear layers named by `targets`.

    rank=0 returns the model unchanged. base: `file` keeps the frozen weights as they were read, `nf4` stores the
    matrices of the layers in 4 bits.

    Raises:
        ValueError: a setting is out of range.
    """
    if base not in BASES:
        raise ValueError(f"lora.base={base!r} is unknown; use {' or '.join(BASES)}")
    if rank == 0 and base != "file":
        raise ValueError(f"lora.base={base} needs adapters, as weights in 4 bits cannot be trained; set lora.rank=16")
    if rank == 0:
        return model
    if rank < 0 or not alpha > 0:
        raise ValueError(f"need lora.rank >= 0 and lora.alpha > 0, got {rank} and {alpha}")
    if not targets or not set(targets) <= set(TARGETS):
        raise ValueError(f"lora.targets={list(targets)} must name some of {', '.join(TARGETS)}")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    if base == "nf4":
        quantize_layers(model)
    for name, module in model.transformer.named_modules():
        if name.rpartition(".")[2].removeprefix("shared_") in targets:
            module.lora = Lora(module, rank=rank, alpha=alpha, generator=generator)
    if hasattr(model, "head"):
        model.head.requires_grad_(True)
    return model.train()


def value_on(policy: Policy) -> ValueModel:
    """A value model that shares every weight of the policy's transformer; its head is 0. The policy must be frozen."""
    with torch.device("meta"):
        model = ValueModel(policy.config, policy.transformer.compute_dtype)
    for name, module in policy.transformer.named_modules():
        if isinstance(module, NF4Linear):
            model.transformer.set_submodule(name, module.twin())
    theirs = dict(policy.transformer.named_parameters())
    for name, _ in list(model.transformer.named_parameters()):
        place, _, leaf = name.rpartition(".")
        setattr(model.transformer.get_submodule(place), leaf, theirs[name])
    model.head.to_empty(device="cpu")
    for weight in model.head.parameters():
        nn.init.zeros_(weight)
    return model


class AdaptersOff(nn.Module):
    """A policy with its adapters off, on the same weights. It is for use without gradients."""

    def __init__(self, policy: Policy):
        super().__init__()
        self.policy, self.config, self.transformer, self.lm_head = (
            policy,
            policy.config,
            policy.transformer,
            policy.lm_head,
        )
        self.adapted = False

    def forward(self, *inputs) -> Tensor:
        return self._off(self.policy, *inputs)

    def logprobs(self, *rows: Tensor, **settings) -> Tensor:
        return self._off(self.policy.logprobs, *rows, **settings)

    def hidden_states(self, stream: Stream) -> Tensor:
        return self._off(self.policy._hidden_states, stream)  # exact_kl calls it inside the policy's forward method

    @torch.no_grad()
    def _off(self, function, *inputs, **settings) -> Tensor:
        self.policy.adapted = False
        try:
            return function(*inputs, **settings)
        finally:
            self.policy.adapted = True


def adapters(model: nn.Module) -> dict[str, Lora]:
    """name of the linear layer -> its adapter."""
    return {name.removesuffix(".lora"): part for name, part in model.named_modules() if isinstance(part, Lora)}


def report_adapter(model: nn.Module) -> None:
    """Log information for serving the adapter."""
    if any(isinstance(module, NF4Linear) for module in model.modules()):
        log.info(
            "adapter/ was trained on the base in NF4: load it with peft in 4 bits. model/ contains the merged weights"
        )
    log.info(
        "adapter/ is exact, and model/ is merged in float32. Rounding model/ to bf16, as servers do, changes its "
        "weights by %.2f times the adapter's contribution; if that is much, serve base and adapter separately",
        merge_noise(model),
    )


def export_adapter(model: nn.Module, directory: Path, base: str, *, durable: bool = True) -> None:
    """Write adapter_model.safetensors and adapter_config.json as `peft` loads them. Without an adapter, write nothing.

    q, k and v share A, and each has its rows of B. The same holds for gate and up, of every expert. The head of a
    reward or value model is in modules_to_save, its bias and normalisation in head.safetensors. All ranks must call
    this, and rank 0 writes.

    Args:
        durable: write checksums, and log information for serving. A server that reads the files now needs neither.
    """
    found = adapters(model)
    if not found:
        return
    if durable:
        report_adapter(model)
    weights, targets = peft_tensors(found, model.config)
    head = {}
    if hasattr(model, "head"):
        weights["base_model.model.score.weight"] = whole(model.head.weight).detach().cpu().clone()
        if model.kind == "value":  # transformers' token classifiers have a bias, its sequence classifiers have none
            weights["base_model.model.score.bias"] = whole(model.head.bias).detach().cpu().clone()
        rest = {"bias": model.head.bias} | dict(model.named_buffers(recurse=False))
        head = {f"score.{name}": whole(tensor).detach().cpu().clone() for name, tensor in rest.items()}
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    one = next(iter(found.values()))
    config = {
        "peft_type": "LORA",
        "task_type": TASKS[model.kind],
        "base_model_name_or_path": str(base),
        "r": one.rank,
        "lora_alpha": one.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        **targets,
        "modules_to_save": ["score"] if head else None,
        "inference_mode": True,
    }
    write(directory, weights, head, config, durable)


@torch.no_grad()
def merge_noise(model: nn.Module) -> float:
    """The change of the merged weights when they are rounded to bf16, divided by what the adapters add.

    Both are Frobenius norms. Base and adapter served separately do not have this error.
    """
    added = moved = 0.0
    for module in model.modules():
        if isinstance(module, Linear) and module.lora is not None:
            base, delta = whole(module.weight).float(), module.lora.delta()
            added += delta.square().sum(dtype=widest(delta.device)).item()
            error = (base + delta).bfloat16().float() - base.bfloat16().float() - delta
            moved += error.square().sum(dtype=widest(delta.device)).item()
    return math.sqrt(moved / added) if added else 0.0


def write(directory: Path, weights: dict[str, Tensor], head: dict[str, Tensor], config: dict, durable: bool) -> None:
    """Write the adapter's files to a temporary directory, then rename it."""
    tmp_path = directory.with_name(directory.name + ".writing")
    remove(tmp_path)
    tmp_path.mkdir(parents=True)
    save_tensors(weights, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    if head:
        save_tensors(head, tmp_path / "head.safetensors", {"format": "pt"})
    with named_in_errors(tmp_path):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if durable:
        write_sums(tmp_path)
    remove(directory)
    tmp_path.rename(directory)
    sync(directory.parent)
