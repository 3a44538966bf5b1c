"""Law 9: on an enumerable task the PPO loop's own functions end at the optimum computed in closed form."""

import pytest

from tests.enumerable_task import TabularPolicy, kl_to, make_task, optimum
from tests.enumerable_training import train_ppo


def distance(seed: int, *, kl_coef: float, **settings) -> float:
    """Nats from the trained policy to the optimum."""
    logits, rewards = make_task(seed)
    policy = train_ppo(seed, kl_coef=kl_coef, **settings)
    return kl_to(policy, optimum(TabularPolicy(logits), rewards, kl_coef))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kl_coef, bound", [(0.2, 0.01), (0.5, 0.002)])
def test_ppo_ends_within_a_hundredth_of_a_nat_of_the_closed_form(kl_coef, bound, seed):
    assert distance(seed, kl_coef=kl_coef) <= bound


FAMILY: dict[str, dict] = {
    "rloo": {"kind": "rloo"},
    "grpo, a mean of sequences": {"kind": "grpo", "aggregate": "sequence_mean"},
    "dr_grpo": {"kind": "dr_grpo", "aggregate": "sequence_sum"},
    "dapo": {"kind": "grpo", "clip_range_high": 0.28},
    "gspo": {"kind": "grpo", "policy_loss": "gspo", "aggregate": "sequence_mean", "clip_range": 0.1},
    "cispo": {"kind": "grpo", "policy_loss": "cispo", "clip_range": 1.0, "clip_range_high": 2.0},
    "reinforce_pp": {"kind": "reinforce_pp"},
}


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FAMILY)
def test_with_the_kl_in_the_reward_every_kind_ends_there(name, seed):
    settings = {"samples_per_prompt": 1 if name == "reinforce_pp" else 4} | FAMILY[name]
    assert distance(seed, kl_coef=0.5, **settings) <= 0.002


def test_grpo_as_published_ends_elsewhere():
    """The KL (k3) in the loss and a mean over sequences of means over tokens: 0.31 to 0.45 nats on three seeds."""
    published = {"kind": "grpo", "kl_in": "loss", "kl_estimator": "k3", "aggregate": "sequence_mean"}
    assert distance(0, kl_coef=0.5, samples_per_prompt=4, **published) > 0.2


def test_an_observation_between_tokens_moves_no_optimum():
    """Each token a turn, something that an environment says between them: the values of the turns follow each other."""
    assert distance(0, kl_coef=0.5, gaps=True) <= 0.002


def test_the_reference_itself_is_far_from_the_optimum():
    logits, rewards = make_task(0)
    reference = TabularPolicy(logits)
    assert kl_to(reference, optimum(reference, rewards, 0.5)) > 0.5


def test_a_kl_penalty_in_the_loss_has_another_optimum():
    """It charges each state its own KL, but not for leading to states of more KL (docs/ppo.md)."""
    assert distance(0, kl_coef=0.5, kl_in="loss") > 0.05


def test_a_score_on_the_wrong_scale_misses_the_optimum():
    """The bound tells a right loop from a loop that is off by a tenth."""
    assert distance(0, kl_coef=0.5, score=lambda scores, completions: 1.1 * scores) > 0.008
