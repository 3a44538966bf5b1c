import copy
import math

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from runtime.optim import build_optimizer, clip_grads, init_state, lr_factor, set_lr


def settings(**changes):
    cfg = dict(
        kind="adamw", lr=0.1, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, max_grad_norm=1.0, schedule="constant"
    )
    return OmegaConf.create(cfg | dict(warmup_steps=0, min_lr_ratio=0.0, num_steps=10) | changes)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))


def take_step(model: nn.Module, optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(12.0).view(4, 3)).square().sum().backward()
    optimizer.step()


def test_matrices_decay_norms_and_biases_do_not():
    model = small_model()
    optimizer = build_optimizer(model, settings())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.1,
        "2.bias": 0.0,
    }


def test_decay_is_decoupled_from_the_gradient():
    """Loshchilov & Hutter 2019, algorithm 2: with a zero gradient a matrix shrinks by exactly 1 - lr * decay."""
    weight = nn.Linear(3, 3, bias=False)
    before = weight.weight.detach().clone()
    optimizer = build_optimizer(weight, settings(lr=0.01, weight_decay=0.5))
    weight.weight.grad = torch.zeros_like(weight.weight)
    optimizer.step()
    assert torch.allclose(weight.weight, before * (1 - 0.01 * 0.5), rtol=1e-6, atol=0)


def test_the_first_step_moves_every_weight_by_lr():
    """Kingma & Ba 2015, section 2.1: after bias correction the first update is lr * g / (|g| + eps)."""
    weight = nn.Linear(3, 3, bias=False)
    before = weight.weight.detach().clone()
    optimizer = build_optimizer(weight, settings(lr=0.01, weight_decay=0.0))
    weight.weight.grad = torch.tensor([[1e-3, -5.0, 7.0]] * 3)
    optimizer.step()
    assert torch.allclose(before - weight.weight, 0.01 * torch.tensor([[1.0, -1.0, 1.0]] * 3), atol=1e-6)


def test_eps_is_what_a_gradient_is_measured_against():
    weight = nn.Linear(3, 3, bias=False)
    before = weight.weight.detach().clone()
    optimizer = build_optimizer(weight, settings(lr=0.01, weight_decay=0.0, eps=2.0))
    weight.weight.grad = torch.tensor([[1.0, -2.0, 6.0]] * 3)
    optimizer.step()
    assert torch.allclose(before - weight.weight, 0.01 * torch.tensor([[1 / 3, -0.5, 0.75]] * 3), atol=1e-6)


def test_the_moments_decay_by_betas():
    weight = nn.Linear(3, 1, bias=False)
    optimizer = build_optimizer(weight, settings(betas=[0.7, 0.4]))
    weight.weight.grad = torch.tensor([[1.0, -2.0, 3.0]])
    optimizer.step()
    state = optimizer.state[weight.weight]
    assert torch.allclose(state["exp_avg"], 0.3 * torch.tensor([[1.0, -2.0, 3.0]]))
    assert torch.allclose(state["exp_avg_sq"], 0.6 * torch.tensor([[1.0, 4.0, 9.0]]))


def test_a_checkpoint_brings_the_moments_and_the_config_the_settings():
    old, new = small_model(), small_model()
    first = build_optimizer(old, settings(weight_decay=0.0, eps=1e-8))
    take_step(old, first)
    second = build_optimizer(new, settings(weight_decay=0.3, betas=[0.5, 0.6], eps=0.1))
    second.load_state_dict(first.state_dict())
    assert {group["eps"] for group in second.param_groups} == {0.1}
    assert {tuple(group["betas"]) for group in second.param_groups} == {(0.5, 0.6)}
    assert {group["weight_decay"] for group in second.param_groups} == {0.0, 0.3}
    moments = [state["exp_avg"] for state in second.state.values()]
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, first.state.values(), strict=True))


def test_several_models_share_one_optimizer_and_a_tied_weight_counts_once():
    a, b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    b.weight = a.weight
    optimizer = build_optimizer([a, b, nn.Linear(2, 3)], settings())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3


def test_warmup_rises_linearly_to_lr():
    cfg = settings(warmup_steps=4)
    assert [lr_factor(step, cfg) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_to_zero_one_step_after_the_last():
    cfg = settings(schedule="linear", warmup_steps=2, num_steps=10)
    assert [lr_factor(step, cfg) for step in (2, 6, 9, 10)] == [1.0, 0.5, 0.125, 0.0]


def test_cosine_to_ten_percent():
    """InstructGPT's schedule: from lr to a tenth of it along half a cosine."""
    cfg = settings(schedule="cosine", min_lr_ratio=0.1, num_steps=100)
    assert lr_factor(0, cfg) == 1.0
    assert lr_factor(50, cfg) == pytest.approx(0.55)
    assert lr_factor(25, cfg) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert lr_factor(100, cfg) == pytest.approx(0.1)


def test_set_lr_reaches_every_group():
    optimizer = build_optimizer(small_model(), settings())
    assert set_lr(optimizer, 0, settings(warmup_steps=2)) == 0.05
    assert {group["lr"] for group in optimizer.param_groups} == {0.05}


def test_clipping_returns_the_norm_before_and_leaves_the_norm_asked_for():
    model = small_model()
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    count = sum(p.numel() for p in model.parameters())
    assert clip_grads(model, 1.0).item() == pytest.approx(2 * math.sqrt(count), rel=1e-6)
    assert clip_grads(model, None).item() == pytest.approx(1.0, rel=1e-5)
    assert clip_grads(model, 5.0).item() == pytest.approx(1.0, rel=1e-5)  # small gradients stay


def test_creating_the_moments_early_changes_no_number():
    first, second = small_model(), small_model()
    optimizers = [build_optimizer(model, settings()) for model in (first, second)]
    init_state(optimizers[1])
    for _ in range(3):
        take_step(first, optimizers[0])
        take_step(second, optimizers[1])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_moments_that_exist_are_kept():
    model = small_model()
    optimizer = build_optimizer(model, settings())
    take_step(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    init_state(optimizer)
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": "step"}, {"lr": -1.0}, {"warmup_steps": -1}, {"min_lr_ratio": 2.0}, {"max_grad_norm": 0.0},
        {"warmup_steps": 0.1},  # a share, as elsewhere: the first step would have ten times lr
        {"betas": [0.9]}, {"betas": [0.9, 0.95, 0.5]}, {"betas": [0.9, 1.0]}, {"eps": 0.0},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(change):
    with pytest.raises(ValueError, match=f"optim.{next(iter(change))}"):
        build_optimizer(small_model(), settings(**change))


def test_a_frozen_model_cannot_be_optimised():
    with pytest.raises(ValueError, match="frozen=False"):
        build_optimizer(small_model().requires_grad_(False), settings())
