"""Experts: the grouped product against its definition, the router's losses, their way through every training script."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_dpo
import train_ppo
import train_rm
import train_sft
from data.tokenizer import load_tokenizer
from model.build import export_model, load_policy, new_policy
from model.experts import GroupedProduct, Stack, grouped_mm, router_loss
from model.packing import pack
from model.weights.mxfp4 import dequantise
from tests.family_checkpoints import checkpoint
from tests.runtime.test_scale import inputs, job  # noqa: F401 - fixtures
from tests.tiny_models import batch_of, random_ids, shaken, tiny_config

SCRIPTS = {"train_sft": train_sft, "train_rm": train_rm, "train_dpo": train_dpo, "train_ppo": train_ppo}
ROWS = batch_of([(random_ids(5, 0), random_ids(30, 1)), (random_ids(3, 2), random_ids(17, 3))], "left")


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)])
@pytest.mark.parametrize("ends", [[4, 4, 10, 11], [0, 0, 0, 11], [11, 11, 11, 11]], ids=str)
@pytest.mark.parametrize("sizes", [(16, 24), (7, 5)], ids=str)
def test_the_grouped_product_and_its_gradients_are_one_product_per_expert(sizes, ends, dtype, error):
    torch.manual_seed(0)
    (d, f), stops = sizes, torch.tensor(ends, dtype=torch.int32)
    x, weight = torch.randn(11, d, dtype=dtype, requires_grad=True), torch.randn(4, d, f, dtype=torch.float64)
    weight = weight.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    owners = torch.searchsorted(stops, torch.arange(11, dtype=torch.int32), right=True)
    mix = torch.randn(11, f, dtype=dtype)
    ours = torch.autograd.grad(GroupedProduct.apply(x, weight, weight.detach().to(dtype), stops), (x, weight), mix)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    truth = torch.autograd.grad((wide[0][:, None] @ wide[1][owners])[:, 0], wide, mix.double())
    for got, want in zip(ours, truth, strict=True):
        assert (got.double() - want).abs().max() <= error * (1 + want.abs().max())
    product = (wide[0][:, None] @ wide[1][owners])[:, 0]
    assert (grouped_mm(x, weight.to(dtype), stops).double() - product).abs().max() <= 10 * error * product.abs().max()


def test_the_balance_loss_of_one_layer_is_that_of_transformers_over_top_k_and_z_is_its_formula():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    policy = shaken(new_policy(tiny_config("olmoe", num_layers=1), seed=0))
    policy.transformer(*pack(*ROWS)[:3])
    logits, _ = policy.transformer.layers[0].mlp.routing
    loss, metrics = router_loss(policy, share=0.5, balance_coef=0.25, z_coef=0.125)
    theirs = mixtral.load_balancing_loss_func((logits,), num_experts=4, top_k=2) / 2  # its f sums to top_k
    z = logits.logsumexp(-1).pow(2).mean()
    assert torch.allclose(loss, 0.5 * (0.25 * theirs + 0.125 * z), rtol=1e-5)
    assert torch.allclose(metrics["experts/balance_loss"].mean(), theirs, rtol=1e-5)
    assert router_loss(policy, share=1.0, balance_coef=1.0, z_coef=1.0) == (0.0, {})  # a routing is read once


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_balance_loss_teaches_the_router_to_share(checkpointing):
    policy = shaken(new_policy(tiny_config("olmoe"), seed=0))
    policy.transformer.checkpointing = checkpointing
    optimizer, balances = torch.optim.SGD(policy.parameters(), lr=0.3), []
    for _ in range(12):
        policy.logprobs(*ROWS)
        loss, metrics = router_loss(policy, share=1.0, balance_coef=1.0, z_coef=0.0)
        loss.backward()
        balances.append(metrics["experts/balance_loss"].mean().item())
        optimizer.step()
        optimizer.zero_grad()
    assert balances[-1] < balances[0] - 0.02 and min(balances) >= 0.99


def test_experts_are_cast_once_for_each_value_of_their_weights():
    policy = shaken(new_policy(tiny_config("olmoe"), seed=0, precision="bf16"))
    stacks = [module for module in policy.modules() if isinstance(module, Stack)]
    optimizer, copies = torch.optim.SGD(policy.parameters(), lr=0.3), []
    for _ in range(2):
        policy.logprobs(*ROWS).sum().backward()
        copies.append([stack.kept[0] for stack in stacks])
    assert len(stacks) == 4 and all(a is b for a, b in zip(*copies, strict=True))
    optimizer.step()
    policy.logprobs(*ROWS)
    for stack, before in zip(stacks, copies[0], strict=True):
        assert stack.kept[0] is not before and torch.equal(stack.kept[0], stack.weight.bfloat16())


def test_without_experts_nothing_is_added_and_frozen_forwards_leave_nothing():
    policy = new_policy(tiny_config(), seed=0)
    policy.logprobs(*ROWS)
    assert router_loss(policy, share=1.0, balance_coef=1.0, z_coef=1.0) == (0.0, {})
    policy = new_policy(tiny_config("olmoe"), seed=0)
    with torch.no_grad():
        policy.logprobs(*ROWS)
    assert router_loss(policy, share=1.0, balance_coef=1.0, z_coef=1.0) == (0.0, {})


SLOW = (pytest.param(name, marks=pytest.mark.slow) for name in ("train_rm", "train_dpo", "train_ppo"))


@pytest.mark.parametrize("name", ["train_sft", *SLOW])
def test_the_router_losses_reach_every_training_script(name, run_script, job, inputs, tmp_path, read_metrics):  # noqa: F811
    """The same run with and without them: experts are measured in both, and the weights come out otherwise."""
    tokenizer = load_tokenizer(inputs / "policy")
    policy = shaken(new_policy(tiny_config("olmoe", vocab_size=400, max_length=1024), seed=0))
    export_model(policy, tmp_path / "moe", tokenizer)
    learned = []
    for coef in (0.0, 5.0):
        words = [f"policy={tmp_path / 'moe'}", f"router.balance_coef={coef}", "num_steps=2"]
        assert run_script(SCRIPTS[name], *job(name, f"run{coef}", *words)[1:]) == 0
        rows = read_metrics(tmp_path / f"run{coef}")
        assert any(row.get("experts/balance_loss", 0) >= 0.99 and "experts/unused" in row for row in rows)
        learned.append(load_file(tmp_path / f"run{coef}" / "model" / "model.safetensors"))
    gate = "model.layers.0.mlp.gate.weight"
    assert (learned[0][gate] - learned[1][gate]).abs().max() > 0


def test_mxfp4_is_read_as_transformers_reads_it(tmp_path):
    """Random blocks and scales in GPT-OSS's own file, against transformers' conversion of the same tensors."""
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    checkpoint("gpt_oss wide", tmp_path)
    weights, draw = load_file(tmp_path / "model.safetensors"), torch.Generator().manual_seed(0)
    packed = [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]
    for name in packed:
        count, inner, out = weights.pop(name).shape
        weights[name + "_blocks"] = torch.randint(0, 256, (count, out, inner // 32, 16), generator=draw).byte()
        weights[name + "_scales"] = torch.randint(118, 124, (count, out, inner // 32), generator=draw).byte()
    save_file(weights, tmp_path / "model.safetensors")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    policy = load_policy(tmp_path)
    for number, layer in enumerate(policy.transformer.layers):
        for ours, theirs in ((layer.mlp.gate_up, "gate_up_proj"), (layer.mlp.down, "down_proj")):
            place = f"model.layers.{number}.mlp.experts.{theirs}"
            pair = weights[place + "_blocks"], weights[place + "_scales"]
            assert torch.equal(ours.weight, convert(*pair, dtype=torch.float32)) and ours.weight.abs().max() > 0
            assert torch.equal(dequantise(*(t[1:2] for t in pair)), ours.weight[1:2])  # a rank reads its own experts
