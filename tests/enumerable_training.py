"""The loops of train_ppo.py and train_dpo.py on the enumerable task, with a table in place of every network.

Both call `on_step(step, policy)` before the first step and after every step; experiments/exact_optimum.py draws so.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from advantages import estimate_advantages, importance_weights, kl_estimate, kl_loss, whiten
from losses import (
    POLICY_LOSSES,
    aggregation,
    dpo_loss,
    ipo_loss,
    plackett_luce_loss,
    ppo_value_loss,
    token_rewards,
)
from tests.enumerable_task import COMPLETIONS, NUM_STATES, TabularPolicy, make_task, mask_of, reward_of, states

PPO_STEPS, BATCH = 400, 512
DPO_STEPS, DPO_LEARNING_RATE = 1000, 1.0
OnStep = Callable[[int, TabularPolicy], None]


def train_ppo(
    seed: int, *, kl_coef: float, kind="gae", kl_in="reward", kl_estimator="k2", samples_per_prompt=1, score=None,
    policy_loss="clip", clip_range=0.2, clip_range_high=None, aggregate="token", gaps=False, updates=4, steps=PPO_STEPS,
    teacher: TabularPolicy | None = None, stale=0, correction: str | None = "sequence_truncate", max_weight=2.0,
    on_step: OnStep = lambda step, policy: None,
) -> TabularPolicy:  # fmt: skip
    """train_ppo.py's order of events; the task's reward goes through score(scores, completions) first.

    teacher: what the KL is counted from in place of the policy's beginning. stale: the rollouts are those of the policy
    so many steps ago, corrected as off_policy says (None: ratios are counted from the sampler).
    """
    logits, rewards_of_all = make_task(seed)
    policy, reference = TabularPolicy(logits), teacher or TabularPolicy(logits)
    samplers = [copy.deepcopy(policy)] * (stale + 1)
    value_table = torch.nn.Parameter(torch.zeros(NUM_STATES))
    optimizer = torch.optim.Adam([{"params": policy.parameters()}, {"params": [value_table]}], lr=0.05, eps=1e-5)
    generator = torch.Generator().manual_seed(seed)
    clip = {"clip_range": clip_range, "clip_range_high": clip_range_high}
    clip |= {"dual_clip": None} if policy_loss == "clip" else {}
    on_step(0, policy)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / steps)
        with torch.no_grad():
            sampler = samplers[0] if stale else policy
            completions = sampler.sample(BATCH, generator)
            old_logprobs, ref_logprobs = policy.logprobs(completions), reference.logprobs(completions)
            old_values = value_table[states(completions)]
        mask = mask_of(completions)
        scores = reward_of(completions, rewards_of_all)
        scores = scores if score is None else score(scores, completions)
        kl = kl_estimate(old_logprobs - ref_logprobs, "k1")
        rewards = token_rewards(scores, kl, mask, mask, kl_coef=kl_coef if kl_in == "reward" else 0.0)
        inputs = (rewards, old_values, mask, mask)
        settings = {"gamma": 1.0, "gae_lambda": 0.95, "samples_per_prompt": samples_per_prompt}
        settings |= {"penalty": kl_coef * kl}
        advantages = estimate_advantages(*(map(widen, inputs) if gaps else inputs), kind=kind, **settings)
        advantages = advantages[:, ::2] if gaps else advantages
        returns = advantages + old_values
        if kind == "gae" and kl_in == "reward":
            advantages = whiten(advantages, mask, lambda x: x, shift_mean=True)
        if stale:
            with torch.no_grad():
                sampled = sampler.logprobs(completions)
            if correction is None:
                old_logprobs = sampled
            else:
                limits = {"correction": correction, "max_weight": max_weight}
                advantages = advantages * importance_weights(old_logprobs, sampled, mask, **limits)
        weights, counts = aggregation(mask, aggregate, max_new_tokens=3)
        for rows in torch.randperm(BATCH, generator=generator).split(BATCH // updates):
            logprobs = policy.logprobs(completions[rows])
            m, old, weight, num_tokens = mask[rows], old_logprobs[rows], weights[rows], counts[rows].sum()
            loss, _ = POLICY_LOSSES[policy_loss](
                logprobs, old, weight * advantages[rows], m, num_tokens=num_tokens, **clip
            )
            values = value_table[states(completions[rows])]
            value = {"clip_range": 0.2, "num_tokens": m.sum()}
            loss = loss + ppo_value_loss(values, old_values[rows], returns[rows], m, **value)[0]
            if kl_in == "loss":
                loss = loss + kl_coef * kl_loss(logprobs, ref_logprobs[rows], m, kl_estimator, weight) / num_tokens
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        samplers = [*samplers[1:], copy.deepcopy(policy)] if stale else samplers
        on_step(step + 1, policy)
    return policy


def widen(x: Tensor) -> Tensor:
    """(B, 5) from (B, 3): a column of something else between two tokens."""
    wide = torch.full((len(x), 5), 9 if x.dtype != torch.bool else 0, dtype=x.dtype)
    wide[:, ::2] = x
    return wide


def train_dpo(
    seed: int, *, beta: float, loss="dpo", K=2, elements=8192, scale=1.0, on_step: OnStep = lambda step, policy: None
) -> TabularPolicy:
    """train_dpo.py's order of events; a judge, whose rewards are the task's times `scale`, ranks fresh answers."""
    logits, rewards = make_task(seed)
    policy, reference = TabularPolicy(logits), TabularPolicy(logits)
    ref_logprobs = reference.logprobs(COMPLETIONS).sum(1).detach()  # (156,)
    optimizer = torch.optim.Adam(policy.parameters(), lr=DPO_LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    on_step(0, policy)
    for step in range(DPO_STEPS):
        optimizer.param_groups[0]["lr"] = DPO_LEARNING_RATE * (1 - step / DPO_STEPS)
        rows = torch.randint(len(COMPLETIONS), (elements, K), generator=generator)
        # sorting rewards with Gumbel noise draws from Plackett-Luce; K = 2 is Bradley-Terry
        gumbel = -torch.empty(elements, K).exponential_(generator=generator).log()
        rows = rows.gather(1, (scale * rewards[rows] + gumbel).argsort(1, descending=True))  # best first
        logprobs = policy.logprobs(COMPLETIONS).sum(1)[rows]  # (elements, K)
        optimizer.zero_grad()
        ranking_loss(loss, logprobs, ref_logprobs[rows], beta).backward()
        optimizer.step()
        on_step(step + 1, policy)
    return policy


def ranking_loss(name: str, logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> Tensor:
    """() the loss of (elements, K) rankings, best first: dpo or ipo for K = 2, else Plackett-Luce."""
    elements, K = logprobs.shape
    if K == 2:
        pair = (*logprobs.unbind(1), *ref_logprobs.unbind(1))
        return ipo_loss(*pair, beta=beta)[0] if name == "ipo" else dpo_loss(*pair, beta=beta, label_smoothing=0.0)[0]
    prompts, ranks = torch.arange(elements).repeat_interleave(K), torch.arange(K).repeat(elements)
    return plackett_luce_loss(logprobs.flatten(), ref_logprobs.flatten(), prompts, ranks, beta=beta)[0]
