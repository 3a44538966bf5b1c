"""The optimizer of a config, learning-rate schedules and gradient clipping."""

import math
from collections.abc import Iterable

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from runtime.adamw8bit import AdamW8bit
from runtime.config import check_choice, check_number, check_positive, check_whole
from runtime.muon import Muon, matrices_of_layers

SCHEDULES = ("constant", "linear", "cosine")
KINDS = ("adamw", "adamw8bit", "muon")


def build_optimizer(
    models: nn.Module | Iterable[nn.Module], optim: DictConfig, lr_scales: Iterable[float] | None = None
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), AdamW with moments in 8 bits, or Muon.

    Weight decay applies to matrices, not to norms and biases.

    Args:
        models: their trainable parameters are optimised. A tied weight counts once.
        optim: `kind`, `lr`, `betas`, `eps`, `weight_decay`, `momentum` of conf/optim.
        lr_scales: one factor of the learning rate per model; None = 1 each.
    Raises:
        ValueError: a setting is out of range, or nothing is trainable.
    """
    check_optim(optim)
    models = [models] if isinstance(models, nn.Module) else list(models)
    groups, taken = [], set()
    for model, scale in zip(models, lr_scales or [1.0] * len(models), strict=True):
        weights = [p for p in model.parameters() if p.requires_grad and p not in taken]
        taken |= set(weights)
        if optim.kind == "muon":
            parts = {p: rows for p, rows in matrices_of_layers(model).items() if p in set(weights)}
            weights = [p for p in weights if p not in parts]
            muon = {"params": list(parts), "parts": list(parts.values()), "momentum": optim.momentum}
            groups.append(muon | {"weight_decay": optim.weight_decay, "lr_scale": scale})
        matrices, vectors = [p for p in weights if p.ndim >= 2], [p for p in weights if p.ndim < 2]
        groups.append({"params": matrices, "weight_decay": optim.weight_decay, "lr_scale": scale})
        groups.append({"params": vectors, "weight_decay": 0.0, "lr_scale": scale})
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("no model has a trainable parameter; load one with frozen=False")
    defaults = {"lr": optim.lr, "betas": tuple(optim.betas), "eps": optim.eps}
    if optim.kind == "adamw":
        optimizer = torch.optim.AdamW(groups, **defaults, fused=True)
    elif optim.kind == "muon":
        optimizer = Muon([{"parts": None} | group for group in groups], **defaults, fused=True)
    else:
        optimizer = AdamW8bit(groups, defaults)
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]

    def restore_settings(
        loaded: torch.optim.Optimizer,
    ) -> None:  # take moments from the checkpoint and settings from the config
        for group, given in zip(loaded.param_groups, settings, strict=True):
            group |= given

    optimizer.register_load_state_dict_post_hook(restore_settings)
    return optimizer


def check_optim(optim: DictConfig) -> None:
    """Raise ValueError if a setting of conf/optim is wrong."""
    check_choice("optim.kind", optim.kind, KINDS)
    if optim.kind == "muon" and (optim.get("momentum") is None or not 0 <= optim.momentum < 1):
        raise ValueError(f"optim=muon needs optim.momentum in [0, 1), got {optim.get('momentum')}")
    if optim.schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule={optim.schedule!r} is unknown; use one of {', '.join(SCHEDULES)}")
    check_number(0, **{f"optim__{name}": optim[name] for name in ("lr", "weight_decay", "min_lr_ratio")})
    check_whole(0, optim__warmup_steps=optim.warmup_steps)  # 0.1 would be a first step at ten times lr
    check_positive(optim__eps=optim.eps)
    betas = list(optim.betas)
    if len(betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"optim.betas={betas} must be two numbers in [0, 1)")
    if optim.min_lr_ratio > 1:
        raise ValueError(f"optim.min_lr_ratio={optim.min_lr_ratio} must lie in [0, 1]")
    if optim.max_grad_norm is not None:  # null turns clipping off
        check_positive(optim__max_grad_norm=optim.max_grad_norm)


def set_lr(optimizer: torch.optim.Optimizer, step: int, optim: DictConfig) -> float:
    """Set the learning rate of the step after `step` completed ones, times each group's scale. Returns the rate.

    Warm-up is linear: lr * (step + 1) / warmup_steps. After it the rate is constant, or falls from lr to
    lr * min_lr_ratio linearly or as a half cosine, until `optim.num_steps` steps.
    """
    lr = optim.lr * lr_factor(step, optim)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def lr_factor(step: int, optim: DictConfig) -> float:
    """The factor of `optim.lr` after `step` completed steps."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - optim.warmup_steps) / max(1, optim.num_steps - optim.warmup_steps))
    left = 1 - progress if optim.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * left


def clip_grads(model: nn.Module, max_norm: float | None) -> Tensor:
    """() float32 gradient norm before clipping. Gradients are scaled down to `max_norm`; None: never."""
    weights = [p for p in model.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(weights, math.inf if max_norm is None else max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def init_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the moments now instead of at the first step, so that a checkpoint can be loaded into them."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if optimizer.state[p]:
                continue
            if isinstance(optimizer, AdamW8bit) or group.get("parts"):
                optimizer.init_state(p)
            else:
                optimizer.state[p]["step"] = torch.zeros((), device=p.device)  # fused AdamW needs it on the device
                optimizer.state[p]["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                optimizer.state[p]["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
