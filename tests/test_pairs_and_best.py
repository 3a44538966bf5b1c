"""Online DPO and RAFT as advantages, and the value model's own epochs: laws, and through the whole command."""
# ruff: noqa: F811 - fixtures of another test file

import pytest
import torch

from advantages import importance_weights, online_dpo, raft
from losses import aggregation, dpo_loss, ppo_policy_loss, sft_loss
from model.build import load_policy, load_value_model
from tests.test_ppo_values import column, samples_of, stopping  # noqa: F401 - fixtures
from tests.test_train_ppo import inputs, ppo  # noqa: F401 - fixtures

K, BETA = 3, 0.3
PAIRS = ["advantage=online_dpo", "samples_per_prompt=2", "ppo_epochs=1", "minibatch_size=16"]
MASK = torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 5])[:, None]  # two prompts, three samples each


def rollout(seed=0):
    """(B, T) log-probs, reference log-probs and scores on the last tokens."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, ref = (-torch.rand(6, 5, generator=generator).double() * MASK for _ in range(2))
    scores = torch.tensor([1.0, -2.0, 0.5, 3.0, 3.5, 3.0]).double()
    ends = torch.arange(5) == MASK.sum(1, keepdim=True) - 1
    return logprobs.requires_grad_(), ref, scores, torch.where(ends, scores[:, None], 0.0)


def surrogate(logprobs, advantages):
    weights, counts = aggregation(MASK, "sequence_sum", max_new_tokens=5)
    clip = {"clip_range": 0.2, "dual_clip": None, "num_tokens": counts.sum()}
    return ppo_policy_loss(logprobs, logprobs.detach(), weights * advantages, MASK, **clip)[0]


def test_online_dpo_has_dpos_gradient_on_the_best_and_the_worst():
    logprobs, ref, scores, paid = rollout()
    penalty = BETA * (logprobs - ref).detach()
    advantages = online_dpo(paid - penalty, MASK, penalty, samples_per_prompt=K)
    (found,) = torch.autograd.grad(surrogate(logprobs, advantages), logprobs)
    best, worst = [0, 4], [1, 3]  # of 3.0 and 3.0 the first
    sums, refs = logprobs.sum(1), ref.sum(1)
    loss, _ = dpo_loss(sums[best], sums[worst], refs[best], refs[worst], beta=BETA, label_smoothing=0.0)
    (expected,) = torch.autograd.grad(loss, logprobs)
    assert torch.allclose(found * BETA * K * 5, expected * MASK)  # over K rows of 5 tokens each, for every pair


def test_online_dpo_ranks_by_the_score_even_where_the_penalty_is_larger():
    """The better sample by the score is 6 nats further from the reference, so its margin is 6."""
    score, penalty = torch.tensor([[1.0], [2.0]]), torch.tensor([[-3.0], [3.0]])
    found = online_dpo(score - penalty, torch.ones(2, 1, dtype=torch.bool), penalty, samples_per_prompt=2)
    torch.testing.assert_close(found, torch.sigmoid(torch.tensor(-6.0)) * torch.tensor([[-1.0], [1.0]]))


def test_raft_has_the_gradient_of_sft_on_the_best():
    logprobs, _, _, paid = rollout()
    advantages = raft(paid, MASK, samples_per_prompt=K)
    (found,) = torch.autograd.grad(surrogate(logprobs, advantages), logprobs)
    best = torch.tensor([0, 4])
    loss, _ = sft_loss(logprobs[best], MASK[best], num_tokens=30)
    (expected,) = torch.autograd.grad(loss, logprobs)
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("left_out", [0, 4])
def test_a_group_without_a_difference_teaches_nothing_and_a_row_left_out_is_neither_best_nor_worst(left_out):
    mask = MASK.clone()
    mask[left_out] = False
    _, _, _, paid = rollout()
    paid = torch.where(mask, paid, 0.0)
    for advantages in (
        raft(paid, mask, samples_per_prompt=K),
        online_dpo(paid, mask, torch.zeros_like(paid), samples_per_prompt=K),
    ):
        assert not advantages[left_out].any() and advantages.isfinite().all()
        assert advantages[3:].any() == (left_out == 0)  # the second prompt's others are both paid 3


@pytest.mark.parametrize("kind", ["raft", "online_dpo"])
def test_the_best_and_the_worst_are_chosen_by_what_was_paid(ppo, inputs, stopping, tmp_path, read_metrics, kind):
    words = [stopping, f"reward={inputs}/rewards.py:length", "reward_model=null", "missing_eos=none", "num_samples=16"]
    words += [f"advantage={kind}", "samples_per_prompt=2", "num_steps=2", "ppo_epochs=1", "minibatch_size=16"]
    words += [f"kl_coef={0.1 if kind == 'online_dpo' else 0}", "aggregation=sequence_sum"]
    assert ppo(*words) == 0
    for step in (1, 2):
        rows, seen = samples_of(tmp_path / "run", step), 0
        for one, other in zip(rows[::2], rows[1::2], strict=True):
            difference = one["score"] - other["score"]
            a, b = ({*column(row, "advantage").tolist()} for row in (one, other))
            assert len(a) == len(b) == 1
            (a,), (b,) = a, b
            if not difference:
                assert a == b == 0
                continue
            seen += 1
            best, worst = (a, b) if difference > 0 else (b, a)
            if kind == "raft":
                assert (best, worst) == (1, 0)
            else:
                margin = 0.1 * (one["kl"] - other["kl"]) * (1 if difference > 0 else -1)
                assert best == -worst == pytest.approx(torch.sigmoid(torch.tensor(-margin)).item(), abs=1e-4)
        assert seen


def test_the_value_model_may_have_epochs_and_minibatches_of_its_own(ppo, tmp_path, read_metrics):
    """The policy's update is the same, the value model's is another."""
    words = ["num_steps=1", "optim.value_lr=1e-2", "sampling.max_new_tokens=4"]
    for name, more in {
        "beside": [],
        "one": ["value_epochs=1", "value_minibatch_size=8"],
        "four": ["value_epochs=4"],
    }.items():
        assert ppo(*words, *more, "export_value_model=true", run=name) == 0
    rows = {name: read_metrics(tmp_path / name)[0] for name in ("beside", "one", "four")}
    policies = {name: load_policy(tmp_path / name / "model").lm_head.weight for name in rows}
    values = {name: load_value_model(tmp_path / name / "value_model", precision="fp32").head.weight for name in rows}
    assert all(torch.equal(policies["beside"], policy) for policy in policies.values())
    moved = {name: (value - values["beside"]).abs().max() for name, value in values.items()}
    assert moved["one"] > 1e-4 and moved["four"] > 1e-4 and not torch.equal(values["one"], values["four"])
    assert rows["four"]["value/loss"] < rows["one"]["value/loss"]  # the mean over passes, of which the later fit better
    assert rows["beside"]["policy/staleness"] == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["advantage=online_dpo"], "samples_per_prompt to 2 or more"),
        ([*PAIRS[:2]], "one step per rollout, beta = kl_coef; set ppo_epochs=1 minibatch_size=16"),
        ([*PAIRS, "kl_coef=0"], "kl_coef > 0"),
        (["value_epochs=0"], "value_epochs=0 must be a whole number of at least 1"),
        (["value_epochs=1", "value_minibatch_size=3"], "value_minibatch_size=3 is not a multiple"),
        (["value_minibatch_size=4"], "value_minibatch_size belongs to value_epochs"),
        (["advantage=reinforce_pp", "value_epochs=1"], "value_epochs=1: advantage=reinforce_pp has no value model"),
        (["off_policy.correction=token"], "off_policy.correction='token' is unknown"),
        (["off_policy.old_logprobs=server"], "off_policy.old_logprobs='server' is unknown"),
        (["off_policy.max_weight=0"], "off_policy.max_weight=0 must be a number above 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(ppo, capsys, words, message):
    assert ppo(*words) == 2
    assert message in capsys.readouterr().err


def test_an_older_policys_samples_are_weighed_and_their_age_is_logged():
    """correct_for_sampler on a rollout of two steps ago."""
    from omegaconf import OmegaConf

    from rollouts.engine import correct_for_sampler
    from rollouts.trajectory import Episode, make_trajectory

    long = Episode({}, ids=[7, 8, 9], turns=[-1, 0, 0], logprobs=[0.0, -1.0, -2.0], finished=True)
    short = Episode({}, ids=[7, 8], turns=[-1, 0], logprobs=[0.0, -0.5], finished=True)
    device = torch.device("cpu")
    made = make_trajectory([long, short], [{}, {}], pad_id=0, device=device, score_position="eos", max_new_tokens=2)
    now = torch.tensor([[0.0, -0.5, -2.0], [0.0, -1.5, 0.0]])
    advantages = torch.where(made.action_mask, 2.0, 0.0)
    given = {"correction": "sequence_truncate", "max_weight": 1.2}
    for kind, stale, old, expected in [
        ("local", 0, "trainer", (advantages, now)),
        ("local", 2, "trainer", (advantages * torch.tensor([[1.2], [0.36788]]), now)),
        ("vllm", 0, "trainer", (advantages * torch.tensor([[1.2], [0.36788]]), now)),
        ("local", 2, "sampler", (advantages, made.sampler_logprobs)),
    ]:
        off_policy = OmegaConf.create(given | {"old_logprobs": old})
        made.step = 5 - stale
        weighed, logprobs, figures = correct_for_sampler(
            advantages, now, made, off_policy, step=5, own_sampler=kind == "local"
        )
        assert torch.allclose(weighed, expected[0], atol=1e-4) and torch.equal(logprobs, expected[1])
        assert figures["policy/staleness"] == stale
    assert importance_weights(now, now, made.action_mask, correction="token_mask", max_weight=1.0).sum() == 3
