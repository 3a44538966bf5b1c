"""Every seed that a config accepts works in every script (PPO: test_ppo_values.py); what lies beyond is refused."""

from importlib import import_module
from types import SimpleNamespace

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from text_samples import conversations, said, write_rows

from data.tokenizer import train_sentencepiece
from model.build import export_model, new_policy, new_reward_model
from run_recipe import compose
from runtime.script import CONF
from runtime.seeds import LARGEST
from tests.tiny_models import tiny_config

JOBS = {"generate": "run_generate", "make_data": "make_data", "check_data": "check_data", "evaluate": "evaluate"}
QUIET = ["num_steps=1", "batch_size=4", "micro_batch_size=4", "eval_every=0", "sample_every=0", "save_every=0"]
QUIET += ["log.wandb=disabled"]
WORDS = {
    "train_sft": [*QUIET, "policy=HOME/policy", "data.train=[HOME/talks.jsonl]"],
    "train_rm": [*QUIET, "policy=HOME/policy", "data.train=[HOME/pairs.jsonl]", "lora.rank=2"],
    "train_dpo": [*QUIET, "policy=HOME/policy", "data.train=[HOME/pairs.jsonl]", "lora.rank=2", "ref_cache=HOME/cache"],
    "generate": ["policy=HOME/policy", "data.prompts=[HOME/talks.jsonl]", "sampling.max_new_tokens=3"],
    "make_data": [
        "method=best_of", "client=local", "client.policy=HOME/policy", "client.cache=null", "method.num=4",
        "method.prompts=[HOME/talks.jsonl]", "method.reward_fn=HOME/reward.py:gold", "method.max_tokens=80",
    ],
    "check_data": ["check=pilot", "check.input=[HOME/talks.jsonl]"],
    "evaluate": [
        "task=best_of_n", "task.policy=HOME/policy", "task.input=[HOME/talks.jsonl]", "task.num_completions=2",
        "task.reward_fn=HOME/reward.py:gold", "task.reward_models=[HOME/reward]", "task.num_prompts=2",
        "task.sampling.max_new_tokens=3",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("seeds")
    texts = [message["content"] for talk in conversations("sft_coffee_train", 100) for message in talk]
    tokenizer = train_sentencepiece(texts, 400, home / "tokenizer")
    config = tiny_config(vocab_size=400, max_length=160)
    export_model(new_policy(config, seed=0), home / "policy", tokenizer)
    export_model(new_reward_model(config, seed=0, precision="fp32"), home / "reward", tokenizer)
    write_rows(home / "talks.jsonl", *({"messages": said(f"Order {i}.", f"Coffee {i}.")} for i in range(8)))
    pairs = ({"prompt": f"Order {i}.", "chosen": f"Coffee {i}.", "rejected": "No."} for i in range(8))
    write_rows(home / "pairs.jsonl", *pairs)
    reward = "def gold(prompts, completions):\n    return [float(sum(map(ord, text))) for text in completions]\n"
    (home / "reward.py").write_text(reward)
    return home


@pytest.mark.parametrize("name", WORDS)
def test_a_large_seed_works_and_one_beyond_all_is_refused(name, home, run_script, tmp_path, capsys):
    job = getattr(import_module(name), JOBS.get(name, "train"))
    words = [word.replace("HOME", str(home)) for word in WORDS[name]] + [f"hydra.run.dir={tmp_path}/run"]
    assert run_script(SimpleNamespace(train=job, __name__=name), *words, f"seed={LARGEST + 1}") == 2
    assert f"seed={LARGEST + 1} must be at most {LARGEST}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run_script(SimpleNamespace(train=job, __name__=name), *words, f"seed={LARGEST}") == 0, (
        capsys.readouterr().err
    )


def test_a_recipe_hands_its_seed_to_every_step():
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        cfg = hydra.compose("run_recipe", [f"all.seed={LARGEST}"])
        assert cfg.steps and all(compose(step, cfg).seed == LARGEST for step in cfg.steps)
