"""QLoRA: the base's values are the library's, what samples and is exported is what was trained, all scripts, resume."""

import json

import pytest
import torch
from safetensors.torch import load_file

from data.tokenizer import load_tokenizer
from model.build import export_model, load_policy, load_reward_model, new_policy
from model.heads import RewardModel
from model.linear import Linear
from model.lora import AdaptersOff, add_lora, value_on
from model.quantized import NF4Linear, quantize_layers
from model.sampling import generate
from tests.model.test_lora import ROWS, SCRIPTS, trained
from tests.runtime.test_scale import inputs, job, run  # noqa: F401
from tests.tiny_models import tiny_config

functional = pytest.importorskip("bitsandbytes.functional")
NF4 = {"rank": 3, "alpha": 7.0, "targets": ["qkv", "down"], "seed": 5, "base": "nf4"}
WORDS = ["lora.rank=4", "lora.base=nf4"]


@pytest.fixture(autouse=True, scope="module")
def eager():
    """The library compiles its code for CPUs at the first call, which takes half a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 9), (96, 64), (130, 300)])
def test_the_weight_is_the_librarys_to_the_bit(shape, dtype):
    """Odd sizes: blocks of 64 and of 256 scales that are not full."""
    linear = Linear(shape[1], shape[0], bias=False).to(dtype)
    codes, state = functional.quantize_4bit(
        linear.weight.detach(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    layer = NF4Linear(linear, linear.weight.detach())
    expected = functional.dequantize_4bit(codes, state)
    assert torch.equal(layer.dequantized(dtype), expected) and expected.dtype == dtype
    assert 0 < (layer.weight - linear.weight).abs().max() < 0.2 * linear.weight.abs().max()
    held = sum(buffer.nbytes for name, buffer in layer.named_buffers() if name in ("codes", "scales", "wide"))
    assert held <= 0.5 * linear.weight.numel() + linear.weight.numel() / 64 * (1 + 4 / 256) + 8


def test_a_forward_and_its_gradient_are_those_of_the_dequantised_weight():
    policy = trained(tiny_config("qwen2"), base="nf4")
    plain = trained(tiny_config("qwen2"))
    for mine, theirs in zip(policy.transformer.layers.modules(), plain.transformer.layers.modules(), strict=True):
        if isinstance(mine, NF4Linear):
            theirs.weight.data = mine.weight
    losses = [model.logprobs(*ROWS).sum() for model in (policy, plain)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, rtol=1e-6)
    found, expected = ({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (policy, plain))
    assert found.keys() == expected.keys() and all(".lora." in name for name in found)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5) for name in found)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_samples_and_what_is_exported_is_what_was_trained(inputs, tmp_path, precision):  # noqa: F811
    """A young adapter moves log-probs by less than 4 bits do: on the base as its file has it, it would be lost."""
    tokenizer = load_tokenizer(inputs / "policy")
    base = load_policy(inputs / "policy", precision=precision, frozen=True)
    policy = add_lora(base, **NF4)
    for module in policy.modules():
        if getattr(module, "lora", None) is not None:
            module.lora.B.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    trained_to = policy.logprobs(*ROWS).detach()
    export_model(policy, tmp_path / "model", tokenizer)
    exported = load_policy(tmp_path / "model").logprobs(*ROWS).detach()
    before, on_file = AdaptersOff(policy).logprobs(*ROWS), load_policy(inputs / "policy").logprobs(*ROWS).detach()
    assert (exported - trained_to).abs().max() < (1e-5 if precision == "fp32" else 0.05)
    assert (before - on_file).abs().max() > 0.05  # what NF4 moves
    how = dict(max_new_tokens=4, temperature=1.0, top_k=0, top_p=1.0, slots=2, stop_ids=[], pad_id=0)
    made = generate(policy, [[5, 6, 7], [9, 8]], seeds=[1, 2], **how)
    again = policy.logprobs(*made.rows).detach()
    said = torch.tensor([x for row in made.logprobs for x in row])
    assert (again[made.rows.completion_mask] - said).abs().max() < (1e-5 if precision == "fp32" else 0.05)


def test_a_value_model_shares_the_bases_codes():
    policy = add_lora(new_policy(tiny_config(), seed=0).requires_grad_(False), **NF4)
    value_model = add_lora(value_on(policy), **NF4 | {"seed": 6})
    codes = [{b.data_ptr() for n, b in m.named_buffers() if n.endswith("codes")} for m in (policy, value_model)]
    assert codes[0] == codes[1] and len(codes[0]) == 8
    adapters = [{id(p) for p in m.parameters() if p.requires_grad} for m in (policy, value_model)]
    assert not adapters[0] & adapters[1]


def test_what_cannot_be_meant_is_refused():
    policy = new_policy(tiny_config(), seed=0)
    for words, said in (({"rank": 0}, "set lora.rank"), ({"base": "int3"}, "file or nf4")):
        with pytest.raises(ValueError, match=said):
            add_lora(policy, **NF4 | words)
    with pytest.raises(ValueError, match="lora.base=file"):
        quantize_layers(new_policy(tiny_config("olmoe"), seed=0))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_trains_resumes_and_exports(inputs, run_script, job, tmp_path, monkeypatch, name):  # noqa: F811
    """Two steps, and one with a resume to two: the same bytes. The export is the base's values plus the adapter."""
    quiet = [*WORDS, "eval_every=0", "sample_every=0", "save_every=1"]
    quiet += {"train_ppo": ["value_start=policy", "kl_exact_every=0"], "train_rm": ["normalise=none"]}.get(name, [])
    parts = (("parts", 1), ("parts", 2)) if name in ("train_sft", "train_ppo") else ()
    for directory, steps in (("whole", 2), *parts):
        _, *words = job(name, directory, *quiet, f"num_steps={steps}", "resume=true", "resume_anyway=true")
        assert run_script(SCRIPTS[name], *words) == 0
    files = [(tmp_path / d / "model" / "model.safetensors").read_bytes() for d in {"whole", *dict(parts)}]
    assert files[0] == files[-1]
    adapter = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    assert any("lora_B" in key and tensor.abs().max() > 0 for key, tensor in adapter.items())
    load = load_reward_model if name == "train_rm" else load_policy
    how = {"precision": "fp32"}
    model = load(tmp_path / "whole" / "model", **how)
    start = (
        load_reward_model(inputs / "policy", seed=0, **how) if name == "train_rm" else load_policy(inputs / "policy")
    )
    mine = add_lora(
        start.requires_grad_(False), **NF4 | {"rank": 4, "alpha": 16, "targets": ["qkv", "out", "gate_up", "down"]}
    )
    merged = model.transformer.layers[0].attention.out.weight
    key = "base_model.model.model.layers.0.self_attn.o_proj.lora_{}.weight"
    delta = adapter[key.format("B")] @ adapter[key.format("A")] * 4
    assert torch.allclose(merged, mine.transformer.layers[0].attention.out.weight + delta, atol=1e-6)
    assert isinstance(model, RewardModel) == (name == "train_rm")


@pytest.mark.slow
def test_two_ranks_train_as_one(inputs, job, tmp_path):  # noqa: F811
    names = ("train_sft", "train_dpo")
    for ranks in (1, 2):
        words = [*WORDS, "num_steps=3", "save_every=0", "sample_every=0", f"micro_batch_size={4 // ranks}"]
        run(ranks, [job(name, f"{ranks}_{name}", *words) for name in names], tmp_path)
    for name in names:
        one, two = (
            [json.loads(x) for x in (tmp_path / f"{r}_{name}" / "metrics.jsonl").read_text().splitlines()]
            for r in (1, 2)
        )
        assert one[-1]["objective/loss"] == pytest.approx(two[-1]["objective/loss"], rel=1e-5)
        left, right = (load_file(tmp_path / f"{r}_{name}" / "model" / "model.safetensors") for r in (1, 2))
        assert max((left[key] - right[key]).abs().max() for key in left) < 1e-4
