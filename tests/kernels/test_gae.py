"""Advantages: the scan against the loop in float64, and what the definition promises."""

import pytest
import torch

from kernels.backend import interpreting
from kernels.gae import gae, gae_ref, gae_triton

if interpreting():
    from bench.kernels.interpreter import repair

    repair()

SHAPES = [(1, 1), (3, 7), (4, 128), (5, 129), (2, 2500)]  # odd sizes catch masking bugs; 2,500 takes several blocks


def rollout(B, T, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(B, T, generator=generator).to(dtype) for _ in range(2))
    start = torch.randint(0, T, (B, 1), generator=generator)
    mask = torch.arange(T) >= start  # prompt, then completion
    mask[:, T - T // 4 :] = False  # then padding
    return rewards, values, mask


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, T", SHAPES)
@pytest.mark.parametrize("gamma, gae_lambda", [(0.99, 0.95), (1.0, 1.0), (0.5, 0.0)])
def test_the_scan_is_as_exact_as_the_loop(B, T, dtype, gamma, gae_lambda):
    rewards, values, mask = rollout(B, T, dtype)
    truth = gae_ref(rewards.double(), values.double(), mask, gamma, gae_lambda)
    allowed = (gae_ref(rewards, values, mask, gamma, gae_lambda) - truth).abs().max() + 1e-6 * (1 + truth.abs().max())
    error = (gae_triton(rewards, values, mask, gamma, gae_lambda) - truth).abs().max()
    assert error <= 2 * allowed, f"kernel error {error:.2e}, the loop's {allowed:.2e}"


@pytest.mark.interpreter
@pytest.mark.parametrize("T", [7, 1500])
def test_the_scan_goes_over_gaps_and_ends_where_an_episode_is_done(T):
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 3, T, generator=generator)
    mask = torch.rand(3, T, generator=generator) > 0.4
    mask[2, T // 3 : T // 3 + T // 2] = False  # a gap that hides whole blocks
    done = mask & (torch.rand(3, T, generator=generator) > 0.8)
    lambdas = torch.tensor([0.9, 0.5, 1.0])
    for ends in (None, done):
        scanned = gae_triton(rewards, values, mask, 0.99, lambdas, ends)
        torch.testing.assert_close(scanned, gae_ref(rewards, values, mask, 0.99, lambdas, ends), rtol=1e-4, atol=1e-4)


def test_a_reward_of_the_last_turn_reaches_the_first_one():
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1]], dtype=torch.bool)
    rewards, values = torch.zeros(1, 7), torch.full((1, 7), 0.25)
    rewards[0, 6] = 1.0
    whole = gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    assert whole.tolist() == [[0, 0.75, 0.75, 0, 0, 0.75, 0.75]]
    done = torch.zeros_like(mask)
    done[0, 2] = done[0, 6] = True  # two episodes in a row
    apart = gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0, done=done)
    assert apart.tolist() == [[0, -0.25, -0.25, 0, 0, 0.75, 0.75]]
    one_step = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.0)  # the next value is that of the next turn
    assert one_step[0, 2].item() == pytest.approx(0.5 * 0.25 - 0.25)


@pytest.mark.interpreter
def test_the_scan_reads_nothing_off_mask_and_takes_no_rows():
    rewards, values, mask = rollout(5, 129)
    clean = gae_triton(rewards, values, mask, 0.99, 0.95)
    dirty = [x.masked_fill(~mask, float(bad)) for x, bad in ((rewards, "nan"), (values, "inf"))]
    assert torch.equal(gae_triton(*dirty, mask, 0.99, 0.95), clean)
    assert gae_triton(rewards[:0], values[:0], mask[:0], 0.99, 0.95).shape == (0, 129)


def test_gae_reads_nothing_off_mask():
    rewards, values, mask = rollout(5, 129)
    clean = gae(rewards, values, mask, gamma=0.99, gae_lambda=0.95)
    dirty = [x.masked_fill(~mask, float(bad)) for x, bad in ((rewards, "nan"), (values, "inf"))]
    assert torch.equal(gae(*dirty, mask, gamma=0.99, gae_lambda=0.95), clean)
    assert not clean[~mask].any()


def test_gae_with_lambda_one_is_return_minus_value():
    rewards, values, mask = rollout(5, 129)
    returns = rewards.where(mask, 0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0), (returns - values).where(mask, 0))


def test_gae_with_lambda_zero_is_the_error_of_one_step():
    rewards, values, mask = rollout(5, 129)
    following = torch.nn.functional.pad(values.where(mask, 0)[:, 1:], (0, 1))
    expected = (rewards + 0.9 * following - values).where(mask, 0)
    torch.testing.assert_close(gae(rewards, values, mask, gamma=0.9, gae_lambda=0.0), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"values": torch.zeros(3, 6)}, r"rewards \(3, 7\), values \(3, 6\)"),
        ({"mask": torch.ones(3, 7)}, "mask must be bool"),
        ({"gamma": 1.5}, "gamma=1.5"),
    ],
)
def test_bad_input_is_named(change, message):
    rewards, values, mask = rollout(3, 7)
    inputs = {"rewards": rewards, "values": values, "mask": mask, "gamma": 1.0, "gae_lambda": 0.95}
    with pytest.raises(ValueError, match=message):
        gae(**inputs | change)


def test_gae_is_the_discounted_sum_of_errors():
    """By hand, with both discounts below 1: delta = 1 + 0.5 x 4 - 2, 2 + 0.5 x 6 - 4, 3 - 6."""
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 4.0, 6.0]])
    advantages = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.5, gae_lambda=0.8)
    last, middle, first = -3.0, 1.0 + 0.4 * -3.0, 1.0 + 0.4 * (1.0 + 0.4 * -3.0)
    assert advantages[0].tolist() == pytest.approx([first, middle, last])
