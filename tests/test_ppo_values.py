"""Figures of train_ppo.py worked out by hand from what a run leaves: each stands for a line of the script."""
# ruff: noqa: F811 - fixtures of another test file

import json
import math

import pytest
import torch

import train_ppo
from data.tokenizer import load_tokenizer
from model.build import export_model, load_policy
from model.packing import make_rows, pack
from tests.test_train_ppo import inputs, ppo  # noqa: F401 - fixtures

REWARDS = """
CALLS = []

def by_prompt(prompts, completions, id):
    return [1.0 if i == id[0] else float(len(c)) for i, c in zip(id, completions)]
"""


@pytest.fixture(scope="session")
def stopping(inputs):
    """The tiny policy with a stop token that is drawn about every eighth time, so that lengths differ."""
    policy, tokenizer = load_policy(inputs / "policy"), load_tokenizer(inputs / "policy")
    ids = torch.randint(5, tokenizer.vocab_size, (8, 24), generator=torch.Generator().manual_seed(0)).tolist()
    rows = make_rows([{"input_ids": row, "completion_mask": [False] + [True] * 23} for row in ids], tokenizer.pad_id)
    with torch.no_grad():
        hidden = policy.hidden_states(pack(*rows))
        mean, level = hidden.mean(0), (hidden @ policy.lm_head.weight.T).logsumexp(1).mean() - 2
        policy.lm_head.weight[tokenizer.stop_ids[0]] = level * mean / mean.square().sum()
    export_model(policy, inputs / "stopping", tokenizer)
    return f"policy={inputs}/stopping"


def samples_of(run, step=1):
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] == step]


def column(row, name):
    return torch.tensor(row[f"token_{name}"], dtype=torch.float64)


def test_the_paid_score_is_the_clipped_and_replaced_one(ppo, stopping, tmp_path):
    words = [stopping, "missing_eos_value=-7", "num_samples=8", "reward_clip=0.1", "num_steps=1"]
    assert ppo(*words, "missing_eos=replace") == 0
    kinds = set()
    for row in samples_of(tmp_path / "run"):
        kinds.add(row["finish_reason"])
        expected = max(-0.1, min(0.1, row["score"])) if row["finish_reason"] == "stop" else -7
        assert column(row, "reward").sum().item() == pytest.approx(expected, abs=1e-4)
    assert kinds == {"stop", "length"}
    assert max(abs(row["score"]) for row in samples_of(tmp_path / "run")) > 0.1  # what is logged is the raw score


def test_the_kl_in_the_loss_holds_the_policy_back(ppo, tmp_path, read_metrics):
    words = [
        "kl_in=loss",
        "kl_estimator=k2",
        "num_steps=4",
        "optim.lr=3e-3",
        "optim.schedule=constant",
        "sample_every=0",
    ]
    for kl_coef in (0, 20):
        assert ppo(*words, f"kl_coef={kl_coef}", run=str(kl_coef)) == 0
    free, held = (read_metrics(tmp_path / run)[-1]["objective/kl_exact"] for run in ("0", "20"))
    assert held < free / 2


def test_the_reference_reads_at_the_temperature_of_the_samples(ppo, tmp_path, read_metrics):
    assert ppo("sampling.temperature=0.5", "num_steps=1") == 0
    (row,) = read_metrics(tmp_path / "run")
    assert row["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert row["objective/kl_exact"] == pytest.approx(0, abs=1e-5)
    assert row["policy/ratio_first"] == pytest.approx(1, abs=1e-5)


HELD_STILL = ["ppo_epochs=3", "value_clip_range=null", "whiten_advantages=false", "num_samples=8", "optim.lr=1e-2"]


def value_loss_if_the_values_stay(run, step=1):
    """(V - returns)^2 / 2 with V = old_values is half the squared advantage, in every epoch."""
    advantages = torch.cat([column(row, "advantage") for row in samples_of(run, step)])
    return advantages.square().mean().item() / 2


def test_the_value_model_learns_at_its_own_rate(ppo, tmp_path, read_metrics):
    assert ppo(*HELD_STILL, "optim.value_lr=1e-12", "num_steps=1", run="still") == 0
    assert ppo(*HELD_STILL, "optim.value_lr=1e-2", "num_steps=1", run="fast") == 0
    still, fast = (read_metrics(tmp_path / run)[0]["value/loss"] for run in ("still", "fast"))
    assert still == pytest.approx(value_loss_if_the_values_stay(tmp_path / "still"), rel=1e-4)
    assert abs(fast - still) > 0.1 * still


def test_new_settings_rule_after_resume_anyway(ppo, tmp_path, read_metrics):
    words = [*HELD_STILL, "optim.schedule=constant", "save_every=1", "num_steps=1"]
    assert ppo(*words, "kl_coef=0.05", "optim.value_lr=1e-3") == 0
    more = ["resume=true", "resume_anyway=true", "num_steps=2", "kl_coef=0.5", "optim.value_lr=1e-12"]
    assert ppo(*words, *more) == 0
    before, after = read_metrics(tmp_path / "run")
    assert [row["objective/kl_coef"] for row in (before, after)] == pytest.approx([0.05, 0.5])
    assert after["value/loss"] == pytest.approx(value_loss_if_the_values_stay(tmp_path / "run", 2), rel=1e-4)


def test_an_adaptive_coefficient_goes_on_after_resume_anyway(ppo, tmp_path, read_metrics):
    words = ["kl_controller=adaptive", "optim.schedule=constant", "save_every=1", "sample_every=0"]
    assert ppo(*words) == 0
    assert ppo(*words, "resume=true", "resume_anyway=true", "num_steps=3", "clip_range=0.1") == 0
    rows = read_metrics(tmp_path / "run")
    for row, after in zip(rows, rows[1:], strict=False):
        error = max(-0.2, min(0.2, row["objective/kl"] / 6 - 1))
        assert after["objective/kl_coef"] == pytest.approx(row["objective/kl_coef"] * (1 + error / 5), rel=1e-6)


def test_the_controller_counts_completions(ppo, tmp_path, read_metrics):
    words = ["kl_controller=adaptive", "kl_horizon=100", "samples_per_prompt=2", "sample_every=0"]
    assert ppo(*words) == 0
    first, second = read_metrics(tmp_path / "run")
    error = max(-0.2, min(0.2, first["objective/kl"] / 6 - 1))
    assert second["objective/kl_coef"] == pytest.approx(0.05 * (1 + error * 16 / 100), rel=1e-6)


def to_go(rewards):
    return rewards.flip(0).cumsum(0).flip(0)


def test_whitened_rewards_keep_their_mean(ppo, tmp_path):
    words = ["whiten_rewards=true", "whiten_advantages=false", "gae_lambda=1", "num_samples=8", "num_steps=1"]
    assert ppo(*words) == 0
    rows = samples_of(tmp_path / "run")
    rewards = torch.cat([column(row, "reward") for row in rows])
    mean, std = rewards.mean(), rewards.std(correction=0)
    assert abs(mean / std) > 0.05  # so that a lost mean shows
    for row in rows:
        whitened = (column(row, "reward") - mean) / std + mean
        expected = to_go(whitened) - column(row, "value")
        torch.testing.assert_close(column(row, "advantage"), expected, rtol=1e-3, atol=2e-3)


def test_a_score_after_eos_reaches_the_tokens_before_it(ppo, stopping, tmp_path):
    words = [
        stopping,
        "score_position=after_eos",
        "whiten_advantages=false",
        "gae_lambda=1",
        "num_samples=16",
        "num_steps=1",
    ]
    assert ppo(*words, "batch_size=16", "sampling.max_new_tokens=24") == 0
    rows = [row for row in samples_of(tmp_path / "run") if row["finish_reason"] == "stop" and len(row["tokens"]) < 24]
    assert rows
    for row in rows:
        expected = to_go(column(row, "reward")) + row["score"] - column(row, "value")
        torch.testing.assert_close(column(row, "advantage"), expected, rtol=1e-4, atol=1e-3)


def test_group_advantages_are_not_whitened_again(ppo, stopping, tmp_path):
    (tmp_path / "fn.py").write_text(REWARDS)
    for kind in ("grpo", "rloo"):
        words = [
            stopping,
            f"advantage={kind}",
            "samples_per_prompt=2",
            "kl_coef=0",
            "missing_eos=none",
            "num_samples=16",
        ]
        words += [f"reward={tmp_path}/fn.py:by_prompt", "reward_model=null", "num_steps=1", "data.shuffle=false"]
        assert ppo(*words, run=kind) == 0
        rows = samples_of(tmp_path / kind)
        lengths = {len(row["tokens"]) for row in rows}
        assert len(lengths) > 1
        for first, second in zip(rows[::2], rows[1::2], strict=True):
            a, b = first["score"], second["score"]
            std = math.sqrt(((a - b) / 2) ** 2 * 2) + 1e-6
            expected = {"grpo": (a - b) / 2 / std, "rloo": a - b}[kind]
            assert column(first, "advantage").tolist() == pytest.approx([expected] * len(first["tokens"]), abs=1e-4)
            assert column(second, "advantage").tolist() == pytest.approx([-expected] * len(second["tokens"]), abs=1e-4)
        assert all(
            row["score"] == 1 and not any(row["token_advantage"]) for row in rows[:2]
        )  # all equal: taught nothing


def test_tokens_and_states_are_counted_each_by_its_own_mask(ppo, stopping, monkeypatch):
    seen, loss = [], train_ppo.ppo_loss

    def spy(policy, value, clips, *, num_tokens, num_states, **settings):
        masks = policy.completion_mask.sum().item(), value.value_mask.sum().item()
        seen.append((masks[0], num_tokens.item(), masks[1], num_states.item()))
        return loss(policy, value, clips, num_tokens=num_tokens, num_states=num_states, **settings)

    monkeypatch.setattr(train_ppo, "ppo_loss", spy)
    words = [
        stopping,
        "score_position=after_eos",
        "micro_batch_size=8",
        "minibatch_size=8",
        "sampling.max_new_tokens=24",
    ]
    assert ppo(*words, "num_steps=1") == 0
    assert all(tokens == counted and states == also for tokens, counted, states, also in seen)
    assert any(tokens != states for tokens, _, states, _ in seen)


def test_the_warm_up_begins_at_its_first_rate(ppo, tmp_path, read_metrics):
    assert ppo("num_steps=2", "optim.lr=1e-3", "optim.warmup_steps=4") == 0
    rows = [row for row in read_metrics(tmp_path / "run") if "optim/lr" in row]
    assert [row["optim/lr"] for row in rows] == pytest.approx([2.5e-4, 5e-4])


def test_the_seed_decides_what_is_sampled_and_may_be_large(ppo, tmp_path):
    drawn = {}
    for seed in (0, 1, 2**23, 2**32 - 1):
        assert ppo(f"seed={seed}", "num_steps=1", "data.shuffle=false", "num_samples=8", run=str(seed)) == 0
        drawn[seed] = tuple(row["completion"] for row in samples_of(tmp_path / str(seed)))
    assert len(set(drawn.values())) == 4


def test_each_network_is_clipped_by_its_own_norm(ppo, inputs, tmp_path, read_metrics):
    """Scores a hundred times larger move the value model's gradient, not the policy's whitened one."""
    words = ["reward_model=null", "value_clip_range=null", "num_steps=1"]
    words += ["ppo_epochs=1", "minibatch_size=8", "kl_coef=0", "missing_eos=none", "gae_lambda=1", "sample_every=0"]
    for weight in (1, 100):
        assert ppo(*words, f"reward={{name:'{inputs}/rewards.py:length',weight:{weight}}}", run=str(weight)) == 0
    (one,), (hundred,) = (read_metrics(tmp_path / run) for run in ("1", "100"))
    assert hundred["value/grad_norm"] == pytest.approx(100 * one["value/grad_norm"], rel=0.05)
    assert hundred["policy/grad_norm"] == pytest.approx(one["policy/grad_norm"], rel=1e-3)


def test_truncation_that_pays_is_said_with_both_figures(ppo, inputs, capsys):
    (inputs / "low.py").write_text("def low(prompts, completions):\n    return [-5.0] * len(prompts)\n")
    words = [f"reward={inputs}/low.py:low", "reward_model=null", "num_steps=1", "sampling.max_new_tokens=2"]
    assert ppo(*words, "missing_eos=replace") == 0
    assert "missing_eos_value=-1, more than the mean score of -5" in capsys.readouterr().out
    assert ppo(*words, "missing_eos=subtract", run="subtract") == 0
    assert "missing_eos_value" not in capsys.readouterr().out


def test_activation_checkpointing_changes_no_number(ppo, tmp_path, read_metrics, monkeypatch):
    calls = []
    import model.transformer as transformer

    real = transformer.checkpoint
    monkeypatch.setattr(transformer, "checkpoint", lambda *args, **kw: calls.append(1) or real(*args, **kw))
    for flag in ("false", "true", "offload"):
        assert ppo(f"activation_checkpointing={flag}", run=flag) == 0
        assert bool(calls) == (flag != "false")
        assert read_metrics(tmp_path / "false") == read_metrics(tmp_path / flag)
    assert ppo("activation_checkpointing=some", run="some") == 2
