import json
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from tiny_models import tiny_config

import model.transformer
import plan
from model.build import empty, init_weights
from model.chunks import Chunks
from model.config import ModelConfig
from model.footprint import (
    Forward,
    _recomputed,
    cache_bytes,
    count_parameters,
    delta_flops,
    forward_flops,
    kept_bytes,
)
from model.gated_delta import gated_delta
from model.heads import Policy
from model.kv_cache import KVCache
from model.lora import add_lora
from model.packing import make_rows, pack
from runtime.optim import build_optimizer, init_state
from tests.test_train_rm import inputs, rm  # noqa: F401 - fixtures

ROOT = Path(__file__).parents[1]
PUBLISHED = {  # parameters, from the model cards' files; Qwen3.5, Qwen3-Next: of transformers' model of these sizes
    "smollm2_135m": 134_515_008, "llama2_7b": 6_738_415_616, "llama3_8b": 8_030_261_248, "mistral_7b": 7_241_732_096,
    "qwen2_5_0_5b": 494_032_768, "llama3_70b": 70_553_706_496, "qwen3_0_6b": 596_049_920, "qwen3_8b": 8_190_735_360,
    "smollm3_3b": 3_075_098_624, "ministral_8b": 8_019_808_256, "olmo2_7b": 7_298_617_344, "olmo3_7b": 7_298_011_136,
    "gemma3_270m": 268_098_176, "gemma3_1b": 999_885_952, "gemma2_2b": 2_614_341_888, "olmoe_7b": 6_919_161_856,
    "qwen3_30b_a3b": 30_532_122_624, "mixtral_8x7b": 46_702_792_704, "gpt_oss_20b": 20_914_757_184,
    "qwen1_5_moe_a2_7b": 14_315_784_192, "pythia_1b": 1_011_781_632, "pythia_6_9b": 6_857_302_016,
    "qwen3_5_0_8b": 752_393_024, "qwen3_5_4b": 4_205_751_296, "qwen3_5_9b": 8_953_803_264,
    "qwen3_5_27b": 26_895_998_464, "phi3_mini": 3_821_079_552, "phi4": 14_659_507_200,
    "qwen3_5_35b_a3b": 34_660_610_688, "qwen3_next_80b_a3b": 79_674_391_296,
    "phi4_mini": 3_836_021_760, "granite3_8b": 8_170_848_256, "qwen3_1_7b": 1_720_574_976, "qwen3_4b": 4_022_468_096,
    "qwen2_5_1_5b": 1_543_714_304, "qwen2_5_7b": 7_615_616_512, "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    sizes = yaml.safe_load((ROOT / f"conf/model/{name}.yaml").read_text())
    assert count_parameters(ModelConfig(**sizes)).total == PUBLISHED[name]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_5_text"])
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_counted_activations_are_those_of_a_real_forward(family, compute):
    config = tiny_config(family, num_layers=3)
    if family == "qwen3_moe":
        config = tiny_config(family, num_layers=3, expert_layers=(False, True, True))
    if family == "qwen3_5_text":
        config = tiny_config(family, num_layers=3, layer_kinds=("linear", "linear", "full"))
    policy = Policy(config, compute)
    ids = torch.randint(0, 97, (4, 23)).tolist()
    stream = pack(*make_rows([{"input_ids": row, "completion_mask": [False] * 23} for row in ids], pad_id=0))
    policy.transformer(stream.tokens, stream.positions, stream.blocks)  # makes the weights' copies in bf16
    copies = [part.kept[0] for part in policy.modules() if getattr(part, "kept", None)]
    own, kept = {p.untyped_storage().data_ptr() for p in [*policy.parameters(), *copies]}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.transformer(stream.tokens, stream.positions, stream.blocks)
    dtype, master = compute or torch.float32, torch.float32
    forward = Forward(rows=4, length=23, dtype=dtype, master=master, fused_attention=False, checkpointing=False)
    counted = kept_bytes(config, forward)
    real = sum(size for size, _ in kept.values())
    again = _recomputed(config, 4, 23, compute or torch.float32) if config.facts.linear else 0  # not yet kept here
    assert abs(3 * counted.layer + counted.rest - again - real) / real < 0.01


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text"])
def test_the_cache_is_as_large_as_planned(family):
    config = tiny_config(family, num_layers=3)
    cache = KVCache(config, slots=5, length=64, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert cache_bytes(config, rows=5, length=64, itemsize=2) == cache.nbytes


def test_products_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config(num_layers=2)
    policy, ids = Policy(config), torch.randint(0, 97, (1, 40))
    rows = (ids, torch.ones(1, 40, dtype=torch.bool), torch.ones(1, 40, dtype=torch.bool))
    rows[2][:, 0] = False
    stream = pack(*rows)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy(stream.tokens, stream.positions, stream.blocks, stream.predicts)
    # The written-out attention multiplies the whole square, a causal one needs half of it.
    square = forward_flops(config, tokens=40, length=40, targets=39)
    square += forward_flops(config, tokens=40, length=40, targets=0) - forward_flops(
        config, tokens=40, length=0, targets=0
    )
    assert counter.get_total_flops() == pytest.approx(square, rel=0.01)


def test_products_of_layers_with_and_without_experts_are_their_sum():
    """Two layers, of which one has experts, cost the mean of two with and two without; at the end only one token."""
    layers = {"mixed": [False, True], "turned": [True, False], "dense": [False]}
    configs = {
        name: tiny_config("qwen3_moe", expert_layers=experts, experts_per_token=3) for name, experts in layers.items()
    }
    configs["experts"] = tiny_config("qwen3_moe", expert_layers=[], dense_size=0, experts_per_token=3)
    flops = {name: forward_flops(config, tokens=40, length=40, targets=40) for name, config in configs.items()}
    assert flops["mixed"] == flops["turned"] == (flops["dense"] + flops["experts"]) / 2
    saved = {name: flops[name] - forward_flops(configs[name], tokens=40, length=40, targets=1) for name in flops}
    assert saved["mixed"] == saved["experts"] and saved["turned"] == saved["dense"]
    assert saved["experts"] - saved["dense"] == 2 * 39 * 3 * 48 * (3 * 80 - 56)


def test_products_of_a_recurrence_are_those_that_torch_counts():
    """But for the triangular systems, which it does not count, and the first chunk, which reads no state."""
    from torch.utils.flop_counter import FlopCounterMode

    config, tokens = tiny_config("qwen3_5_text"), 64 * 40
    H, K, key, value = (
        config.linear_value_heads,
        config.linear_key_heads,
        config.linear_key_dim,
        config.linear_value_dim,
    )
    q, k, v = (torch.randn(tokens, heads, size) for heads, size in ((K, key), (K, key), (H, value)))
    with FlopCounterMode(display=False) as counter:
        gated_delta(q, k, v, -torch.rand(tokens, H), torch.rand(tokens, H), Chunks([[0, tokens]], torch.device("cpu")))
    solved = 2 * tokens * 64 * (key + value) / 2 * H
    assert counter.get_total_flops() + solved == pytest.approx(tokens * delta_flops(config), rel=0.02)


def planned(*words: str) -> dict:
    out = ROOT / "plan.py"
    code = (
        "import json,sys; sys.path.insert(0, '.'); import plan; from runtime.script import enter; "
        "enter(lambda cfg: print(json.dumps(plan.report(cfg))), 'plan')"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_zephyr_fits_on_eight_and_a_full_8b_does_not_fit_on_one():
    eight = planned("script=train_dpo", 'overrides=["batch_size=128","precision=bf16"]', "num_gpus=8")
    assert eight["fits"] and eight["suggestion"] is None
    recomputed = '["precision=bf16","activation_checkpointing=true"]'
    one = planned("script=train_dpo", "model=llama3_8b", f"overrides={recomputed}", "num_gpus=1")
    assert not one["fits"] and one["total_gb"] > 16 * 8.03  # sixteen bytes a parameter, and more
    assert one["suggestion"] == "num_gpus=2"


def compose_all(script, words):
    """The plan's config, its job and the script's own config, all composed."""
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = hydra.compose("plan", [f"script={script}", *words])
        return cfg, plan.read_job(cfg), hydra.compose(script, list(cfg.overrides))


@pytest.mark.parametrize("script", plan.SCRIPTS)
def test_every_change_that_a_plan_advises_is_one_that_the_script_takes(script):
    """The plan's trial and the script's own config are composed with it, and are of the advised value."""
    cfg, job, _ = compose_all(script, [])
    advised = [change for change in plan.changes(job, cfg)]
    assert {"activation_checkpointing", "micro_batch_size", "num_gpus", "lora.rank"} == set().union(*advised)
    for change in advised:
        trial = plan.changed(cfg, change)
        words = [f"overrides={json.dumps(list(trial.overrides))}", f"num_gpus={min(trial.num_gpus, 4)}"]
        _, changed, own = compose_all(script, words)
        for key, value in change.items():
            assert key == "num_gpus" or OmegaConf.select(own, key) == (value == "true" or value)
        assert key == "num_gpus" or changed != job


@pytest.mark.parametrize("script", plan.SCRIPTS)
def test_a_plan_is_of_the_scripts_own_settings(script):
    """What a plan assumed of its own accord (recomputed layers, say) was not what the script would run."""
    _, job, own = compose_all(script, [])
    assert (job.checkpointing, job.lora_rank, job.micro_rows) == (
        own.activation_checkpointing,
        own.lora.rank,
        own.micro_batch_size * (2 if script in plan.SCRIPTS[1::2] else 1),
    )
    _, job, _ = compose_all(script, ['overrides=["activation_checkpointing=true","lora.rank=3","precision=fp32"]'])
    assert (job.checkpointing, job.lora_rank, job.dtype) == (True, 3, torch.float32)


ROLLOUTS = '"minibatch_size=128","sampling.max_new_tokens=512"'
FITS = {  # a row of docs/scaling.md: words of the plan, GB per GPU at most
    "8B PPO on eight": (["script=train_ppo", "model=llama3_8b", "num_gpus=8",
                         f'overrides=["scale=8b","batch_size=512",{ROLLOUTS}]'], 60),
    "1.7B PPO": (["script=train_ppo", "model=smollm2_1_7b", "num_gpus=1",
                  f'overrides=["scale=1b","batch_size=128",{ROLLOUTS}]'], 0.92 * 80),
    "8B PPO with LoRA": (["script=train_ppo", "model=llama3_8b", "num_gpus=1", 'overrides=["scale=8b","batch_size=128",'
                          f'"lora.rank=16","value_start=policy",{ROLLOUTS}]'], 60),
    "8B SFT on 24 GB": (["script=train_sft", "model=llama3_8b", "gpu=rtx4090", "num_gpus=1",
                         'overrides=["scale=8b","lora.rank=16","lora.base=nf4"]'], 0.92 * 24),
    "8B DPO on 24 GB": (["script=train_dpo", "model=llama3_8b", "gpu=rtx4090", "num_gpus=1",
                         'overrides=["scale=8b","lora.rank=16","lora.base=nf4"]'], 0.92 * 24),
    "70B DPO on two": (["script=train_dpo", "model=llama3_70b", "num_gpus=2",
                        'overrides=["scale=70b","lora.rank=16","lora.base=nf4"]'], 0.92 * 80),
}  # fmt: skip


@pytest.mark.parametrize("row", FITS)
def test_what_a_person_has_is_enough(row):
    """Rows of 1,024 tokens; every setting is composed by the script."""
    words, limit = FITS[row]
    cfg, job, own = compose_all(
        words[0].removeprefix("script="), [*words, "prompt_tokens=512", "completion_tokens=512"]
    )
    config = ModelConfig(**OmegaConf.to_container(cfg.model))
    assert job.checkpointing and own.precision == "auto"
    assert sum(plan.memory(config, job, cfg).values()) / plan.GB <= limit


@pytest.mark.parametrize("base", ["file", "nf4"])
def test_a_frozen_base_rests_in_as_many_bytes_as_planned(base):
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    config = tiny_config(vocab_size=300, hidden_size=256, intermediate_size=512, num_heads=8, head_dim=32)
    policy = add_lora(
        load_frozen(config), rank=4, alpha=4, targets=["qkv", "out", "gate_up", "down"], seed=0, base=base
    )
    stored = [*policy.named_parameters(), *policy.named_buffers()]
    tables = ("levels", "values", "shift")  # of NF4: the same 1 KB for each product, whatever its size
    real = sum(x.nbytes for name, x in stored if ".lora." not in name and not name.endswith(tables))
    counted = plan.resting(plan.Networks(1, 1), count_parameters(config), 2, 1, nf4=base == "nf4")
    assert counted == pytest.approx(real, rel=0.01)
    adapters = sum(x.numel() for name, x in stored if ".lora." in name)
    assert plan.adapter_parameters(config, 4) == adapters


def load_frozen(config):
    """A policy as load_policy(precision="bf16", frozen=True) leaves it."""
    return init_weights(empty(Policy, config, "bf16", True), 0).requires_grad_(False)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "muon"])
def test_moments_take_as_many_bytes_as_planned(kind):
    config = tiny_config(vocab_size=300, hidden_size=256, intermediate_size=512, num_heads=8, head_dim=32)
    policy = Policy(config)
    _, job, own = compose_all("train_sft", [f'overrides=["optim={kind}"]'])
    optimizer = build_optimizer(policy, own.optim)
    init_state(optimizer)
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    real, P = sum(x.nbytes for x in tensors), count_parameters(config)
    assert plan.moment_bytes(job, P) * P.total == pytest.approx(real, rel=0.01)


def test_a_group_baseline_has_no_value_model():
    words = '"samples_per_prompt=2","advantage={}"'
    config = ModelConfig(**yaml.safe_load((ROOT / "conf/model/smollm2_135m.yaml").read_text()))
    totals = {}
    for kind in ("gae", "grpo"):
        cfg, job, _ = compose_all("train_ppo", [f"overrides=[{words.format(kind)}]", "num_gpus=1"])
        totals[kind] = plan.memory(config, job, cfg)
    size = count_parameters(config).total
    assert totals["gae"]["weights"] - totals["grpo"]["weights"] == 4 * size
    assert totals["gae"]["optimizer"] - totals["grpo"]["optimizer"] == 8 * size


def test_a_reward_model_may_recompute_its_layers_to_the_same_gradient(rm, read_metrics, tmp_path, monkeypatch):  # noqa: F811
    layers, recompute = [], model.transformer.checkpoint
    monkeypatch.setattr(model.transformer, "checkpoint", lambda *x, **y: layers.append(1) or recompute(*x, **y))
    for word in ("false", "true"):
        assert rm(f"activation_checkpointing={word}", "data.eval=[]", "num_steps=2", run=word) == 0
        assert bool(layers) == (word == "true")
    assert read_metrics(tmp_path / "false") == read_metrics(tmp_path / "true")


def test_a_plan_that_a_script_would_refuse_says_what_to_change():
    """PPO's own minibatch on eight GPUs: a smaller part of it changes memory alone."""
    given = {"script": "train_ppo", "num_gpus": 8, "overrides": [], "completion_tokens": 9, "prompt_tokens": 9}
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base=None):
        with pytest.raises(ValueError, match="minibatch_size=64 .* x 8 ranks = 128; use 128, or micro_batch_size=8$"):
            plan.read_job(OmegaConf.create(given))
        assert plan.read_job(OmegaConf.create(given | {"overrides": ["micro_batch_size=8"]})).rows == 64


@pytest.mark.parametrize("script", plan.SCRIPTS)
def test_an_epoch_is_all_rows_of_the_data_once(script):
    """A row is a conversation, a pair, or a prompt, from which PPO samples several times."""
    more = ["samples_per_prompt=8", "advantage=grpo"] if script == "train_ppo" else []
    overrides = ",".join(f'"{word}"' for word in ["batch_size=64", "micro_batch_size=8", *more])
    words = [f"script={script}", f"overrides=[{overrides}]", "num_gpus=1", "dataset_rows=6400", "model=smollm2_135m"]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base=None):
        planned = plan.report(hydra.compose("plan", words))
    assert planned["hours_per_epoch"] == pytest.approx(100 * sum(planned["seconds"].values()) / 3600)


def test_wrong_plans_are_refused():
    cfg = OmegaConf.create({"script": "train_foo"})
    with pytest.raises(ValueError, match="train_foo"):
        plan.check_plan(cfg)


@pytest.mark.slow
def test_memory_is_within_a_tenth_of_what_a_process_holds():
    done = subprocess.run(
        [sys.executable, "-m", "bench.plan_vs_measured", *plan.SCRIPTS],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=1800,
    )
    rows = [line.split() for line in done.stdout.splitlines() if "planned" in line]
    assert len(rows) == 4, done.stderr[-3000:]
    for name, *_, ratio in rows:
        assert 0.9 < float(ratio) < 1.1, f"{name}: planned / measured = {ratio}"
