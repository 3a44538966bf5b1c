"""Every loss at the corners of its domain: the value it must have, and a gradient that is a number.

log-probs of exactly 0 (a probability that rounds to 1), ratios past float32's exp, ties, ratings of 1/2, huge scores.
"""

import math

import pytest
import torch

from losses import (
    cispo_loss,
    dpo_loss,
    gspo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    plackett_luce_loss,
    pointwise_reward_loss,
    ppo_policy_loss,
    ppo_value_loss,
    reward_loss,
    robust_dpo_loss,
    sft_loss,
    simpo_loss,
)

ONE = torch.ones(1, 1, dtype=torch.bool)
EPS = torch.finfo(torch.float32).eps
KTO = {"beta": 1.0, "desirable_weight": 1.0, "undesirable_weight": 1.0}


def pairs(function, **settings):
    return lambda w, r: function(w, r, 0 * w, 0 * r, **settings)[0]


def clipped(advantage, loss=ppo_policy_loss, **settings):
    settings = {"dual_clip": None} | settings if loss is ppo_policy_loss else settings
    return lambda ratio: loss(
        ratio[None], torch.zeros(1, 1), torch.full((1, 1), advantage), ONE, clip_range=0.2, num_tokens=1, **settings
    )[0]


def scored(w, r, tie, margin=0.0):
    one = torch.ones_like(w)
    return reward_loss(w, r, one, margin * one, torch.tensor([tie]), center_coef=0.0, num_groups=1)[0]


def kto(good):
    return lambda x: kto_loss(x, 0 * x, torch.tensor([good]), torch.tensor(0.0), **KTO)[0]


def ranked(*ranks):
    ids = torch.zeros(len(ranks), dtype=torch.int64), torch.tensor(ranks)
    return lambda *x: plackett_luce_loss(torch.cat(x), 0 * torch.cat(x), *ids, beta=1.0)[0]


# (loss, arguments, value, gradient by each argument); None: any finite number
CORNERS = {
    "sft: certain": (lambda x: sft_loss(x[None], ONE, num_tokens=1)[0], [0.0], 0.0, [-1.0]),
    "orpo: chosen certain": (lambda w, r: orpo_loss(w, r, beta=1.0)[0], [0.0, -1.0], 0.0, [None, None]),
    "orpo: rejected certain": (lambda w, r: orpo_loss(w, r, beta=1.0)[0], [-1.0, 0.0], None, [None, None]),
    "orpo: both certain": (lambda w, r: orpo_loss(w, r, beta=1.0)[0], [0.0, 0.0], math.log(2), [-0.5, 0.5]),
    "orpo: within eps of certain": (lambda w, r: orpo_loss(w, r, beta=1.0)[0], [-EPS / 4, -1.0], 0.0, [None, None]),
    "orpo: impossible": (lambda w, r: orpo_loss(w, r, beta=1.0)[0], [-1e4, -1.0], None, [-1.0, None]),
    "dpo: far right": (pairs(dpo_loss, beta=1.0, label_smoothing=0.0), [1e4, -1e4], 0.0, [0.0, 0.0]),
    "dpo: far wrong": (pairs(dpo_loss, beta=1.0, label_smoothing=0.0), [-1e4, 1e4], 2e4, [-1.0, 1.0]),
    "cdpo: far right": (pairs(dpo_loss, beta=1.0, label_smoothing=0.1), [1e4, -1e4], 2e3, [0.1, -0.1]),
    "robust: far right": (pairs(robust_dpo_loss, beta=1.0, label_smoothing=0.1), [1e4, -1e4], -2500.0, [-0.125, 0.125]),
    "ipo: at its target": (pairs(ipo_loss, beta=1.0), [0.5, 0.0], 0.0, [0.0, 0.0]),
    "hinge: at its edge": (pairs(hinge_loss, beta=1.0), [1.0, 0.0], 0.0, [0.0, 0.0]),
    "simpo: both certain": (
        lambda w, r: simpo_loss(w, r, beta=2.0, target_margin=0.0)[0],
        [0.0, 0.0],
        math.log(2),
        [-1.0, 1.0],
    ),
    "kto: good, far right": (kto(True), [1e4], 0.0, [0.0]),
    "kto: good, far wrong": (kto(True), [-1e4], 1.0, [0.0]),
    "kto: bad, far wrong": (kto(False), [1e4], 1.0, [0.0]),
    "plackett_luce: a tie": (ranked(0, 0), [3.0, 3.0], 2 * math.log(2), [0.0, 0.0]),
    "plackett_luce: far wrong": (ranked(0, 1), [-1e4, 1e4], 2e4, [-1.0, 1.0]),
    "reward: a tie, far apart": (lambda w, r: scored(w, r, True), [1e4, -1e4], 1e4, [0.5, -0.5]),
    "reward: far wrong": (lambda w, r: scored(w, r, False), [-1e4, 1e4], 2e4, [-1.0, 1.0]),
    "reward: exactly the margin": (lambda w, r: scored(w, r, False, 3.0), [3.0, 0.0], math.log(2), [-0.5, 0.5]),
    "rated 1/2": (
        lambda x: pointwise_reward_loss(x, torch.tensor([0.5]), center_coef=0.0, num_groups=1)[0],
        [0.0],
        math.log(2),
        [0.0],
    ),
    "rated 0, far wrong": (
        lambda x: pointwise_reward_loss(x, torch.tensor([0.0]), center_coef=0.0, num_groups=1)[0],
        [1e4],
        1e4,
        [1.0],
    ),
    "ppo: good, ratio past float32": (clipped(1.0), [200.0], -1.2, [0.0]),
    "ppo: good, ratio 0": (clipped(1.0), [-200.0], 0.0, [0.0]),
    "ppo: bad, ratio 0": (clipped(-1.0), [-200.0], 0.8, [0.0]),
    "ppo: no advantage, ratio past float32": (clipped(0.0), [200.0], 0.0, [0.0]),
    "gspo: good, ratio past float32": (clipped(1.0, gspo_loss), [200.0], -1.2, [0.0]),
    "gspo: no advantage, ratio past float32": (clipped(0.0, gspo_loss), [200.0], 0.0, [0.0]),
    "cispo: good, ratio past float32": (clipped(1.0, cispo_loss), [200.0], -240.0, [-1.2]),
    "cispo: no advantage, ratio past float32": (clipped(0.0, cispo_loss), [200.0], 0.0, [0.0]),
    "ppo: bad, ratio past float32, dual clip": (clipped(-1.0, dual_clip=3.0), [200.0], 3.0, [0.0]),
    "value: at the clip": (
        lambda v: ppo_value_loss(v[None], torch.zeros(1, 1), torch.zeros(1, 1), ONE, clip_range=0.2, num_tokens=1)[0],
        [0.2],
        0.02,
        [0.2],
    ),
}


@pytest.mark.parametrize("name", CORNERS)
def test_value_and_gradient_at_the_corner(name):
    loss, arguments, value, gradients = CORNERS[name]
    inputs = [torch.tensor([x], requires_grad=True) for x in arguments]
    out = loss(*inputs)
    out.backward()
    assert math.isfinite(out.item())
    if value is not None:
        assert out.item() == pytest.approx(value, rel=1e-5, abs=2e-6)
    for given, wanted in zip(inputs, gradients, strict=True):
        assert torch.isfinite(given.grad).all()
        if wanted is not None:
            assert given.grad.item() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_a_ratio_past_float32_that_is_to_blame_stops_the_run():
    """Without a dual clip its loss is infinite: `stop_if_not_finite` says so, and no step is made of it."""
    ratio = torch.tensor([200.0], requires_grad=True)
    clipped(-1.0)(ratio).backward()
    assert torch.isinf(ratio.grad).all()


def test_a_rating_of_one_half_is_neither_good_nor_bad():
    scores, labels = torch.tensor([2.0, -2.0, 2.0, -2.0]), torch.tensor([1.0, 0.0, 0.5, 0.5])
    _, metrics = pointwise_reward_loss(scores, labels, center_coef=0.0, num_groups=4)
    assert metrics["rewards/accuracy"] == (2, 2)
