"""The scripts learn what they are paid for: a toy reward rises, a margin opens, judgements are told apart."""

import json

import pytest

import train_dpo
import train_ppo
import train_rm
from data.tokenizer import train_sentencepiece
from model.build import export_model, new_policy
from tests.tiny_models import tiny_config

WORDS = ["one latte", "a mocha", "two teas", "an espresso", "iced coffee", "hot milk", "a cortado", "water"]
REWARD = """
def share_of_a(prompts, completions):
    return [c.count("a") / 8 for c in completions]
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A fresh one-layer policy and orders; the judge likes answers that say yes."""
    home = tmp_path_factory.mktemp("learning")
    tokenizer = train_sentencepiece([w + " please yes no a" for w in WORDS] * 9, 300, home / "tokenizer")
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_layers=1)
    export_model(new_policy(config, seed=0), home / "policy", tokenizer)
    asked = [{"prompt": [{"role": "user", "content": w}]} for w in WORDS]
    pairs = [row | {"chosen": "yes please", "rejected": "no"} for row in asked]
    for name, rows in (("asked", asked), ("pairs", pairs)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "rewards.py").write_text(REWARD)
    return home


@pytest.fixture
def run(run_script, inputs, tmp_path, read_metrics):
    """run(module, words) -> its rows of metrics."""

    def run(module, *words):
        shared = [f"policy={inputs}/policy", "log.wandb=disabled", "save_every=0", f"hydra.run.dir={tmp_path}/run"]
        assert run_script(module, *shared, *words) == 0
        return read_metrics(tmp_path / "run")

    return run


@pytest.mark.parametrize("words", [[], ["advantage=rloo", "samples_per_prompt=4", "batch_size=8"]], ids=["gae", "rloo"])
def test_ppo_raises_a_toy_reward(run, inputs, words):
    rows = run(
        train_ppo, f"data.prompts=[{inputs}/asked.jsonl]", f"reward={inputs}/rewards.py:share_of_a", "num_steps=25",
        "batch_size=32", "minibatch_size=16", "micro_batch_size=16", "sampling.max_new_tokens=8", "missing_eos=none",
        "kl_coef=0.01", "optim.lr=1e-2", "optim.value_lr=1e-2", "sample_every=0", "kl_exact_every=0", *words,
    )  # fmt: skip
    first, last = (sum(row["objective/score"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.3
    assert rows[-1]["objective/kl"] > 1


def test_dpo_opens_a_margin(run, inputs):
    rows = run(
        train_dpo,
        f"data.train=[{inputs}/pairs.jsonl]",
        "num_steps=15",
        "batch_size=8",
        "micro_batch_size=8",
        "optim.lr=3e-3",
        "eval_every=0",
        "sample_every=0",
        "ref=live",
    )
    assert rows[-1]["rewards/margin"] > 0.5 > rows[0]["rewards/margin"]
    assert rows[-1]["objective/loss"] < 0.6


def test_a_reward_model_tells_the_sides_apart(run, inputs):
    rows = run(
        train_rm,
        f"data.train=[{inputs}/pairs.jsonl]",
        f"data.eval=[{inputs}/pairs.jsonl]",
        "num_steps=15",
        "batch_size=8",
        "optim.lr=3e-3",
        "eval_every=15",
    )
    assert rows[-1]["eval/accuracy"] == 1.0
    assert rows[-1]["eval/loss"] < 0.3
