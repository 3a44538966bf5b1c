"""SIGKILL at any moment loses nothing: resumed trainings end with the same bits as uninterrupted ones."""

import gzip
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.kills import Training, kill_until

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "data" / "embedded"
TINY = [
    "model=tiny",
    "model.vocab_size=400",
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.head_dim=16",
]
EVERY_SCRIPT = ["save_every=1", "keep_last=2", "optim.lr=1e-2", "sampling.max_new_tokens=6", "log.wandb=disabled"]


@pytest.fixture(scope="session")
def trainings(tmp_path_factory, coffee):
    """script -> its words; DPO and PPO start from what a tiny SFT and reward model training leave."""
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
    steps = ["num_steps=5", "batch_size=8", "micro_batch_size=4", "eval_every=3"]
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
    words = {script: [*EVERY_SCRIPT, *more] for script, more in words.items()}
    Training("train_sft", words["train_sft"], home / "sft").finish()
    rm_words = [f"policy={home}/sft/model", *(word for word in words["train_rm"] if not word.startswith("model"))]
    Training("train_rm", rm_words, home / "rm").finish()
    policy = f"policy={home}/sft/model"
    words["train_dpo"] = [
        *EVERY_SCRIPT,
        *compared,
        *steps,
        policy,
        "data.max_length=160",
        "data.max_prompt_length=96",
        "sample_every=4",
        "num_prompts=4",
        "num_samples=2",
    ]
    words["train_ppo"] = [
        *EVERY_SCRIPT, policy, f"reward_model={home}/rm/model", f"data.prompts=[{asked}]", f"data.eval=[{asked}]",
        "num_steps=4", "batch_size=8", "minibatch_size=4", "micro_batch_size=4", "eval_every=3", "num_prompts=4",
        "sample_every=2", "num_samples=2", "kl_controller=adaptive", "kl_horizon=50", "ema_decay=0.9", "ptx_coef=0.5",
        f"data.ptx=[{coffee['train']}]",
    ]  # fmt: skip
    return words


def survives(script: str, words: list[str], home: Path, *, kills: int, seed: int = 0) -> None:
    """Kill a training, which overwrites an old one of another seed, and compare it with the one that was left alone."""

    def training(name: str, *more: str) -> Training:
        cache = [f"ref_cache={home}/cache_{name}"] if script == "train_dpo" else []
        return Training(script, [*words, *cache, *more], home / name)

    old, left_alone, struck = training("old", "seed=1"), training("whole"), training("killed")
    old.finish()
    seconds = left_alone.finish()
    places = kill_until(struck, kills, old=old.directory, seconds=seconds, seed=seed)
    print(f"{script}: {kills} kills, of them {dict(places)}; {seconds:.1f} s uninterrupted")
    assert struck.result() == left_alone.result()


@pytest.mark.parametrize("script", ["train_sft", "train_ppo"])
def test_two_kills_lose_nothing(script, trainings, tmp_path):
    survives(script, trainings[script], tmp_path, kills=2)


LORA = ["lora.rank=1", "lora.alpha=7", "lora.targets=[qkv,down]"]
CONFIGURATIONS = {  # a script and what is added to its words; with the recipe below there are twenty
    "sft": ("train_sft", []),
    "sft bf16": ("train_sft", ["precision=bf16"]),
    "sft adapters": ("train_sft", LORA),
    "sft best kept": ("train_sft", ["keep_best=eval/loss", "keep_last=1", "neftune_alpha=5"]),
    "sft recomputed": ("train_sft", ["activation_checkpointing=true", "optim.schedule=cosine"]),
    "rm": ("train_rm", []),
    "rm bf16": ("train_rm", ["precision=bf16"]),
    "rm adapters": ("train_rm", LORA),
    "dpo": ("train_dpo", []),
    "dpo bf16": ("train_dpo", ["precision=bf16"]),
    "dpo live reference": ("train_dpo", ["ref=live"]),
    "dpo adapters": ("train_dpo", LORA),
    "simpo": ("train_dpo", ["loss=simpo", "ref=none"]),
    "ppo": ("train_ppo", []),
    "ppo bf16": ("train_ppo", ["precision=bf16"]),
    "ppo adapters": ("train_ppo", ["ema_decay=null", *LORA]),
    "grpo": ("train_ppo", ["advantage=grpo", "samples_per_prompt=2", "minibatch_size=8"]),
    "rloo": ("train_ppo", ["advantage=rloo", "samples_per_prompt=2", "ppo_epochs=1"]),
    "ppo random reward": ("train_ppo", ["reward_model=null", "value_start=policy"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_ten_kills_lose_nothing(name, trainings, tmp_path):
    script, more = CONFIGURATIONS[name]
    if name == "ppo random reward":
        (tmp_path / "rate.py").write_text(
            "import random\ndef rate(prompts, completions):\n    return [random.random() for _ in prompts]\n"
        )
        more = [*more, f"reward={tmp_path}/rate.py:rate"]
    words = trainings[script]
    if name in ("sft adapters", "rm adapters"):  # they adapt a trained model, and name no sizes of one
        sft = next(word for word in trainings["train_dpo"] if word.startswith("policy="))
        words = [sft, *(word for word in words if not word.startswith("model"))]
    survives(script, [*words, *more], tmp_path, kills=10, seed=sorted(CONFIGURATIONS).index(name))


@pytest.mark.slow
def test_ten_kills_of_a_recipe_lose_nothing(trainings, tmp_path):
    """Two steps, the second from what the first left; the old chain under it is one of another seed."""
    sft = trainings["train_sft"]
    again = ["policy=${dir}/first/model", *(word for word in sft if not word.startswith("model"))]
    steps = [{"name": "first", "run": shlex.join(["train_sft.py", *sft])}]
    steps += [{"name": "second", "run": "train_sft.py " + " ".join(again)}]
    (tmp_path / "recipe").mkdir()
    text = "# @package _global_\n" + json.dumps({"name": "two", "steps": steps})
    (tmp_path / "recipe/two.yaml").write_text(text)

    def chain(home: str, seed: int, kill_after: float | None = None) -> bool:
        words = ["recipe=two", f"dir={tmp_path}/{home}", f"all.seed={seed}"]
        command = [sys.executable, "run_recipe.py", "--config-dir", str(tmp_path), *words]
        with open(tmp_path / f"{home}.log", "a") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
        assert code == 0, (tmp_path / f"{home}.log").read_text()[-2000:]
        return True

    begun = time.monotonic()
    chain("whole", seed=0)
    seconds, chance, struck = time.monotonic() - begun, random.Random(0), 0
    while struck < 10:
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        chain("killed", seed=1)
        while struck < 10 and not chain("killed", seed=0, kill_after=chance.uniform(0.1, 0.8) * seconds):
            struck += 1
    chain("killed", seed=0)
    for step in ("first", "second"):
        whole, killed = (Training("train_sft", [], tmp_path / home / step).result() for home in ("whole", "killed"))
        assert whole == killed
