"""Law 9: on an enumerable task the PPO loop's own functions end at the optimum computed in closed form."""

import pytest
import torch

from advantages import estimate_advantages, kl_estimate, whiten
from losses import ppo_policy_loss, ppo_value_loss, token_rewards
from tests.enumerable_task import NUM_STATES, TabularPolicy, kl_to, make_task, optimum, reward_of, states

NUM_STEPS, BATCH = 400, 512


def train_tabular(seed, *, kl_coef, kind="gae", kl_in="reward", samples_per_prompt=1, score=lambda s: s):
    """train_ppo.py's order of events with a table in place of the networks."""
    logits, rewards_of_all = make_task(seed)
    policy, reference = TabularPolicy(logits), TabularPolicy(logits)
    value_table = torch.nn.Parameter(torch.zeros(NUM_STATES))
    optimizer = torch.optim.Adam([{"params": policy.parameters()}, {"params": [value_table]}], lr=0.05, eps=1e-5)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(BATCH, 3, dtype=torch.bool)
    clip = {"clip_range": 0.2, "num_tokens": BATCH * 3 / 4}
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / NUM_STEPS)
        with torch.no_grad():
            completions = policy.sample(BATCH, generator)
            old_logprobs, ref_logprobs = policy.logprobs(completions), reference.logprobs(completions)
            old_values = value_table[states(completions)]
        scores = score(reward_of(completions, rewards_of_all))
        kl = kl_estimate(old_logprobs - ref_logprobs, "k1")
        rewards = token_rewards(scores, kl, mask, mask, kl_coef=kl_coef if kl_in == "reward" else 0.0)
        advantages = estimate_advantages(
            rewards,
            old_values,
            mask,
            mask,
            kind=kind,
            gamma=1.0,
            gae_lambda=0.95,
            samples_per_prompt=samples_per_prompt,
        )
        returns = advantages + old_values
        if kl_in == "reward":
            advantages = whiten(advantages, mask, lambda x: x, shift_mean=True)
        for rows in torch.randperm(BATCH, generator=generator).split(BATCH // 4):
            logprobs = policy.logprobs(completions[rows])
            m, old = mask[rows], old_logprobs[rows]
            loss, _ = ppo_policy_loss(logprobs, old, advantages[rows], m, dual_clip=None, **clip)
            values = value_table[states(completions[rows])]
            loss = loss + ppo_value_loss(values, old_values[rows], returns[rows], m, **clip)[0]
            if kl_in == "loss":
                penalty = kl_estimate(logprobs - ref_logprobs[rows], "k2")
                loss = loss + kl_coef * penalty.sum() / clip["num_tokens"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return kl_to(policy, optimum(reference, rewards_of_all, kl_coef))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kl_coef, bound", [(0.1, 0.01), (0.5, 0.002)])
def test_ppo_ends_within_a_hundredth_of_a_nat_of_the_closed_form(kl_coef, bound, seed):
    assert train_tabular(seed, kl_coef=kl_coef) <= bound


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_group_baselines_end_there_too(kind):
    assert train_tabular(0, kl_coef=0.5, kind=kind, samples_per_prompt=4) <= 0.002


def test_the_reference_itself_is_far_from_the_optimum():
    logits, rewards = make_task(0)
    reference = TabularPolicy(logits)
    assert kl_to(reference, optimum(reference, rewards, 0.5)) > 0.5


def test_a_kl_penalty_in_the_loss_has_another_optimum():
    """It charges each state its own KL, but not for leading to states of more KL (docs/ppo.md)."""
    assert train_tabular(0, kl_coef=0.5, kl_in="loss") > 0.05


def test_a_score_on_the_wrong_scale_misses_the_optimum():
    """The bound tells a right loop from a loop that is off by a tenth."""
    assert train_tabular(0, kl_coef=0.5, score=lambda s: 1.1 * s) > 0.01
