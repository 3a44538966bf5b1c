"""Settings of PPO that other papers brought, each by what it leaves behind a run of the whole command."""
# ruff: noqa: F811 - fixtures of another test file

import pytest
import torch
from safetensors.torch import load_file

import train_ppo
from model.build import load_value_model
from tests.test_ppo_values import HELD_STILL, column, samples_of, stopping, value_loss_if_the_values_stay  # noqa: F401
from tests.test_train_ppo import inputs, ppo  # noqa: F401 - fixtures


def weights(path):
    return load_file(path / "model.safetensors")


def test_value_pretraining_leaves_the_policy_where_it_is(ppo, inputs, tmp_path, read_metrics):
    words = ["value_pretraining_steps=2", "optim.value_lr=3e-3", "optim.schedule=constant", "num_steps=3"]
    assert ppo(*words, "sample_every=0", "export_value_model=true", "save_every=1") == 0
    rows = read_metrics(tmp_path / "run")
    assert [row["policy/grad_norm"] == 0 for row in rows] == [True, True, False]
    assert rows[0]["objective/kl_exact"] == pytest.approx(0, abs=1e-6)
    assert rows[2]["objective/kl_exact"] == pytest.approx(0, abs=1e-6)  # measured before the first step of the policy
    before, after = weights(inputs / "policy"), weights(tmp_path / "run" / "model")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert ppo(*words, "sample_every=0", "num_steps=2", "save_every=0", run="two") == 0
    after = weights(tmp_path / "two" / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_goes_on_with_another_ones_value_model(ppo, tmp_path, read_metrics):
    assert ppo("export_value_model=true", "optim.value_lr=3e-3", run="first") == 0
    load_value_model(tmp_path / "first" / "value_model", precision="fp32")
    assert ppo(f"value_model={tmp_path}/first/value_model", "num_steps=1", run="second") == 0
    assert ppo("num_steps=1", run="fresh") == 0
    second, fresh = (read_metrics(tmp_path / run)[0]["value/explained_variance"] for run in ("second", "fresh"))
    assert second > fresh  # the rollout is the same, and the value model has learned


def test_the_kl_is_counted_from_ref_policy(ppo, inputs, tmp_path, read_metrics):
    assert ppo("num_steps=2", "optim.lr=1e-2", run="first") == 0
    on = f"policy={tmp_path}/first/model"
    assert ppo(on, f"ref_policy={inputs}/policy", "num_steps=1", run="iterated") == 0
    assert ppo(on, "num_steps=1", run="anew") == 0
    iterated, anew = (read_metrics(tmp_path / run)[0]["objective/kl_exact"] for run in ("iterated", "anew"))
    assert anew == pytest.approx(0, abs=1e-5) and iterated > 1e-3


def test_the_kl_coefficient_goes_along_a_line_over_a_resume_too(ppo, tmp_path, read_metrics):
    words = ["kl_controller=linear", "kl_coef=0.4", "kl_coef_end=0.1", "optim.num_steps=3", "sample_every=0"]
    words += ["save_every=1", "optim.schedule=constant"]
    assert ppo(*words, "num_steps=2") == 0
    assert ppo(*words, "num_steps=5", "resume=true") == 0
    coefs = [row["objective/kl_coef"] for row in read_metrics(tmp_path / "run")]
    assert coefs == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.1])


def test_an_entropy_bonus_keeps_the_policy_open(ppo, tmp_path, read_metrics):
    words = ["num_steps=4", "optim.lr=3e-3", "optim.schedule=constant", "sample_every=0", "kl_coef=0"]
    for coef in (0, 2):
        assert ppo(*words, f"entropy_coef={coef}", run=str(coef)) == 0
    closed, opened = (read_metrics(tmp_path / run) for run in ("0", "2"))
    assert opened[0]["objective/entropy"] == pytest.approx(closed[0]["objective/entropy"], rel=1e-6)
    assert opened[-1]["objective/entropy"] > closed[-1]["objective/entropy"] + 0.05


def test_lambda_grows_with_the_length(ppo, stopping, tmp_path):
    """VAPO: 1 - 1 / (alpha length); with V = old values and rewards known, the advantages follow."""
    words = [stopping, "gae_lambda_alpha=0.5", "whiten_advantages=false", "num_samples=8", "num_steps=1"]
    assert ppo(*words) == 0
    lengths = set()
    for row in samples_of(tmp_path / "run"):
        rewards, values = column(row, "reward"), column(row, "value")
        lengths.add(len(rewards))
        lam, expected, after = max(0.0, 1 - 1 / (0.5 * len(rewards))), [], (0.0, 0.0)
        for reward, value in zip(rewards.flip(0).tolist(), values.flip(0).tolist(), strict=True):
            advantage = reward + after[0] - value + lam * after[1]
            expected.append(advantage)
            after = (value, advantage)
        assert column(row, "advantage").flip(0).tolist() == pytest.approx(expected, abs=1e-3)
    assert len(lengths) > 2


@pytest.mark.parametrize(
    "words",
    [
        ["advantage=dr_grpo", "aggregation=sequence_sum", "samples_per_prompt=2"],
        ["advantage=grpo", "clip_range_high=0.28", "missing_eos=mask", "samples_per_prompt=2"],
        ["advantage=grpo", "policy_loss=gspo", "aggregation=sequence_mean", "clip_range=3e-4", "samples_per_prompt=2"],
        ["advantage=grpo", "policy_loss=cispo", "clip_range=1", "clip_range_high=2", "samples_per_prompt=2"],
        ["advantage=reinforce_pp"],
    ],
    ids=lambda words: words[1 if len(words) > 1 else 0],
)
def test_every_kind_runs_alike_on_micro_batches_of_any_size(ppo, stopping, tmp_path, read_metrics, words):
    prompts = 4 if "samples_per_prompt=2" in words else 8
    words = [stopping, *words, "num_steps=1", "minibatch_size=8", f"batch_size={prompts}", "sample_every=0"]
    for size in (1, 4):
        assert ppo(*words, f"micro_batch_size={size}", "ppo_epochs=1", run=str(size)) == 0
    (row,), (other,) = (read_metrics(tmp_path / run) for run in ("1", "4"))
    assert row["policy/ratio_first"] == pytest.approx(1, abs=1e-5) and row["policy/grad_norm"] > 0
    for key in row:
        assert row[key] == pytest.approx(other[key], rel=2e-3, abs=2e-5), key


@pytest.mark.parametrize(
    "words, message",
    [
        (["policy_loss=ppo"], "policy_loss='ppo' is unknown"),
        (["aggregation=mean"], "aggregation='mean' is unknown"),
        (["advantage=remax"], "use one of gae, rloo, grpo, dr_grpo"),
        (["policy_loss=gspo", "dual_clip=3"], "dual_clip=3 belongs to policy_loss=clip"),
        (["overlong_tokens=8"], "overlong_tokens=8 must be below"),
        (["dynamic_sampling=2"], "set samples_per_prompt to 2 or more"),
        (["advantage=reinforce_pp", "export_value_model=true"], "advantage=reinforce_pp has no value model"),
        (["ref_policy={home}/other_rm"], "another tokenizer"),
        (["clip_range_high=0"], "clip_range_high=0"),
        (["max_turns=0"], "max_turns=0"),
        (["reward=[{{name:length,clip:0}}]"], "reward.length.clip=0 must be a number above 0"),
        (["reward=[{{name:length,weight:much}}]"], "reward.length.weight=much must be a finite number"),
        (["reward=[{{name:length,normalise:1}}]"], "reward.length.normalise=1 must be true or false"),
        (["reward=[{{name:length,least:1,longest:9}}]"], "length has no setting longest; its own are least, most"),
        (["reward=maths"], "reward=maths is not a ready reward (code, coffee, exact,"),
        (["reward=[3]"], "reward: 3 is not a reward"),
        (["reward=exact"], "exact reads the column answer, which no prompt has"),
        (["reward=environment"], "reward: environment needs the setting env=FILE.py:CLASS"),
        (["watch=repetition"], "watch scores the answers to data.eval"),
        (["watch_patience=0"], "watch_patience=0"),
    ],
)
def test_settings_that_mean_nothing_are_named(ppo, inputs, capsys, words, message):
    assert ppo(*[word.format(home=inputs) for word in words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["advantage=reinforce_pp", "kl_coef=1"], ["kl_in=loss", "kl_estimator=exact", "kl_coef=20"]],
    ids=["sampled", "exact"],
)
def test_a_policy_alone_with_a_teacher_comes_nearer_to_it(ppo, inputs, tmp_path, read_metrics, words):
    assert ppo("num_steps=3", "optim.lr=1e-2", run="teacher") == 0
    words = [*words, f"ref_policy={tmp_path}/teacher/model", "reward_model=null", "missing_eos=none", "sample_every=0"]
    words += ["num_steps=6", "optim.lr=3e-3", "optim.schedule=constant", "batch_size=16", "minibatch_size=16"]
    assert ppo(*words, "micro_batch_size=16", run="student") == 0
    kl = [row["objective/kl_exact"] for row in read_metrics(tmp_path / "student")]
    assert kl[0] > 0.02 and kl[-1] < 0.85 * kl[0]


def test_the_exact_kl_in_the_loss_has_its_gradient(ppo, tmp_path, monkeypatch):
    """On the second rollout policy and reference differ; the penalty is kl_coef times the mean exact KL of a token."""
    seen, real = [], train_ppo.penalty

    def spy(cfg, policy, ref_policy, part, *rest):
        total = real(cfg, policy, ref_policy, part, *rest)
        with torch.no_grad():
            exact = policy.exact_kl(ref_policy, *part.rows, temperature=0.7)[part.rows.completion_mask].sum()
        seen.append((total.detach(), exact, total.requires_grad))
        return total

    monkeypatch.setattr(train_ppo, "penalty", spy)
    words = ["kl_in=loss", "kl_estimator=exact", "sampling.temperature=0.7", "optim.lr=1e-2", "sample_every=0"]
    assert ppo(*words) == 0
    assert all(got.item() == pytest.approx(exact.item(), rel=1e-4, abs=1e-6) and learns for got, exact, learns in seen)
    assert seen[-1][1] > 0.01
