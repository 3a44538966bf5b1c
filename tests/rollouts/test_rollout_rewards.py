"""Rewards per token and per stretch of text, rows that nobody can judge, several sources: through the whole command."""
# ruff: noqa: F811 - fixtures of another test file

from types import SimpleNamespace

import pytest
import torch

import rollouts.engine
from rollouts.rewards import Scorer
from rollouts.sources import Source
from runtime.seeds import seed_of
from tests.test_ppo_values import column, samples_of, stopping  # noqa: F401 - fixtures
from tests.test_train_ppo import inputs, ppo  # noqa: F401 - fixtures

REWARDS = """
def halves(prompts, completions):
    return [[((0, len(c) // 2), 1.0), ((len(c) // 2, len(c)), -0.5)] if len(c) > 3 else 0.0 for c in completions]

def per_token(prompts, completions, tokens):
    return [list(range(len(t))) for t in tokens]

def some(prompts, completions, id):
    return [None if i == id[0] else float(len(c)) for i, c in zip(id, completions)]

def few_tokens(prompts, completions):
    return [[0.0] * 999 for _ in completions]

def outside(prompts, completions):
    return [[((0, len(c) + 1), 1.0)] for c in completions]

def long(prompts, completions):
    return [float(len(c)) for c in completions]

def short(prompts, completions):
    return [-float(len(c)) for c in completions]
"""
ALONE = ["reward_model=null", "kl_coef=0", "missing_eos=none", "num_steps=1", "num_samples=16"]


@pytest.fixture
def fn(tmp_path):
    (tmp_path / "fn.py").write_text(REWARDS)
    return lambda *names: f"reward=[{','.join(f'{tmp_path}/fn.py:{name}' for name in names)}]"


def test_stretches_of_text_are_paid_on_the_tokens_that_end_them(ppo, stopping, fn, tmp_path):
    assert ppo(stopping, *ALONE, fn("halves"), "whiten_advantages=false", "gae_lambda=1") == 0
    rows = [row for row in samples_of(tmp_path / "run") if len(row["completion"]) > 3]
    assert rows
    for row in rows:
        rewards, text = column(row, "reward"), row["completion"]
        (first,) = (rewards == 1).nonzero().flatten().tolist()
        assert rewards.sum().item() == pytest.approx(0.5)
        before = "".join(row["tokens"][: first + 1])
        assert len(before.strip()) >= len(text) // 2 - 2
        returns = column(row, "advantage") + column(row, "value")
        assert returns[0].item() == pytest.approx(0.5, abs=1e-4) and returns[first + 1].item() == pytest.approx(
            -0.5, abs=1e-4
        )


def test_a_reward_for_every_token_lands_on_it(ppo, stopping, fn, tmp_path):
    assert ppo(stopping, *ALONE, fn("per_token")) == 0
    for row in samples_of(tmp_path / "run"):
        assert column(row, "reward").tolist() == list(range(len(row["tokens"])))


@pytest.mark.parametrize("words", [[], ["advantage=rloo"], ["advantage=grpo", "aggregation=sequence_mean"]], ids=str)
def test_what_nobody_can_judge_teaches_nothing_and_is_counted(ppo, stopping, fn, tmp_path, read_metrics, capsys, words):
    words = [*words, "samples_per_prompt=2", "data.shuffle=false", "whiten_advantages=null", "optim.lr=1e-3"]
    assert ppo(stopping, *ALONE, fn("some"), *words) == 0
    rows, (metrics,) = samples_of(tmp_path / "run"), read_metrics(tmp_path / "run")
    assert [row["score"] is None for row in rows] == [True, True] + [False] * 14
    assert not any(column(row, "advantage").any() for row in rows[:2])
    judged = [row["score"] for row in rows[2:]]
    assert metrics["objective/score"] == pytest.approx(sum(judged) / 14, rel=1e-5)
    assert metrics["objective/unjudged"] == pytest.approx(2 / 16)
    assert "step 1: 2 of 16 completions could not be judged" in capsys.readouterr().out
    if "advantage=rloo" in words:
        for one, other in zip(rows[2::2], rows[3::2], strict=True):
            assert column(one, "advantage")[0].item() == pytest.approx(one["score"] - other["score"], abs=1e-4)


def test_sources_are_weighed_clipped_and_logged_apart(ppo, stopping, fn, tmp_path, read_metrics):
    long, short = (
        f"{{name:'{tmp_path}/fn.py:{name}',{own}}}"
        for name, own in (("long", "weight:2,clip:3"), ("short", "weight:1"))
    )
    fn("long")
    assert ppo(stopping, *ALONE, f"reward=[{long},{short}]") == 0
    (row,) = read_metrics(tmp_path / "run")
    lengths = [len(sample["completion"]) for sample in samples_of(tmp_path / "run")]
    assert row["objective/reward/long"] == pytest.approx(sum(lengths) / len(lengths))
    assert row["objective/score"] == pytest.approx(sum(2 * min(n, 3) - n for n in lengths) / len(lengths))
    assert row["objective/correlation/long/short"] == pytest.approx(-1)


def test_dynamic_sampling_refills_groups_whose_scores_are_equal(ppo, stopping, tmp_path, read_metrics, monkeypatch):
    """Half the prompts are paid the same whatever is said: with other batches to draw from, none of them is kept.

    No two rows of a step have the same random numbers.
    """
    drawn: list[tuple] = []
    monkeypatch.setattr(rollouts.engine, "seed_of", lambda *parts: drawn.append(parts) or seed_of(*parts))
    (tmp_path / "half.py").write_text(
        "def half(prompts, completions, id):\n"
        "    return [1.0 if sum(map(ord, i)) % 2 else float(len(c)) for i, c in zip(id, completions)]\n"
    )
    words = [stopping, *ALONE, f"reward={tmp_path}/half.py:half", "advantage=grpo", "samples_per_prompt=2"]
    words += ["batch_size=4", "minibatch_size=4"]
    shares = {}
    for most in (0, 6):
        drawn.clear()
        assert ppo(*words, f"dynamic_sampling={most}", run=str(most)) == 0
        of_rollouts = [parts for parts in drawn if "rollout" in parts]
        assert len(of_rollouts) == len(set(of_rollouts)) >= 8
        rows = samples_of(tmp_path / str(most))
        groups = list(zip(rows[::2], rows[1::2], strict=True))
        assert len(groups) == 4
        shares[most] = sum(any(column(one, "advantage")) for one, _ in groups) / 4
    assert shares[0] < 1 and shares[6] == 1
    (row,) = read_metrics(tmp_path / "6")
    assert row["objective/groups_differ"] == 1 and 1 < row["objective/batches_drawn"] <= 6


def test_overlong_completions_lose_reward_or_are_left_out(ppo, stopping, tmp_path, read_metrics):
    (tmp_path / "one.py").write_text("def one(prompts, completions):\n    return [1.0] * len(prompts)\n")
    words = [stopping, *ALONE, f"reward={tmp_path}/one.py:one", "whiten_advantages=false"]
    assert ppo(*words, "overlong_tokens=4", run="soft") == 0
    for row in samples_of(tmp_path / "soft"):
        expected = 1 + max(-1, min(0, (8 - 4 - len(row["tokens"])) / 4))  # DAPO's soft overlong punishment
        assert column(row, "reward").sum().item() == pytest.approx(expected)
    assert ppo(*words, "missing_eos=mask", run="mask") == 0
    rows = samples_of(tmp_path / "mask")
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    assert all(any(column(row, "advantage")) == (row["finish_reason"] == "stop") for row in rows)


@pytest.mark.parametrize(
    "name, message", [("few_tokens", "one for each of its"), ("outside", "rewards characters 0 to")]
)
def test_rewards_that_fit_no_text_are_named(ppo, stopping, fn, capsys, name, message):
    assert ppo(stopping, *ALONE, fn(name)) == 2
    assert message in capsys.readouterr().err


def test_what_a_source_pays_is_averaged_over_the_rows_that_were_judged():
    scorer = Scorer(None, [Source("one"), Source("two")], None, micro_batch_size=1)
    rewards = {name: torch.tensor([[1.0, 1.0], [9.0, 9.0], [0.0, 3.0]]) for name in scorer.sources}
    rollout = SimpleNamespace(judged=torch.tensor([True, False, True]), rewards=rewards)
    figures = scorer.figures(rollout)
    assert [figures[f"objective/reward/{name}"].tolist() for name in scorer.sources] == [[2.0, 3.0]] * 2
