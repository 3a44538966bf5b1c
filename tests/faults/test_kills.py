"""SIGKILL at any moment loses nothing: resumed trainings end with the same bits as uninterrupted ones."""

import gzip
import itertools
import json
from pathlib import Path

import pytest

from tests.faults.kills import Training, kill_until

EMBEDDED = Path(__file__).parents[2] / "data" / "embedded"
TINY = [
    "model=tiny", "model.vocab_size=400", "model.num_layers=1", "model.hidden_size=32", "model.intermediate_size=48",
    "model.num_heads=2", "model.num_kv_heads=1", "model.head_dim=16",
]  # fmt: skip
EVERY_DOOR = ["save_every=1", "keep_last=2", "optim.lr=1e-2", "sampling.max_new_tokens=6", "log.wandb=disabled"]


@pytest.fixture(scope="session")
def trainings(tmp_path_factory, coffee):
    """door -> its words; DPO and PPO start from what a tiny SFT and reward model training leave."""
    home = tmp_path_factory.mktemp("kills")
    with gzip.open(EMBEDDED / "pref_coffee_train.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = list(itertools.islice(file, 24))
    pairs = home / "pairs.jsonl"
    pairs.write_text("".join(lines), encoding="utf-8")
    asked = home / "prompts.jsonl"
    rows = [json.loads(line)["messages"][:1] for line in coffee["train"].read_text().splitlines()]
    asked.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in rows), encoding="utf-8")
    data = [f"data.train=[{coffee['train']}]", f"data.eval=[{coffee['eval']}]"]
    compared = [f"data.train=[{pairs}]", f"data.eval=[{pairs}]"]
    steps = ["num_steps=8", "batch_size=8", "micro_batch_size=4", "eval_every=3"]
    words = {
        "train_sft": [*TINY, *data, *steps, "sample_every=3", "num_samples=2", "residual_dropout=[0.1,0.1]"],
        "train_rm": [
            *TINY,
            *compared,
            *steps,
            "data.max_length=160",
            "data.max_prompt_length=96",
            "normalise=reference_mean",
        ],
    }
    words = {door: [*EVERY_DOOR, *more] for door, more in words.items()}
    Training("train_sft", words["train_sft"], home / "sft").finish()
    rm_words = [f"policy={home}/sft/model", *(word for word in words["train_rm"] if not word.startswith("model"))]
    Training("train_rm", rm_words, home / "rm").finish()
    policy = f"policy={home}/sft/model"
    words["train_dpo"] = [
        *EVERY_DOOR, *compared, *steps, policy, "data.max_length=160", "data.max_prompt_length=96", "sample_every=4",
        "num_prompts=4", "num_samples=2", "loss=dpo",
    ]  # fmt: skip
    words["train_ppo"] = [
        *EVERY_DOOR, policy, f"reward_model={home}/rm/model", f"data.prompts=[{asked}]", f"data.eval=[{asked}]",
        "num_steps=6", "batch_size=8", "minibatch_size=4", "micro_batch_size=4", "eval_every=3", "num_prompts=4",
        "sample_every=2", "num_samples=2", "kl_controller=adaptive", "kl_horizon=50", "ema_decay=0.9", "ptx_coef=0.5",
        f"data.ptx=[{coffee['train']}]",
    ]  # fmt: skip
    return words


def survives(door: str, words: list[str], home: Path, *, kills: int, seed: int = 0) -> None:
    """Kill a training, and compare it with the one that was left alone."""
    if door == "train_dpo":
        whole, killed = ([*words, f"ref_cache={home}/cache_{name}"] for name in ("whole", "killed"))
    else:
        whole, killed = words, words
    left_alone = Training(door, whole, home / "whole")
    seconds = left_alone.finish()
    struck = Training(door, killed, home / "killed")
    places = kill_until(struck, kills, seconds=seconds, seed=seed)
    print(f"{door}: {kills} kills, of them {dict(places)}; {seconds:.1f} s uninterrupted")
    assert struck.result() == left_alone.result()


@pytest.mark.parametrize("door", ["train_sft", "train_ppo"])
def test_two_kills_lose_nothing(door, trainings, tmp_path):
    survives(door, trainings[door], tmp_path, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("door", ["train_sft", "train_rm", "train_dpo", "train_ppo"])
def test_25_kills_lose_nothing(door, precision, trainings, tmp_path):
    survives(door, [*trainings[door], f"precision={precision}"], tmp_path, kills=25, seed=precision == "bf16")
