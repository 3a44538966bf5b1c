"""The preference losses against values written out by hand in float64, and the laws that they keep."""

import math

import pytest
import torch

from losses import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    plackett_luce_loss,
    robust_dpo_loss,
    simpo_loss,
)

CHOSEN, REJECTED = [-3.0, -7.5, -0.25], [-4.0, -2.0, -9.0]
REF_CHOSEN, REF_REJECTED = [-3.5, -6.0, -1.0], [-3.0, -2.5, -8.0]
SMOOTH = {"label_smoothing": 0.2}
PAIR_LOSSES = {
    "dpo": lambda *pair: dpo_loss(*pair, beta=0.3, label_smoothing=0.0),
    "cdpo": lambda *pair: dpo_loss(*pair, beta=0.3, **SMOOTH),
    "margin": lambda *pair: dpo_loss(*pair, beta=0.3, label_smoothing=0.0, target_margin=0.7),
    "smoothed margin": lambda *pair: dpo_loss(*pair, beta=0.3, **SMOOTH, target_margin=0.7),
    "robust": lambda *pair: robust_dpo_loss(*pair, beta=0.3, **SMOOTH),
    "ipo": lambda *pair: ipo_loss(*pair, beta=0.3),
    "hinge": lambda *pair: hinge_loss(*pair, beta=0.3),
}


def tensors(*rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def four():
    return tensors(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def margins(beta):
    rows = zip(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, strict=True)
    return [beta * ((w - ref_w) - (l - ref_l)) for w, l, ref_w, ref_l in rows]  # noqa: E741


def mean(values):
    values = list(values)
    return sum(values) / len(values)


HAND = {
    "dpo": lambda h: -math.log(sigmoid(h)),
    "cdpo": lambda h: -0.8 * math.log(sigmoid(h)) - 0.2 * math.log(sigmoid(-h)),
    "margin": lambda h: -math.log(sigmoid(h - 0.7)),
    "smoothed margin": lambda h: -0.8 * math.log(sigmoid(h - 0.7)) - 0.2 * math.log(sigmoid(0.7 - h)),
    "robust": lambda h: (-0.8 * math.log(sigmoid(h)) + 0.2 * math.log(sigmoid(-h))) / 0.6,
    "ipo": lambda h: (h / 0.3 - 1 / 0.6) ** 2,
    "hinge": lambda h: max(0.0, 1 - h),
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_pair_loss_is_the_value_written_out_by_hand(name):
    loss, metrics = PAIR_LOSSES[name](*four())
    assert loss.item() == pytest.approx(mean(HAND[name](h) for h in margins(0.3)), abs=1e-12)
    assert metrics["rewards/margin"].tolist() == pytest.approx(margins(0.3), abs=1e-12)
    assert metrics["rewards/accuracy"].tolist() == [1.0, 0.0, 1.0]
    assert metrics["rewards/chosen"].tolist() == pytest.approx([0.15, -0.45, 0.225], abs=1e-12)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_margin_of_zero_is_not_right(name):
    same = tensors([-2.0], [-2.0], [-1.0], [-1.0])
    assert PAIR_LOSSES[name](*same)[1]["rewards/accuracy"].tolist() == [0.0]


@pytest.mark.parametrize("name", ["dpo", "robust", "cdpo"])
def test_first_step_loss_is_ln_2_when_the_policy_is_the_reference(name):
    chosen, rejected = tensors(CHOSEN, REJECTED)
    assert PAIR_LOSSES[name](chosen, rejected, chosen, rejected)[0].item() == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_swapping_chosen_and_rejected_flips_the_sign_of_the_margin(name):
    chosen, rejected, ref_chosen, ref_rejected = four()
    forth = PAIR_LOSSES[name](chosen, rejected, ref_chosen, ref_rejected)[1]
    back = PAIR_LOSSES[name](rejected, chosen, ref_rejected, ref_chosen)[1]
    assert torch.equal(forth["rewards/margin"], -back["rewards/margin"])
    assert torch.equal(forth["rewards/chosen"], back["rewards/rejected"])


def test_robust_loss_is_the_clean_loss_in_expectation_over_flipped_labels():
    chosen, rejected, ref_chosen, ref_rejected = four()
    kept = robust_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3, **SMOOTH)[0]
    flipped = robust_dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta=0.3, **SMOOTH)[0]
    clean = dpo_loss(*four(), beta=0.3, label_smoothing=0.0)[0]
    assert torch.allclose(0.8 * kept + 0.2 * flipped, clean, atol=1e-12)


def test_beta_and_target_margin_may_differ_per_pair():
    beta, margin = tensors([0.1, 0.3, 2.0], [0.0, 0.5, 1.0])
    together = dpo_loss(*four(), beta=beta, label_smoothing=0.1, target_margin=margin)[0]
    alone = [
        dpo_loss(*(x[i : i + 1] for x in four()), beta=beta[i].item(), label_smoothing=0.1, target_margin=margin[i])[0]
        for i in range(3)
    ]
    assert torch.allclose(together, torch.stack(alone).mean(), atol=1e-12)


def test_simpo_is_the_hand_value_and_has_no_reference():
    chosen, rejected = tensors([-0.5, -1.2], [-0.9, -1.1])
    expected = mean(-math.log(sigmoid(2.0 * gap - 0.6)) for gap in (0.4, -0.1))
    loss, metrics = simpo_loss(chosen, rejected, beta=2.0, target_margin=0.6)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert metrics["rewards/margin"].tolist() == pytest.approx([0.8, -0.2])


def test_cpo_is_dpo_with_a_uniform_reference():
    chosen, rejected, *_ = four()
    zeros = torch.zeros_like(chosen)
    expected = mean(-math.log(sigmoid(0.3 * (w - r))) for w, r in zip(CHOSEN, REJECTED, strict=True))
    loss = dpo_loss(chosen, rejected, zeros, zeros, beta=0.3, label_smoothing=0.0)[0]
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_orpo_is_the_log_odds_ratio_of_mean_probabilities():
    chosen, rejected = tensors([-0.5, -1e-4], [-0.9, -3.0])

    def odds(mean_logprob):
        return math.exp(mean_logprob) / -math.expm1(mean_logprob)

    pairs = zip(chosen.tolist(), rejected.tolist(), strict=True)
    expected = mean(-0.1 * math.log(sigmoid(math.log(odds(w) / odds(r)))) for w, r in pairs)
    loss, metrics = orpo_loss(chosen, rejected, beta=0.1)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert metrics["rewards/accuracy"].tolist() == [1.0, 1.0]


def kto(logprobs, ref_logprobs, kl):
    desirable = torch.tensor([True, False, True])
    return kto_loss(logprobs, ref_logprobs, desirable, kl, beta=0.3, desirable_weight=1.0, undesirable_weight=1.5)


def test_kto_is_the_hand_value_and_its_reference_point_carries_no_gradient():
    logprobs, ref_logprobs = tensors(CHOSEN, REF_CHOSEN)
    kl = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    loss, metrics = kto(logprobs.requires_grad_(), ref_logprobs, kl)
    ratios = [w - r for w, r in zip(CHOSEN, REF_CHOSEN, strict=True)]
    good = [1 - sigmoid(0.3 * (ratios[i] - 0.4)) for i in (0, 2)]
    bad = 1.5 * (1 - sigmoid(0.3 * (0.4 - ratios[1])))
    assert loss.item() == pytest.approx(mean([*good, bad]), abs=1e-12)
    assert metrics["rewards/chosen"] == pytest.approx((0.15 + 0.225, 2))
    assert metrics["rewards/rejected"] == pytest.approx((-0.45, 1))
    loss.backward()
    assert kl.grad is None
    assert (logprobs.grad[[0, 2]] < 0).all() and logprobs.grad[1] > 0  # descent raises the good, lowers the bad


def test_plackett_luce_is_the_product_of_choices_from_what_is_left():
    logprobs, ref_logprobs = tensors([-3.0, -1.0, -2.0, -5.0, -4.0], [-2.0, -2.5, -2.0, -4.0, -4.5])
    ranks, elements = torch.tensor([2, 0, 1, 1, 0]), torch.tensor([7, 7, 7, 3, 3])
    r = [0.5 * (a - b) for a, b in zip(logprobs.tolist(), ref_logprobs.tolist(), strict=True)]
    e = [math.exp(x) for x in r]
    first = -math.log(e[1] / (e[0] + e[1] + e[2])) - math.log(e[2] / (e[0] + e[2]))
    second = -math.log(e[4] / (e[3] + e[4]))
    loss, metrics = plackett_luce_loss(logprobs, ref_logprobs, elements, ranks, beta=0.5)
    assert loss.item() == pytest.approx((first + second) / 2, abs=1e-12)
    margins = [r[1] - r[2], r[1] - r[0], r[2] - r[0], r[4] - r[3]]
    assert metrics["rewards/margin"] == pytest.approx((sum(margins), 4))
    assert metrics["rewards/accuracy"] == (sum(margin > 0 for margin in margins), 4)


def test_plackett_luce_of_two_is_dpo():
    chosen, rejected, ref_chosen, ref_rejected = four()
    expected, metrics = dpo_loss(*four(), beta=0.3, label_smoothing=0.0)
    elements, ranks = torch.arange(3).repeat(2), torch.tensor([0, 0, 0, 1, 1, 1])
    both, ref_both = torch.cat([chosen, rejected]), torch.cat([ref_chosen, ref_rejected])
    loss, k_wise = plackett_luce_loss(both, ref_both, elements, ranks, beta=0.3)
    assert torch.allclose(loss, expected, atol=1e-12)
    assert {name: v.count for name, v in k_wise.items()} == dict.fromkeys(metrics, 3)
    assert {name: v.mean().item() for name, v in k_wise.items()} == pytest.approx(
        {name: v.mean().item() for name, v in metrics.items()}
    )


def test_tied_answers_pull_together_whatever_their_order():
    logprobs, ref_logprobs = tensors([-3.0, -1.0, -2.0], [0.0, 0.0, 0.0])
    ranks, elements = torch.tensor([0, 0, 1]), torch.zeros(3, dtype=torch.long)
    loss = plackett_luce_loss(logprobs, ref_logprobs, elements, ranks, beta=1.0)[0]
    swapped = plackett_luce_loss(logprobs[[1, 0, 2]], ref_logprobs, elements, ranks, beta=1.0)[0]
    assert torch.allclose(loss, swapped)


@pytest.mark.parametrize("name", [*PAIR_LOSSES, "simpo", "orpo", "kto", "plackett_luce"])
def test_gradients_are_the_derivatives(name):
    pair, kl = four(), torch.tensor(0.4, dtype=torch.float64)
    ids = torch.tensor([0, 0, 0]), torch.tensor([1, 0, 2])
    functions = {
        "simpo": lambda w, r: simpo_loss(w / 5, r / 5, beta=2.0, target_margin=0.5)[0],
        "orpo": lambda w, r: orpo_loss(w / 5, r / 5, beta=0.4)[0],
        "kto": lambda w, r: kto(w, pair[2], kl)[0] + kto(r, pair[3], kl)[0],
        "plackett_luce": lambda w, r: plackett_luce_loss(w, r, *ids, beta=0.3)[0],
    }

    def pair_loss(w, r):
        return PAIR_LOSSES[name](w, r, *pair[2:])[0]

    assert torch.autograd.gradcheck(
        functions.get(name, pair_loss), (pair[0].requires_grad_(), pair[1].requires_grad_())
    )


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_micro_batches_weighted_by_their_pairs_are_the_whole_batch(name):
    whole = PAIR_LOSSES[name](*four())[0]
    parts = [PAIR_LOSSES[name](*(x[rows] for x in four()))[0] * len(rows) / 3 for rows in ([0, 1], [2])]
    assert torch.allclose(sum(parts), whole, atol=1e-12)


@pytest.mark.parametrize("change, says", [({"beta": 0.0}, "beta"), ({"label_smoothing": 0.5}, "label_smoothing")])
def test_hyperparameters_out_of_range_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        dpo_loss(*four(), **{"beta": 0.1, "label_smoothing": 0.0, **change})


def test_shapes_that_differ_are_refused():
    chosen, rejected, ref_chosen, ref_rejected = four()
    with pytest.raises(ValueError, match=r"four \(B,\) tensors"):
        dpo_loss(chosen, rejected[:2], ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0)
    with pytest.raises(ValueError, match="bool"):
        kto_loss(chosen, ref_chosen, torch.ones(3), torch.tensor(0.0), beta=1, desirable_weight=1, undesirable_weight=1)
