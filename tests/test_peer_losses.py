"""Our losses and advantages of a minibatch against TRL's and verl's (tests/parity/group_losses.py made the values)."""

import json
from pathlib import Path

import pytest
import torch

from advantages import dr_grpo, grpo, kl_loss, reinforce_pp, rloo
from losses import POLICY_LOSSES, aggregation

PEERS = json.loads((Path(__file__).parent / "peer_losses.json").read_text())
LOW, HIGH, MOST, BETA = 0.2, 0.28, 8, 0.04
BATCH = {name: torch.tensor(x, dtype=None if name == "mask" else torch.float64) for name, x in PEERS["batch"].items()}
MASK = BATCH["mask"]
REWARDS = torch.where(torch.arange(5) == MASK.sum(1, keepdim=True) - 1, BATCH["scores"][:, None], 0.0)


def ours(loss, aggregate, advantages, *, clip_range=LOW, clip_range_high=HIGH, kl_coef=0.0, **own):
    """(loss, gradient) of one minibatch, put together as train_ppo.py does."""
    logprobs = BATCH["logprobs"].clone().requires_grad_()
    weights, counts = aggregation(MASK, aggregate, max_new_tokens=MOST)
    clip = {"clip_range": clip_range, "clip_range_high": clip_range_high, "num_tokens": counts.sum()} | own
    weights = weights.double()
    value, _ = POLICY_LOSSES[loss](logprobs, BATCH["old"], weights * advantages, MASK, **clip)
    value = value + kl_coef * kl_loss(logprobs, BATCH["ref"], MASK, "k3", weights) / counts.sum()
    return value.item(), torch.autograd.grad(value, logprobs)[0]


def agree(found, peer):
    assert found[0] == pytest.approx(peer["loss"], rel=1e-6)
    assert torch.allclose(found[1], torch.tensor(peer["gradient"], dtype=torch.float64), atol=1e-6)


CLIP = {"dual_clip": None}


@pytest.mark.parametrize(
    "name, settings",
    [
        ("grpo", {"loss": "clip", "aggregate": "sequence_mean"} | CLIP),
        ("grpo_kl", {"loss": "clip", "aggregate": "sequence_mean", "kl_coef": BETA} | CLIP),
        ("dapo", {"loss": "clip", "aggregate": "token"} | CLIP),
        ("dr_grpo", {"loss": "clip", "aggregate": "sequence_sum"} | CLIP),
        ("gspo", {"loss": "gspo", "aggregate": "sequence_mean"}),
        ("cispo", {"loss": "cispo", "aggregate": "token", "clip_range": 1.0}),  # TRL bounds the weight from above alone
    ],
)
def test_losses_are_trls(name, settings):
    advantages = torch.tensor(PEERS["trl"]["advantages"], dtype=torch.float64)[:, None] * MASK
    agree(ours(advantages=advantages, **settings), PEERS["trl"][name])


@pytest.mark.parametrize("mode, aggregate", [("token-mean", "token"), ("seq-mean-token-mean", "sequence_mean")])
@pytest.mark.parametrize(
    "name, loss, own", [("vanilla", "clip", {"dual_clip": 3.0}), ("gspo", "gspo", {}), ("cispo", "cispo", {})]
)
def test_losses_are_verls(name, loss, own, mode, aggregate):
    if name == "gspo":
        aggregate = "sequence_mean"  # verl takes it whatever is asked for
    advantages = torch.tensor(PEERS["verl"]["advantages_rloo"], dtype=torch.float64)
    agree(ours(loss, aggregate, advantages, **own), PEERS["verl"][f"{name}_{mode}"])


@pytest.mark.parametrize("name, function", [("grpo", grpo), ("dr_grpo", dr_grpo), ("rloo", rloo)])
def test_advantages_are_verls(name, function):
    expected = torch.tensor(PEERS["verl"][f"advantages_{name}"], dtype=torch.float64)
    assert torch.allclose(function(REWARDS, MASK, samples_per_prompt=3), expected, atol=1e-6)


def test_reinforce_pp_is_verls_but_for_bessels_correction():
    expected = torch.tensor(PEERS["verl"]["advantages_reinforce_pp"], dtype=torch.float64)
    n = MASK.sum().item()
    assert torch.allclose(reinforce_pp(REWARDS, MASK, mean=lambda x: x), expected * (n / (n - 1)) ** 0.5, atol=1e-6)


def test_grpos_advantages_are_trls_but_for_the_constant_beside_the_deviation():
    expected = torch.tensor(PEERS["trl"]["advantages"], dtype=torch.float64)[:, None] * MASK
    assert torch.allclose(grpo(REWARDS, MASK, samples_per_prompt=3), expected, atol=3e-4)
