"""Score rules, KL estimators and controllers, baselines: against plain loops and against published conventions."""

import json
import math
from pathlib import Path

import pytest
import torch

from advantages import (
    AdaptiveKL,
    FixedKL,
    clip_scores,
    dr_grpo,
    estimate_advantages,
    explained_variance,
    grpo,
    kl_estimate,
    kl_loss,
    missing_eos,
    rloo,
    whiten,
)
from kernels.gae import gae
from losses import ppo_value_loss, token_rewards


def one_rank(x):
    return x


# ---- scores


def test_missing_eos_replaces_or_subtracts_only_where_the_completion_did_not_stop():
    scores, finished = torch.tensor([2.0, 3.0]), torch.tensor([True, False])
    assert missing_eos(scores, finished, mode="replace", value=-1.0).tolist() == [2, -1]
    assert missing_eos(scores, finished, mode="subtract", value=-1.0).tolist() == [2, 2]
    assert missing_eos(scores, finished, mode="subtract", value=1.0).tolist() == [2, 2]  # a penalty has no sign
    assert missing_eos(scores, finished, mode="none", value=-1.0).tolist() == [2, 3]
    with pytest.raises(ValueError, match="replace, subtract, none"):
        missing_eos(scores, finished, mode="replaced", value=-1.0)


def test_clip_scores_bounds_both_sides_and_null_leaves_them():
    scores = torch.tensor([-9.0, 1.0, 9.0])
    assert clip_scores(scores, 5.0).tolist() == [-5, 1, 5]
    assert clip_scores(scores, None).tolist() == [-9, 1, 9]


# ---- KL


def kl_problem():
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(7, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    return logits, logprobs, ref, (logprobs.exp() * (logprobs - ref)).sum()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_for_the_kl(kind):
    _, logprobs, ref, kl = kl_problem()
    expectation = (logprobs.exp() * kl_estimate(logprobs - ref, kind)).sum()
    assert expectation.item() == pytest.approx(kl.item(), abs=1e-12)


def test_as_a_loss_on_samples_only_k2_has_the_gradient_of_the_kl():
    gradients = {}
    for kind in ("k1", "k2", "k3"):
        logits, logprobs, ref, _ = kl_problem()
        sampled = logprobs.detach().exp()  # the samples' distribution does not move
        (gradients[kind],) = torch.autograd.grad((sampled * kl_estimate(logprobs - ref, kind)).sum(), logits)
    logits, _, _, kl = kl_problem()
    (truth,) = torch.autograd.grad(kl, logits)
    torch.testing.assert_close(gradients["k2"], truth)
    torch.testing.assert_close(gradients["k1"], torch.zeros_like(truth))
    assert (gradients["k3"] - truth).abs().max() > 0.01


def test_the_kl_in_the_loss_is_the_policys_to_the_reference():
    logprobs, ref, mask = (
        torch.tensor([[0.0, -1.0, -3.0]]),
        torch.tensor([[0.0, -2.5, -2.0]]),
        torch.tensor([[0, 1, 1]]),
    )
    expected = {"k2": (1.5**2 + 1) / 2, "k3": math.exp(-1.5) - 1 + 1.5 + math.exp(1) - 1 - 1}
    for kind, value in expected.items():
        assert kl_loss(logprobs, ref, mask.bool(), kind).item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("log_ratio", [-1e4, -89.0, 0.0, 89.0, 1e4])
def test_kl_estimates_and_their_gradients_are_finite(kind, log_ratio):
    x = torch.tensor([log_ratio], requires_grad=True)
    estimate = kl_estimate(x, kind)
    estimate.backward()
    assert estimate.isfinite() and x.grad.isfinite()


def test_adaptive_kl_equals_the_papers_update_and_counts_nats_per_sequence():
    controller = AdaptiveKL(0.15, target_nats_per_sequence=6.0, horizon=10_000)
    kl_coef = 0.15
    for kl in (0.0, 5.5, 6.0, 6.6, 30.0):
        controller.update(kl, 512)
        kl_coef *= 1 + max(-0.2, min(0.2, kl / 6.0 - 1)) * 512 / 10_000
        assert controller.kl_coef == pytest.approx(kl_coef, abs=1e-15)


def test_controllers_come_back_from_their_state():
    old = AdaptiveKL(0.15, target_nats_per_sequence=6.0, horizon=100)
    old.update(9.0, 8)
    new = AdaptiveKL(0.15, target_nats_per_sequence=6.0, horizon=100)
    new.load_state_dict(old.state_dict())
    assert new.kl_coef == old.kl_coef != 0.15
    fixed = FixedKL(0.05)
    fixed.update(100.0, 512)
    assert fixed.kl_coef == 0.05


# ---- advantages


def rows(B=4, T=8, seed=0):
    torch.manual_seed(seed)
    columns, length = torch.arange(T), torch.randint(1, T - 2, (B, 1))
    mask = (columns >= 2) & (columns < 2 + length)
    return mask, torch.where(mask, torch.randn(B, T, dtype=torch.float64), 0.0)


def test_gae_equals_the_sum_of_discounted_errors():
    mask, rewards = rows()
    values = torch.where(mask, torch.randn(4, 8, dtype=torch.float64), 0.0)
    got = estimate_advantages(rewards, values, mask, mask, kind="gae", gamma=0.9, gae_lambda=0.8, samples_per_prompt=1)
    for b in range(4):
        steps = mask[b].nonzero().flatten().tolist()
        r, v = rewards[b, steps].tolist(), values[b, steps].tolist() + [0.0]
        deltas = [r[i] + 0.9 * v[i + 1] - v[i] for i in range(len(r))]
        for i, t in enumerate(steps):
            expected = sum((0.9 * 0.8) ** (j - i) * deltas[j] for j in range(i, len(r)))
            assert got[b, t].item() == pytest.approx(expected, abs=1e-6)


def test_law_5_gae_with_lambda_one_is_return_minus_value():
    mask, rewards = rows()
    values = torch.where(mask, torch.randn(4, 8, dtype=torch.float64), 0.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    got = gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(got.double(), torch.where(mask, to_go - values, 0.0), rtol=1e-5, atol=1e-6)


def test_rloo_and_grpo_equal_loops_over_the_group():
    mask, rewards = rows(B=6)
    returns = rewards.sum(1).tolist()
    for b in range(6):
        group = returns[b // 3 * 3 : b // 3 * 3 + 3]
        others = [group[i] for i in range(3) if i != b % 3]
        mean = sum(group) / 3
        std = math.sqrt(sum((x - mean) ** 2 for x in group) / 2)
        for got, expected in (
            (rloo(rewards, mask, samples_per_prompt=3)[b], returns[b] - sum(others) / 2),
            (grpo(rewards, mask, samples_per_prompt=3)[b], (returns[b] - mean) / (std + 1e-6)),
        ):
            assert got[mask[b]].tolist() == pytest.approx([expected] * int(mask[b].sum()), abs=1e-9)
            assert (got[~mask[b]] == 0).all()


@pytest.mark.parametrize("score", [1.0, 0.35, 10.1, 100.7])  # the sum of 7 rounded scores is not 7 times the score
@pytest.mark.parametrize("size", [4, 7, 8])
def test_equal_returns_teach_nothing(score, size):
    mask = torch.ones(size, 3, dtype=torch.bool)
    rewards = torch.zeros(size, 3)
    rewards[:, 2] = score
    for of_group in (grpo, rloo, dr_grpo):
        assert (of_group(rewards, mask, samples_per_prompt=size) == 0).all(), of_group
    last = rewards > 0
    assert (whiten(rewards, last, one_rank, shift_mean=True) == 0).all()
    assert torch.equal(whiten(rewards, last, one_rank, shift_mean=False), rewards)


def test_group_baselines_refuse_single_samples():
    mask, rewards = rows()
    with pytest.raises(ValueError, match="samples_per_prompt >= 2"):
        rloo(rewards, mask, samples_per_prompt=1)


# ---- whole conventions on a batch made by hand: rewards, whitening and advantages of two published codes


def test_sfd_convention_scores_the_state_after_eos_and_credits_eos_by_lambda():
    """Summarize-from-feedback details: score in the first padding slot, -1 without EOS, no reward whitening."""
    gamma, lam, kl_coef = 1.0, 0.95, 0.05
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    value_mask = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    kl = torch.tensor([[0, 0.4, -0.2, 0, 0], [0, 0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    values = torch.tensor([[0, 0.5, 0.7, 0.9, 0], [0, 0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    scores = missing_eos(torch.tensor([2.0, 7.0]), torch.tensor([True, False]), mode="replace", value=-1.0)
    rewards = token_rewards(scores.double(), kl, mask, value_mask, kl_coef=kl_coef)
    assert rewards[0].tolist() == pytest.approx([0, -0.02, 0.01, 2.0, 0])
    assert rewards[1].tolist() == pytest.approx([0, -0.005, -0.01, -0.015, -1.02])

    got = gae(rewards, values, value_mask, gamma=gamma, gae_lambda=lam)
    after = 2.0 - 0.9
    at_eos = 0.01 + 0.9 - 0.7 + lam * after  # = r - V + (1 - lam) V' + lam score
    assert got[0, 3].item() == pytest.approx(after, abs=1e-6)
    assert got[0, 2].item() == pytest.approx(at_eos, abs=1e-6)
    assert got[0, 2].item() == pytest.approx(0.01 - 0.7 + (1 - lam) * 0.9 + lam * 2.0, abs=1e-6)
    assert got[0, 1].item() == pytest.approx(-0.02 + 0.7 - 0.5 + lam * at_eos, abs=1e-6)
    whitened = whiten(got, mask, one_rank, shift_mean=True)  # over actions: the state after EOS has none
    assert whitened[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert whitened[0, 3] == 0


def test_lhp_convention_scores_the_last_column_and_whitens_rewards_without_their_mean():
    """lm-human-preferences: completions of fixed length, score in the last column, rewards whitened first."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    kl = torch.tensor([[0.1, 0.2, 0.3], [-0.1, 0.0, 0.4]], dtype=torch.float64)
    scores = missing_eos(torch.tensor([1.0, 3.0]), torch.tensor([True, False]), mode="replace", value=-1.0)
    rewards = token_rewards(scores.double(), kl, mask, mask, kl_coef=0.2)
    flat = [-0.02, -0.04, 0.94, 0.02, 0.0, -1.08]
    assert rewards.flatten().tolist() == pytest.approx(flat)
    mean = sum(flat) / 6
    variance = sum((x - mean) ** 2 for x in flat) / 6
    whitened = whiten(rewards, mask, one_rank, shift_mean=False)
    assert whitened.flatten().tolist() == pytest.approx([(x - mean) / math.sqrt(variance + 1e-8) + mean for x in flat])


def test_explained_variance_is_1_of_the_returns_themselves_and_0_of_a_constant():
    returns, mask = torch.randn(4, 7), torch.rand(4, 7) > 0.3
    constant = torch.full_like(returns, 2.0)
    assert explained_variance(returns, returns + 5, mask, one_rank).item() == pytest.approx(1)  # an offset explains
    assert explained_variance(returns, constant, mask, one_rank).item() == pytest.approx(0, abs=1e-6)
    assert explained_variance(returns, 0.5 * returns, mask, one_rank).item() == pytest.approx(0.75)
    returns[~mask] = 1e6  # what lies off-mask does not count
    assert explained_variance(returns, 3 * returns, mask, one_rank).item() == pytest.approx(-3)


def test_a_whole_first_step_equals_trl_1_12_with_its_conventions_set():
    """Figures that trl.experimental.ppo logged and computed for one rollout: see tests/parity/trl_ppo.py."""
    golden = json.loads((Path(__file__).parent / "trl_ppo_step.json").read_text())
    rollout = {name: torch.tensor(value) for name, value in golden["rollout"].items()}
    theirs = {name: torch.tensor(value) for name, value in golden["theirs"].items()}
    mask, value_mask, values, logprobs = (rollout[name] for name in ("mask", "value_mask", "values", "logprobs"))
    scores = missing_eos(rollout["scores"], rollout["finished"], mode="subtract", value=1.0)
    kl = kl_estimate(logprobs - rollout["ref_logprobs"], "k1")
    rewards = token_rewards(scores, kl, mask, value_mask, kl_coef=0.05)
    advantages = gae(rewards, values, value_mask, gamma=1.0, gae_lambda=0.95)
    bessel = math.sqrt((mask.sum() - 1) / mask.sum())  # TRL's variance is the unbiased one
    value_loss, _ = ppo_value_loss(
        values, values, advantages + values, value_mask, clip_range=0.2, num_tokens=value_mask.sum()
    )
    ours = {
        "scores": scores,
        "rewards": rewards,
        "values": values,
        "advantages": advantages,
        "value loss": value_loss,
        "whitened advantages": whiten(advantages, mask, one_rank, shift_mean=True) * bessel,
        "KL per sequence": kl.sum(1).mean(),
    }
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=5e-6, msg=name)
