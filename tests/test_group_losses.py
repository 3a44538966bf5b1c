"""Policy losses of the group family and what a token counts: against loops over floats, and through the script."""
# ruff: noqa: F811 - fixtures of another test file

import math

import pytest
import torch

import train_ppo
from advantages import dr_grpo, gae_advantages, grpo, overlong_penalty, reinforce_pp, rloo
from losses import aggregation, cispo_loss, gspo_loss, ppo_policy_loss
from tests.test_losses import random_rows
from tests.test_ppo_values import stopping  # noqa: F401 - fixtures
from tests.test_train_ppo import inputs, ppo  # noqa: F401 - fixtures

HIGH = {"clip_range": 0.1, "clip_range_high": 0.4}


def loop(loss_of_row):
    """A loss summed row by row: loss_of_row(log-ratios, advantages, log-probs) -> the row's sum."""
    mask, (logprobs, old, advantages, _) = random_rows()
    total = 0.0
    for b in range(len(mask)):
        row = mask[b]
        ratios = (logprobs[b] - old[b])[row].tolist()
        total += loss_of_row(ratios, advantages[b][row].tolist(), logprobs[b][row].tolist())
    return (logprobs, old, advantages, mask), total


def test_the_clip_may_be_wider_upwards():
    def row(ratios, advantages, _):
        terms = [
            -min(a * math.exp(r), a * min(max(math.exp(r), 0.9), 1.4)) for r, a in zip(ratios, advantages, strict=True)
        ]
        return sum(terms)

    inputs, total = loop(row)
    assert ppo_policy_loss(*inputs, **HIGH, dual_clip=None, num_tokens=7)[0].item() == pytest.approx(total / 7)


def test_gspo_has_one_ratio_for_a_completion():
    def row(ratios, advantages, _):
        s = math.exp(sum(ratios) / len(ratios))
        return sum(-min(a * s, a * min(max(s, 0.9), 1.4)) for a in advantages)

    inputs, total = loop(row)
    loss, metrics = gspo_loss(*inputs, **HIGH, num_tokens=7)
    assert loss.item() == pytest.approx(total / 7)
    assert metrics["policy/ratio"].count == inputs[3].sum()


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    def row(ratios, advantages, logprobs):
        weights = [min(max(math.exp(r), 0.9), 1.4) for r in ratios]
        return sum(-w * a * lp for w, a, lp in zip(weights, advantages, logprobs, strict=True))

    (logprobs, old, advantages, mask), total = loop(row)
    logprobs.requires_grad_()
    loss, metrics = cispo_loss(logprobs, old, advantages, mask, **HIGH, num_tokens=7)
    assert loss.item() == pytest.approx(total / 7)
    loss.backward()
    weights = (logprobs - old).exp().clamp(0.9, 1.4).detach()
    torch.testing.assert_close(logprobs.grad, torch.where(mask, -weights * advantages / 7, 0.0))
    assert 0 < metrics["policy/clip_fraction"].mean() < 1


def test_what_a_token_counts():
    mask, (x, *_) = random_rows()
    mask[1] = False  # a row that is left out
    lengths = mask.sum(1).tolist()
    rows = [x[b][mask[b]].sum().item() for b in range(5)]
    means = [r / n if n else 0.0 for r, n in zip(rows, lengths, strict=True)]
    expected = {"token": sum(rows) / sum(lengths), "sequence_mean": sum(means) / 4, "sequence_sum": sum(rows) / 4 / 20}
    for kind, value in expected.items():
        weights, counts = aggregation(mask, kind, max_new_tokens=20)
        assert ((weights * x)[mask].sum() / counts.sum()).item() == pytest.approx(value, rel=1e-6)


def test_the_loss_and_the_kl_count_alike(ppo, stopping, monkeypatch):
    seen = []

    def spy(name):
        real = getattr(train_ppo, name)

        def call(*args, **settings):
            seen.append((name, args, settings))
            return real(*args, **settings)

        return call

    for name in ("ppo_loss", "kl_loss", "estimate_advantages"):
        monkeypatch.setattr(train_ppo, name, spy(name))
    words = ["advantage=dr_grpo", "samples_per_prompt=2", "aggregation=sequence_mean", "kl_in=loss", "kl_estimator=k2"]
    assert ppo(stopping, *words, "num_steps=1", "ppo_epochs=1", "minibatch_size=16", "micro_batch_size=16") == 0
    (loss,) = [call for call in seen if call[0] == "ppo_loss"]
    (kl,) = [call for call in seen if call[0] == "kl_loss"]
    _, _, advantages, mask = loss[1][0]
    weights = kl[1][4]
    torch.testing.assert_close(weights[:, 0], 1 / mask.sum(1))
    assert loss[2]["num_tokens"] == 16
    torch.testing.assert_close(advantages.sum(1) / (mask / mask.sum(1, keepdim=True)).sum(1), advantages.sum(1))
    whole = advantages.sum(1).view(-1, 2)  # each row counts its advantage once, whatever its length
    torch.testing.assert_close(whole[:, 0], -whole[:, 1], rtol=1e-4, atol=1e-5)
    assert mask.sum(1).unique().numel() > 1


def rows():
    mask, (rewards, values, *_) = random_rows(B=6)
    return mask, torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)


def test_a_row_that_is_left_out_is_nobodys_sibling():
    mask, rewards, _ = rows()
    left, mask[1] = mask.clone(), False
    for estimate in (rloo, grpo, dr_grpo):
        three = estimate(rewards, mask, samples_per_prompt=3)
        pair = estimate(rewards[[0, 2]], left[[0, 2]], samples_per_prompt=2)
        torch.testing.assert_close(three[[0, 2]], pair)
        assert not three[1].any()
    mask[0] = False  # one is left: it has no sibling
    assert not rloo(rewards, mask, samples_per_prompt=3)[:3].any()


def test_dr_grpo_is_a_share_of_rloo():
    mask, rewards, _ = rows()
    torch.testing.assert_close(
        dr_grpo(rewards, mask, samples_per_prompt=3), rloo(rewards, mask, samples_per_prompt=3) * 2 / 3
    )


def test_reinforce_pp_whitens_returns_to_go():
    mask, rewards, _ = rows()
    to_go = [rewards[b, t:].sum().item() for b, t in mask.nonzero().tolist()]
    mean = sum(to_go) / len(to_go)
    std = math.sqrt(sum((x - mean) ** 2 for x in to_go) / len(to_go))
    got = reinforce_pp(rewards, mask, mean=lambda x: x)
    assert got[mask].tolist() == pytest.approx([(x - mean) / std for x in to_go], rel=1e-5)


def test_lambda_of_a_short_row_is_0():
    mask, rewards, values = rows()
    short = gae_advantages(rewards, values, mask, None, gamma=1.0, gae_lambda=0.95, lambda_alpha=0.05)
    one_step = gae_advantages(rewards, values, mask, None, gamma=1.0, gae_lambda=0.0, lambda_alpha=None)
    torch.testing.assert_close(short, one_step)  # none of the rows has 20 tokens


def test_the_overlong_penalty_is_dapos():
    lengths = torch.tensor([1, 12, 13, 14, 16])
    assert overlong_penalty(lengths, max_new_tokens=16, overlong_tokens=4).tolist() == [0, 0, -0.25, -0.5, -1]
    assert not overlong_penalty(lengths, max_new_tokens=16, overlong_tokens=0).any()
