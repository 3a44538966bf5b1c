"""Rewards that are watched, and running scales: through the whole command."""
# ruff: noqa: F811 - fixtures of another test file

import json

import pytest

from rollouts.rewards import Scorer
from rollouts.sources import read_sources
from tests.test_ppo_values import samples_of, stopping  # noqa: F401 - fixtures
from tests.test_train_ppo import inputs, ppo  # noqa: F401 - fixtures

REWARDS = """
CALLS = {"proxy": 0, "gold": 0, "flat": 0, "noisy": 0}

def moving(name, completions, by, spread):
    CALLS[name] += 1
    return [by * CALLS[name] + spread * (i % 2) for i in range(len(completions))]

def proxy(prompts, completions):
    return moving("proxy", completions, 1.0, 0.1)

def gold(prompts, completions):
    return moving("gold", completions, -1.0, 0.1)

def noisy(prompts, completions):
    return moving("noisy", completions, -0.001, 9.0)

def flat(prompts, completions):
    return [None, *moving("flat", completions, 0.0, 0.1)[1:]]

def size(prompts, completions, tokens):
    return [float(len(ids)) for ids in tokens]
"""


@pytest.fixture
def words(inputs, stopping, tmp_path):
    (tmp_path / "fn.py").write_text(REWARDS)
    return [stopping, "reward_model=null", "kl_coef=0", "missing_eos=none", "sample_every=0", "kl_exact_every=0"]


def test_a_run_warns_where_its_score_rises_while_what_is_watched_falls(
    ppo, words, inputs, tmp_path, read_metrics, capsys
):
    watched = ",".join(f"{tmp_path}/fn.py:{name}" for name in ("gold", "flat", "noisy"))
    words += [f"reward={tmp_path}/fn.py:proxy", f"watch=[{watched}]", f"data.eval=[{inputs}/rows.jsonl]"]
    assert ppo(*words, "eval_every=1", "num_prompts=6", "num_steps=4") == 0
    said = capsys.readouterr().out
    assert "step 3: in 3 evaluations in a row the score rose" in said and "while gold fell" in said
    assert "step 2: in" not in said and "flat fell" not in said and "noisy fell" not in said
    rows = [row for row in read_metrics(tmp_path / "run") if "eval/score" in row]
    assert [row["eval/watch/gold"] for row in rows] == pytest.approx([-1 - i + 0.05 for i in range(5)])
    assert rows[0]["eval/watch/flat"] == pytest.approx(0.06)  # of the five that it judges
    assert rows[0]["eval/reward/proxy"] == rows[0]["eval/score"]
    assert all(0 <= row["eval/repetition"] < 1 and 0 < row["eval/unique_words"] <= 1 for row in rows)
    assert (tmp_path / "run" / "hacking.png").stat().st_size > 5000


def test_a_normalised_reward_has_mean_0_and_deviation_1_over_all_that_was_paid(ppo, words, tmp_path, read_metrics):
    entry = f"reward={{name:'{tmp_path}/fn.py:size',normalise:true,clip:1.5,weight:2}}"
    assert ppo(*words, entry, "sample_every=1", "num_samples=8", "optim.lr=1e-9") == 0
    paid, rows = [], read_metrics(tmp_path / "run")
    for step in (1, 2):
        samples = samples_of(tmp_path / "run", step)
        paid += (own := [len(row["tokens"]) for row in samples])
        mean = sum(paid) / len(paid)
        deviation = (sum((x - mean) ** 2 for x in paid) / len(paid)) ** 0.5
        expected = [2 * max(-1.5, min(1.5, (x - mean) / deviation)) for x in own]
        assert [row["score"] for row in samples] == pytest.approx(expected, abs=1e-5)
        assert rows[step - 1]["objective/score"] == pytest.approx(sum(expected) / 8, abs=1e-5)


def test_running_scales_and_what_was_seen_go_on_after_a_resume(ppo, words, inputs, tmp_path):
    """A checkpoint of step 1 holds both; the run that goes on from it ends with the figures of the one that did not."""
    size = f"{{name:'{tmp_path}/fn.py:size',normalise:true}}"
    words += [f"reward={size}", f"watch={tmp_path}/fn.py:size", f"data.eval=[{inputs}/rows.jsonl]", "num_prompts=2"]
    words += ["eval_every=1", "save_every=1", "num_steps=2", "keep_last=2"]
    assert ppo(*words) == 0
    whole = (tmp_path / "run" / "metrics.jsonl").read_text()
    for path in (tmp_path / "run" / "checkpoints").glob("step_000002"):
        path.rename(tmp_path / "gone")
    assert ppo(*words, "resume=true") == 0
    again = (tmp_path / "run" / "metrics.jsonl").read_text()
    ends = [json.loads(text.splitlines()[-1]) for text in (whole, again)]
    for name in ("objective/score", "eval/watch/size", "objective/kl", "policy/loss"):
        assert ends[0][name] == ends[1][name]


def test_a_scorer_keeps_its_scales(tmp_path):
    (tmp_path / "fn.py").write_text(REWARDS)
    entry = {"name": f"{tmp_path}/fn.py:size", "normalise": True}
    one, other = (
        Scorer(None, read_sources("reward", entry, tmp_path, seconds=60), None, micro_batch_size=1) for _ in range(2)
    )
    one.sources["size"].scale.count, one.sources["size"].scale.center, one.sources["size"].scale.squares = 4, 2.5, 16
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.sources["size"].scale.deviation == 2 and other.sources["size"].scale.center == 2.5
