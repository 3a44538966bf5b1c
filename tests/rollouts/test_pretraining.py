"""PPO-ptx: what `data.ptx` adds to the gradients of the policy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.loader import Loader
from model.build import new_policy
from model.packing import make_rows
from rollouts.pretraining import PretrainingMix
from runtime.metrics import Metrics
from tests.tiny_models import random_ids, shaken, tiny_config


def test_the_added_gradients_are_ptx_coef_times_those_of_the_mean_loss_per_target():
    lengths = [(4, 3), (2, 9), (6, 1)]
    items = [
        {"input_ids": random_ids(p + c, seed=p), "completion_mask": np.array([False] * p + [True] * c)}
        for p, c in lengths
    ]
    policy = shaken(new_policy(tiny_config(), seed=0))
    rows = make_rows(items, pad_id=0)
    nll = -policy.logprobs(*rows)[rows.completion_mask]
    expected = torch.autograd.grad(nll.mean(), list(policy.parameters()))

    loader = Loader(items, batch_size=3, seed=0, shuffle=False, rank=0, world_size=1)
    run = SimpleNamespace(device=torch.device("cpu"), mean=lambda value: value, metrics=Metrics())
    for weight in policy.parameters():
        weight.grad = torch.ones_like(weight)  # what the PPO loss left there
    PretrainingMix(run, loader, coef=0.25, micro_batch_size=2, pad_id=0).add_gradients(policy)
    for weight, grad in zip(policy.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, 1 + 0.25 * grad, rtol=1e-4, atol=1e-5)
    assert run.metrics.flush()["objective/ptx_loss"] == pytest.approx(nll.mean().item(), rel=1e-5)
