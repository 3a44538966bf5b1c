"""SFT, reward and PPO losses against plain loops over Python floats, and the laws they must keep."""

import math

import pytest
import torch

from advantages import whiten
from kernels.backend import set_kernels
from kernels.clips import Clips
from losses import (
    PolicyTerms,
    ValueTerms,
    pointwise_reward_loss,
    ppo_loss,
    ppo_policy_loss,
    ppo_value_loss,
    reward_loss,
    sft_loss,
    token_rewards,
)


def one_rank(x):
    return x


def random_rows(B=5, T=9, seed=0, extra=()):
    """(B, T) float64 tensors and a mask of unequal runs: prompt, completion, padding."""
    torch.manual_seed(seed)
    start, length = torch.randint(0, 4, (B, 1)), torch.randint(1, T - 3, (B, 1))
    columns = torch.arange(T)
    mask = (columns >= start) & (columns < start + length)
    return mask, [torch.randn(B, T, dtype=torch.float64) for _ in range(4 + len(extra))]


def sigmoid_nll(x):
    return math.log1p(math.exp(-x))


# ---- SFT


def test_sft_loss_is_the_mean_nll_per_target_token():
    mask, (logprobs, *_) = random_rows()
    loss, metrics = sft_loss(logprobs, mask, num_tokens=mask.sum())
    tokens = [-logprobs[b, t].item() for b in range(5) for t in range(9) if mask[b, t]]
    assert loss.item() == pytest.approx(sum(tokens) / len(tokens), abs=1e-12)
    assert metrics["objective/loss"] == pytest.approx((sum(tokens), len(tokens)))


def test_sft_refuses_a_row_without_target():
    mask, (logprobs, *_) = random_rows()
    mask[3] = False
    with pytest.raises(ValueError, match=r"rows \[3\] have no target"):
        sft_loss(logprobs, mask, num_tokens=mask.sum())


# ---- reward model


def test_reward_loss_equals_a_loop_over_pairs_with_margins_ties_and_centering():
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 7, dtype=torch.float64)
    weights, margins = torch.rand(2, 7, dtype=torch.float64)
    ties = torch.tensor([0, 1, 0, 0, 1, 0, 0], dtype=torch.bool)
    loss, metrics = reward_loss(chosen, rejected, weights, margins, ties, center_coef=0.01, num_groups=3)
    total = 0.0
    for c, r, w, m, tie in zip(
        chosen.tolist(), rejected.tolist(), weights.tolist(), margins.tolist(), ties, strict=True
    ):
        nll = (sigmoid_nll(c - r) + sigmoid_nll(r - c)) / 2 if tie else sigmoid_nll(c - r - m)
        total += w * (nll + 0.01 * (c + r) ** 2)
    assert loss.item() == pytest.approx(total / 3, abs=1e-12)
    right = sum(c > r and not tie for c, r, tie in zip(chosen.tolist(), rejected.tolist(), ties, strict=True))
    assert metrics["rewards/accuracy"] == (right, 5)  # ties have no right answer


def test_equal_scores_cost_log_two_whatever_k():
    for K in (2, 4, 9):
        pairs = math.comb(K, 2)
        same = torch.zeros(pairs, dtype=torch.float64)
        weights = torch.full((pairs,), 1 / pairs, dtype=torch.float64)
        loss, _ = reward_loss(same, same, weights, same, same.bool(), center_coef=0.0, num_groups=1)
        assert loss.item() == pytest.approx(math.log(2), abs=1e-12)


def test_a_tie_is_cheapest_at_equal_scores_and_symmetric():
    one, none, tie = torch.ones(1), torch.zeros(1), torch.ones(1, dtype=torch.bool)

    def at(difference):
        return reward_loss(difference * one, none, one, none, tie, center_coef=0.0, num_groups=1)[0].item()

    assert at(0.0) < at(0.5)
    assert at(0.7) == pytest.approx(at(-0.7), abs=1e-7)


def test_pointwise_loss_equals_a_loop_and_takes_soft_labels():
    torch.manual_seed(0)
    scores, labels = torch.randn(6, dtype=torch.float64), torch.tensor([0, 1, 1, 0.25, 0.5, 1], dtype=torch.float64)
    loss, metrics = pointwise_reward_loss(scores, labels, center_coef=0.1, num_groups=6)
    rows = zip(scores.tolist(), labels.tolist(), strict=True)
    expected = sum(y * sigmoid_nll(r) + (1 - y) * sigmoid_nll(-r) + 0.1 * r * r for r, y in rows) / 6
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    right = sum((r > 0) == (y > 0.5) for r, y in zip(scores.tolist(), labels.tolist(), strict=True) if y != 0.5)
    assert metrics["rewards/accuracy"] == (right, 5)  # 1/2 is neither


def test_equal_scores_order_no_pair():
    one = torch.ones(1)
    _, metrics = reward_loss(one, one, one, 0 * one, torch.tensor([False]), center_coef=0.0, num_groups=1)
    assert metrics["rewards/accuracy"] == (0, 1)


def test_pointwise_labels_outside_zero_one_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        pointwise_reward_loss(torch.zeros(2), torch.tensor([1.0, 2.0]), center_coef=0.0, num_groups=2)


# ---- PPO


def test_token_rewards_put_the_score_on_the_last_completion_token():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    kl = torch.tensor([[9.0, 1.0, 2.0, 9.0], [9.0, 9.0, 3.0, -1.0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), kl, mask, mask, kl_coef=0.5)
    assert rewards.tolist() == [[0, -0.5, 9.0, 0], [0, 0, -1.5, 20.5]]


def test_token_rewards_after_eos_use_one_state_more():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    value_mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)  # the second was cut: no state after it
    rewards = token_rewards(torch.tensor([10.0, 20.0]), torch.ones(2, 4), mask, value_mask, kl_coef=0.5)
    assert rewards.tolist() == [[0, -0.5, -0.5, 10.0], [0, 0, -0.5, 19.5]]


def test_token_rewards_keep_infinity_of_masked_columns_out():
    mask = torch.tensor([[False, True]])
    rewards = token_rewards(torch.ones(1), torch.tensor([[torch.inf, 0.0]]), mask, mask, kl_coef=0.0)
    assert rewards.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_equals_brute_force_over_masked_entries(shift_mean):
    mask, (x, *_) = random_rows()
    x = torch.where(mask, 3 * x + 2, torch.nan)
    kept = x[mask].tolist()
    mean = sum(kept) / len(kept)
    std = math.sqrt(sum((v - mean) ** 2 for v in kept) / len(kept) + 1e-8)
    expected = [(v - mean) / std + (0 if shift_mean else mean) for v in kept]
    whitened = whiten(x, mask, one_rank, shift_mean=shift_mean)
    assert whitened[mask].tolist() == pytest.approx(expected, abs=1e-12)
    assert (whitened[~mask] == 0).all()


def test_whiten_over_two_ranks_is_whiten_of_the_whole():
    mask, (x, *_) = random_rows(B=6)
    halves = [(x[:2], mask[:2]), (x[2:], mask[2:])]
    sums = [mask[:2].sum() + mask[2:].sum()]
    sums.append(torch.where(mask, x, 0.0).sum())
    whole = whiten(x, mask, one_rank, shift_mean=True)
    center = sums[1] / sums[0]
    sums.append(torch.where(mask, x - center, 0.0).square().sum())
    for (part, m), expected in zip(halves, (whole[:2], whole[2:]), strict=True):
        answers = iter(sums)
        torch.testing.assert_close(whiten(part, m, lambda _: next(answers) / 2, shift_mean=True), expected)  # noqa: B023


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_policy_loss_equals_a_loop_over_tokens(dual_clip):
    mask, (logprobs, old_logprobs, advantages, _) = random_rows()
    loss, metrics = ppo_policy_loss(
        logprobs, old_logprobs, advantages, mask, clip_range=0.2, dual_clip=dual_clip, num_tokens=mask.sum()
    )
    total, clipped_tokens = 0.0, 0
    for b, t in mask.nonzero().tolist():
        ratio = math.exp(logprobs[b, t] - old_logprobs[b, t])
        a, clipped = advantages[b, t].item(), min(max(ratio, 0.8), 1.2)
        objective = min(a * ratio, a * clipped)
        clipped_tokens += a * clipped < a * ratio
        if dual_clip is not None and a < 0:
            objective = max(objective, dual_clip * a)
        total -= objective
    assert loss.item() == pytest.approx(total / mask.sum().item(), abs=1e-12)
    assert metrics["policy/clip_fraction"] == (clipped_tokens, mask.sum())
    ratios = (logprobs - old_logprobs)[mask].exp()
    assert metrics["policy/ratio"] == pytest.approx((ratios.sum().item(), len(ratios)))


def test_a_token_clipped_in_its_favour_has_no_gradient_and_others_do():
    old = torch.zeros(1, 4, dtype=torch.float64)
    logprobs = torch.tensor([[0.5, 0.5, -0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    ppo_policy_loss(logprobs, old, advantages, mask, clip_range=0.2, dual_clip=None, num_tokens=1)[0].backward()
    assert (logprobs.grad[0] != 0).tolist() == [False, True, True, False]


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_value_loss_equals_a_loop_over_states(clip_range):
    mask, (values, old_values, returns, _) = random_rows()
    loss, _ = ppo_value_loss(values, old_values, returns, mask, clip_range=clip_range, num_tokens=mask.sum())
    total = 0.0
    for b, t in mask.nonzero().tolist():
        v, old, target = values[b, t].item(), old_values[b, t].item(), returns[b, t].item()
        error = (v - target) ** 2
        if clip_range is not None:
            error = max(error, (min(max(v, old - clip_range), old + clip_range) - target) ** 2)
        total += error / 2
    assert loss.item() == pytest.approx(total / mask.sum().item(), abs=1e-12)


PPO = Clips(policy=0.2, dual=3.0, value=0.2, value_coef=0.1)


def ppo_inputs():
    mask, tensors = random_rows()
    advantages = torch.randn(5, 9, dtype=torch.float64)
    logprobs, old_logprobs, values, old_values = (x.float().requires_grad_(i % 2 == 0) for i, x in enumerate(tensors))
    rest = [advantages.float(), (advantages + old_values).float()]
    policy, value = PolicyTerms(logprobs, old_logprobs, rest[0], mask), ValueTerms(values, old_values, rest[1], mask)
    return policy, value, {"num_tokens": mask.sum(), "num_states": mask.sum()}


def test_ppo_loss_is_the_sum_of_its_two_terms():
    policy, value, counts = ppo_inputs()
    loss, metrics = ppo_loss(policy, value, PPO, **counts)
    n = counts["num_tokens"]
    policy_loss, _ = ppo_policy_loss(*policy, clip_range=0.2, dual_clip=3.0, num_tokens=n)
    value_loss, _ = ppo_value_loss(*value, clip_range=0.2, num_tokens=n)
    torch.testing.assert_close(loss, policy_loss + 0.1 * value_loss)
    assert {"policy/ratio", "policy/clip_fraction", "value/loss"} <= set(metrics)


@pytest.mark.interpreter
def test_the_fused_ppo_loss_and_its_metrics_equal_the_definition():
    results = []
    for kernels in ("torch", "triton"):
        set_kernels(kernels)
        policy, value, counts = ppo_inputs()
        loss, metrics = ppo_loss(policy, value, PPO, **counts)
        loss.backward()
        means = {name: value.mean() for name, value in sorted(metrics.items())}
        results.append((loss.detach(), policy.logprobs.grad, value.values.grad, means))
    set_kernels("auto")
    torch.testing.assert_close(results[1], results[0])


# ---- laws


def every_loss():
    """name -> loss(rows): each loss as a function of the rows that a micro-batch takes."""
    mask, (logprobs, old, third, fourth) = random_rows(B=6, seed=1)
    logprobs.requires_grad_()
    scores, weights, margins = torch.rand(3, 6, dtype=torch.float64)
    scores.requires_grad_()
    ties = torch.tensor([0, 1, 0, 0, 0, 1], dtype=torch.bool)
    n = mask.sum()
    clip = {"clip_range": 0.2, "num_tokens": n}
    pairs = {"center_coef": 0.01, "num_groups": 6}
    return {
        "sft": (logprobs, lambda i: sft_loss(logprobs[i], mask[i], num_tokens=n)),
        "policy": (logprobs, lambda i: ppo_policy_loss(logprobs[i], old[i], third[i], mask[i], dual_clip=None, **clip)),
        "value": (logprobs, lambda i: ppo_value_loss(logprobs[i], old[i], fourth[i], mask[i], **clip)),
        "reward": (scores, lambda i: reward_loss(scores[i], margins[i], weights[i], margins[i], ties[i], **pairs)),
        "pointwise": (scores, lambda i: pointwise_reward_loss(scores[i], weights[i], **pairs)),
    }


@pytest.mark.parametrize("name", list(every_loss()))
def test_law_1_micro_batches_add_up_to_the_whole_batch(name):
    x, loss = every_loss()[name]
    whole = loss(torch.arange(6))[0]
    whole.backward()
    expected, x.grad = x.grad, None
    parts = [loss(torch.arange(6)[a:b])[0] for a, b in ((0, 1), (1, 4), (4, 6))]  # unequal sizes and lengths
    sum(parts).backward()
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("name", ["sft", "policy", "value"])
def test_nothing_off_the_mask_reaches_a_loss_or_its_gradient(name):
    mask, tensors = random_rows()
    logprobs, old, third, fourth = (torch.where(mask, x, torch.inf) for x in tensors)
    logprobs.requires_grad_()
    loss = {
        "sft": lambda: sft_loss(logprobs, mask, num_tokens=1),
        "policy": lambda: ppo_policy_loss(logprobs, old, third, mask, clip_range=0.2, dual_clip=None, num_tokens=1),
        "value": lambda: ppo_value_loss(logprobs, old, fourth, mask, clip_range=0.2, num_tokens=1),
    }[name]()[0]
    loss.backward()
    assert loss.isfinite()
    assert logprobs.grad.isfinite().all()
    assert (logprobs.grad[~mask] == 0).all()


@pytest.mark.parametrize("name", list(every_loss()))
def test_gradients_are_those_of_finite_differences(name):
    x, loss = every_loss()[name]
    loss(torch.arange(6))[0].backward()
    with torch.no_grad():
        for index in [tuple(i) for i in (x.grad != 0).nonzero().tolist()][:4]:
            x[index] += 1e-6
            up = loss(torch.arange(6))[0].item()
            x[index] -= 2e-6
            down = loss(torch.arange(6))[0].item()
            x[index] += 1e-6
            assert (up - down) / 2e-6 == pytest.approx(x.grad[index].item(), abs=1e-6)


def test_masks_that_are_not_bool_or_of_another_shape_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="must be bool"):
        sft_loss(x, torch.ones(2, 3), num_tokens=1)
    with pytest.raises(ValueError, match="bool mask like x"):
        whiten(x, torch.ones(2, 4, dtype=torch.bool), one_rank, shift_mean=True)


def test_the_policy_is_counted_in_tokens_and_the_value_in_states():
    """score_position=after_eos: a state more than tokens."""
    tokens, states = torch.tensor([[True, True, False]]), torch.tensor([[True, True, True]])
    x, policy = torch.tensor([[0.1, -0.2, 0.3]]), torch.zeros(1, 3)
    clips = Clips(policy=0.2, dual=None, value=None, value_coef=0.5)
    policy, value = PolicyTerms(policy, policy, x, tokens), ValueTerms(x, x, x + 1, states)
    loss, _ = ppo_loss(policy, value, clips, num_tokens=2, num_states=3)
    assert loss.item() == pytest.approx(-(0.1 - 0.2) / 2 + 0.5 * 0.5 * 3 / 3)
