"""Law 9: DPO on Bradley-Terry preferences of the enumerable task ends at the optimum computed in closed form."""

import pytest
import torch

from losses import dpo_loss, plackett_luce_loss
from tests.enumerable_task import COMPLETIONS, TabularPolicy, kl_to, make_task, optimum

NUM_STEPS, LEARNING_RATE = 1000, 1.0


def train_tabular(seed, *, beta, K=2, elements=8192, scale=1.0):
    """train_dpo.py's order of events with a table in place of the network; a judge ranks fresh answers every step."""
    logits, rewards = make_task(seed)
    policy, reference = TabularPolicy(logits), TabularPolicy(logits)
    ref_logprobs = reference.logprobs(COMPLETIONS).sum(1).detach()  # (216,)
    optimizer = torch.optim.Adam(policy.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    for step in range(NUM_STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / NUM_STEPS)
        rows = torch.randint(len(COMPLETIONS), (elements, K), generator=generator)
        # sorting rewards with Gumbel noise draws from Plackett-Luce; K = 2 is Bradley-Terry
        gumbel = -torch.empty(elements, K).exponential_(generator=generator).log()
        rows = rows.gather(1, (scale * rewards[rows] + gumbel).argsort(1, descending=True))  # best first
        logprobs = policy.logprobs(COMPLETIONS).sum(1)[rows]  # (elements, K)
        loss = ranking_loss(logprobs, ref_logprobs[rows], beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return kl_to(policy, optimum(reference, rewards, beta))


def ranking_loss(logprobs, ref_logprobs, beta):
    elements, K = logprobs.shape
    if K == 2:
        return dpo_loss(*logprobs.unbind(1), *ref_logprobs.unbind(1), beta=beta, label_smoothing=0.0)[0]
    prompts, ranks = torch.arange(elements).repeat_interleave(K), torch.arange(K).repeat(elements)
    return plackett_luce_loss(logprobs.flatten(), ref_logprobs.flatten(), prompts, ranks, beta=beta)[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("beta", [0.2, 0.5])
def test_dpo_ends_within_a_hundredth_of_a_nat_of_the_closed_form(beta, seed):
    assert train_tabular(seed, beta=beta) <= 0.01


def test_rankings_of_four_end_there_too():
    assert train_tabular(0, beta=1.0, K=4, elements=160) <= 0.01


def test_preferences_of_a_judge_on_another_scale_miss_the_optimum():
    """The bound tells Bradley-Terry labels from labels that are sharper by a quarter."""
    assert train_tabular(0, beta=0.5, scale=1.25) > 0.01
