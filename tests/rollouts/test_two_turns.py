"""Two turns with an environment that answers at random, solved on paper: the loop's own functions end at the optimum.

The policy says one of 4 words, the environment answers with one of 3, the policy says another word. Each turn has its
reward, the environment pays the first before the second is sampled. The optimum is soft: with V(a, o) = beta log sum_b
ref(b | a, o) exp(r2(a, o, b) / beta), pi*(a) ~ ref(a) exp((r1(a) + E_o V(a, o)) / beta).
"""

import pytest
import torch

from advantages import estimate_advantages, kl_estimate, whiten
from losses import ppo_policy_loss, ppo_value_loss, token_rewards

WORDS, ANSWERS, BETA, STEPS, BATCH = 4, 3, 0.5, 250, 512


def make_task(seed):
    """Reference logits of both turns, the environment's chances and the rewards of both turns."""
    generator = torch.Generator().manual_seed(seed)
    ref1, ref2 = (torch.randn(*shape, generator=generator) for shape in ((WORDS,), (WORDS, ANSWERS, WORDS)))
    chances = torch.randn(WORDS, ANSWERS, generator=generator).mul(2).softmax(1)
    return (
        ref1,
        ref2,
        chances,
        *(torch.randn(*shape, generator=generator) for shape in ((WORDS,), (WORDS, ANSWERS, WORDS))),
    )


def optimum(ref1, ref2, chances, r1, r2):
    """Log-probs (A,) and (A, O, A) of the soft optimum."""
    joint = ref2.double().log_softmax(-1) + r2.double() / BETA
    value = BETA * joint.logsumexp(-1)  # (A, O)
    first = ref1.double().log_softmax(-1) + (r1 + (chances * value).sum(1)) / BETA
    return first.log_softmax(-1), joint.log_softmax(-1)


def train(task, seed, *, kind, samples_per_prompt=1):
    """train_ppo.py's order of events: columns are the first word, the observation, the second word."""
    ref1, ref2, chances, r1, r2 = task
    first, second = (torch.nn.Parameter(x.clone()) for x in (ref1, ref2))
    values1, values2 = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.zeros(WORDS, ANSWERS))
    optimizer = torch.optim.Adam([first, second, values1, values2], lr=0.05, eps=1e-5)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([True, False, True]).expand(BATCH, 3)
    done = torch.tensor([False, False, True]).expand(BATCH, 3)

    def read(one, two, a, o, b):
        columns = (one.log_softmax(-1)[a], two.log_softmax(-1)[a, o, b])
        return torch.stack([columns[0], torch.zeros(len(a)), columns[1]], 1)

    def states(a, o):
        return torch.stack([values1.expand(len(a)), torch.full((len(a),), 9.0), values2[a, o]], 1)

    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / STEPS)
        with torch.no_grad():
            a = torch.multinomial(first.softmax(-1), BATCH, replacement=True, generator=generator)
            o = torch.multinomial(chances[a], 1, generator=generator).squeeze(1)
            b = torch.multinomial(second.softmax(-1)[a, o], 1, generator=generator).squeeze(1)
            old, ref, old_values = read(first, second, a, o, b), read(ref1, ref2, a, o, b), states(a, o)
        kl = kl_estimate(old - ref, "k1")
        rewards = token_rewards(r2[a, o, b], kl, mask, mask, kl_coef=BETA)
        rewards = rewards + torch.stack([r1[a], torch.zeros(BATCH), torch.zeros(BATCH)], 1)
        settings = {"gamma": 1.0, "gae_lambda": 0.95, "samples_per_prompt": samples_per_prompt}
        advantages = estimate_advantages(rewards, old_values, mask, mask, done, kind=kind, **settings)
        returns = advantages + old_values
        advantages = whiten(advantages, mask, lambda x: x, shift_mean=True) if kind == "gae" else advantages
        for rows in torch.randperm(BATCH, generator=generator).split(BATCH // 4):
            loss, _ = ppo_policy_loss(
                read(first, second, a[rows], o[rows], b[rows]),
                old[rows],
                advantages[rows],
                mask[rows],
                clip_range=0.2,
                dual_clip=None,
                num_tokens=2 * len(rows),
            )
            value = {"clip_range": None, "num_tokens": 2 * len(rows)}
            loss = (
                loss + ppo_value_loss(states(a[rows], o[rows]), old_values[rows], returns[rows], mask[rows], **value)[0]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return first.detach().double().log_softmax(-1), second.detach().double().log_softmax(-1)


def distance(found, target, chances):
    """KL(found || target) of the whole dialogue, nats."""
    first = (found[0].exp() * (found[0] - target[0])).sum()
    second = (found[1].exp() * (found[1] - target[1])).sum(-1)
    return (first + (found[0].exp()[:, None] * chances * second).sum()).item()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind, samples", [("gae", 1), ("rloo", 4)])
def test_two_turns_end_at_the_soft_optimum(kind, samples, seed):
    task = make_task(seed)
    target = optimum(*task)
    assert distance((task[0].double().log_softmax(-1), task[1].double().log_softmax(-1)), target, task[2]) > 0.2
    found = train(task, seed, kind=kind, samples_per_prompt=samples)
    assert distance(found, target, task[2]) <= 0.003
