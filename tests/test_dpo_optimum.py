"""Law 9: preference losses on Bradley-Terry labels of the enumerable task end at the optimum in closed form."""

import pytest

from tests.enumerable_task import TabularPolicy, ipo_optimum, kl_to, make_task, optimum
from tests.enumerable_training import train_dpo


def distance(seed: int, *, beta: float, **settings) -> float:
    """Nats from the trained policy to the optimum."""
    logits, rewards = make_task(seed)
    return kl_to(train_dpo(seed, beta=beta, **settings), optimum(TabularPolicy(logits), rewards, beta))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("beta", [0.2, 0.5])
def test_dpo_ends_within_a_hundredth_of_a_nat_of_the_closed_form(beta, seed):
    assert distance(seed, beta=beta) <= 0.01


@pytest.mark.slow
def test_rankings_of_four_end_there_too():
    assert distance(0, beta=1.0, K=4, elements=160) <= 0.01


def test_ipo_ends_at_an_optimum_of_its_own():
    """Its reward is the probability to win against a random answer, not Bradley-Terry's log-odds (Azar et al. 2023)."""
    logits, rewards = make_task(0)
    policy, reference = train_dpo(0, beta=0.2, loss="ipo"), TabularPolicy(logits)
    assert kl_to(policy, ipo_optimum(reference, rewards, 0.2)) <= 0.01
    assert kl_to(policy, optimum(reference, rewards, 0.2)) > 0.1


def test_preferences_of_a_judge_on_another_scale_miss_the_optimum():
    """The bound tells Bradley-Terry labels from labels that are sharper by a quarter."""
    assert distance(0, beta=0.5, scale=1.25) > 0.01
