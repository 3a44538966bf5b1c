"""Adapters on experts: what peft computes and learns, the directories that it writes, and those that are not clear."""

import json

import pytest
import torch
from safetensors.torch import save_file

import train_ppo
import train_sft
from data.tokenizer import load_tokenizer
from model.build import export_model, load_policy, new_policy, open_weights
from model.experts import Stack
from model.footprint import adapter_parameters
from model.lora import TARGETS, AdaptersOff, Lora, adapters, add_lora, export_adapter, merge_noise
from model.packing import pack
from model.sampling import decoding
from tests.family_checkpoints import checkpoint
from tests.model.test_families import Words, our_logprobs, their_logprobs
from tests.runtime.test_scale import inputs, job  # noqa: F401 - fixtures
from tests.tiny_models import batch_of, random_ids, shaken, tiny_config

peft = pytest.importorskip("peft")
NAMES = ("qwen3_moe with dense layers", "qwen2_moe", "olmoe", "mixtral", "gpt_oss", "qwen3_5_moe")
ROWS = batch_of([(random_ids(5, 0), random_ids(9, 1)), (random_ids(3, 2), random_ids(12, 3))], "left")


def drawn(policy, targets=TARGETS):
    """The policy with adapters that have moved."""
    policy = add_lora(policy, rank=3, alpha=7.0, targets=list(targets), seed=5)
    with torch.no_grad():
        for number, lora in enumerate(adapters(policy).values()):
            lora.B.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
    return policy


@pytest.mark.parametrize("name", NAMES)
def test_the_gradients_of_experts_adapters_are_those_of_peft(name, tmp_path):
    theirs = checkpoint(name, tmp_path / "base")
    policy = drawn(load_policy(tmp_path / "base", frozen=True))
    export_adapter(policy, tmp_path / "adapter", str(tmp_path / "base"))
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True).eval()
    ours, expected = our_logprobs(policy), their_logprobs(adapted)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    mix = torch.linspace(-1, 1, len(expected))
    (ours * mix).sum().backward()
    (expected * mix).sum().backward()
    grads = {n.replace(".default.", "."): p.grad for n, p in adapted.named_parameters() if ".lora_" in n}
    bound = 4e-5 if policy.config.facts.linear else 2e-5  # as in test_families
    found = {name: lora for name, lora in adapters(policy).items() if lora.on_experts}
    assert found and all(weight.grad is None for key, weight in policy.named_parameters() if ".lora." not in key)
    for name, lora in found.items():
        place = name.replace("transformer.layers", "base_model.model.model.layers")
        place = place.replace("gate_up", "experts.base_layer").replace("down", "experts")
        A, B = (grads[f"{place}.lora_{side}.weight"] for side in "AB")
        B = B.unflatten(1, (-1, lora.count)).permute(2, 0, 1).flatten(0, 1)
        for grad, truth in ((lora.A.grad, A), (lora.B.grad, B)):
            assert (grad - truth).abs().max() <= bound * truth.abs().max(), name


@pytest.mark.parametrize("targets", [("gate_up",), ("down",), ("qkv", "down")], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_an_adapter_on_one_of_the_matrices_is_read_by_peft_and_by_us(name, targets, tmp_path):
    theirs = checkpoint(name, tmp_path / "base")
    policy = drawn(load_policy(tmp_path / "base", frozen=True), targets)
    export_adapter(policy, tmp_path / "adapter", str(tmp_path / "base"))
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        ours = our_logprobs(policy)
        for other in (their_logprobs(adapted), our_logprobs(load_policy(tmp_path / "adapter"))):
            assert (other - ours).abs().max() < 1e-5 * ours.abs().max()


def made_by_peft(base, model, directory, **settings):
    """peft's own directory of random adapters on the model, with its base set to `base`. Returns the adapted model."""
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for number, (name, weight) in enumerate(adapted.named_parameters()):
            if ".lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    adapted.save_pretrained(directory)
    edit(directory, base_model_name_or_path=str(base))
    return adapted


def edit(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_on_the_only_expert_of_a_gpt_oss_is_read(tmp_path):
    config = tiny_config("gpt_oss", num_experts=1, experts_per_token=1)
    export_model(shaken(new_policy(config, seed=0)), tmp_path / "base", Words())
    policy = drawn(load_policy(tmp_path / "base", frozen=True))
    export_adapter(policy, tmp_path / "adapter", str(tmp_path / "base"))
    with torch.no_grad():
        ours, reread = policy.logprobs(*ROWS), load_policy(tmp_path / "adapter").logprobs(*ROWS)
    assert (reread - ours).abs().max() < 1e-5 * ours.abs().max()


SOME = ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj", "0.mlp.experts.down_proj"]


@pytest.mark.parametrize("name, router", [("mixtral", "gate"), ("gpt_oss", "router"), ("qwen3_5_moe", "gate")])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_directory_of_peft_with_adapters_on_experts_of_some_layers_and_on_routers_is_read(
    name, router, rslora, tmp_path
):
    theirs = checkpoint(name, tmp_path / "base")
    base = their_logprobs(theirs).detach()
    targets = [*SOME, f"mlp.{router}.weight"]
    adapted = made_by_peft(
        tmp_path / "base", theirs, tmp_path / "adapter", target_parameters=targets, use_rslora=rslora
    )
    with torch.no_grad():
        ours, expected = our_logprobs(load_policy(tmp_path / "adapter")), their_logprobs(adapted)
    assert (expected - base).abs().max() > 0.1
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_an_older_directory_with_an_adapter_for_each_experts_matrices_is_read_as_peft_reads_it(name, tmp_path):
    theirs = checkpoint(name, tmp_path / "base")
    reader, weights, targets = open_weights(tmp_path / "base"), {}, set()
    for number, key in enumerate(sorted(n for n in reader.names() if ".experts." in n or "q_proj" in n)):
        place, draw = key.removesuffix(".weight"), torch.Generator().manual_seed(number)
        out, inner = reader.shape(key)
        weights[f"base_model.model.{place}.lora_A.weight"] = 0.3 * torch.randn(3, inner, generator=draw)
        weights[f"base_model.model.{place}.lora_B.weight"] = 0.3 * torch.randn(out, 3, generator=draw)
        targets.add(place.rpartition(".")[2])
    (tmp_path / "adapter").mkdir()
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    raw = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 7.0, "target_modules": sorted(targets)}
    raw |= {"base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(raw))
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        ours, expected = our_logprobs(load_policy(tmp_path / "adapter")), their_logprobs(adapted)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("named", [None, ["mlp.experts.down_proj"], ["experts.gate_up_proj"]], ids=str)
def test_adapters_on_experts_whose_parameters_are_not_named_are_refused(named, tmp_path):
    made_by_peft(
        tmp_path / "base",
        checkpoint("olmoe", tmp_path / "base"),
        tmp_path / "adapter",
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    edit(tmp_path / "adapter", target_parameters=named)
    with pytest.raises(ValueError, match=r"2 adapters on model\.layers\..* write target_parameters as peft saved it"):
        load_policy(tmp_path / "adapter")


@pytest.mark.parametrize("size", [1e-2, 1e-4])
def test_a_young_adapter_of_experts_is_seen_whole_in_bf16(size):
    """The mean effect is what the adapter adds: none is lost to rounding. As in training, so in sampling."""
    stack = Stack(2, 64, 96, bias=False).to(torch.bfloat16)
    stack.lora = Lora(stack, rank=4, alpha=4, generator=torch.Generator().manual_seed(0))
    x, ends = torch.randn(2000, 64, generator=torch.Generator().manual_seed(1)).bfloat16(), torch.tensor([900, 2000])
    owners = (torch.arange(2000) >= 900).long()
    with torch.no_grad():
        stack.weight.normal_(0, 1 / 8)
        stack.lora.B.normal_(0, size)
        seen = []
        for prepared in (False, True):
            if prepared:
                stack.prepare(torch.bfloat16, 2000, adapted=True)
            base, adapted = (stack.grouped(x, owners, ends.int(), adapted=on) for on in (False, True))
            seen.append(adapted.float() - base.float())
        A, B = (weight.bfloat16().float().unflatten(0, (2, -1)) for weight in (stack.lora.A, stack.lora.B))
        truth = torch.cat([x[:900].float() @ A[0].T @ B[0].T, x[900:].float() @ A[1].T @ B[1].T])
    for added in seen:
        assert (added * truth).sum() / truth.square().sum() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("targets", [("gate_up",), ("down",)], ids=str)
def test_the_reference_of_adapters_on_experts_is_the_base(targets):
    base = shaken(new_policy(tiny_config("olmoe"), seed=0))
    before = base.logprobs(*ROWS).detach()
    policy = drawn(base, targets)
    assert torch.equal(AdaptersOff(policy).logprobs(*ROWS), before) and not torch.equal(policy.logprobs(*ROWS), before)


def test_decoding_has_the_adapters_of_experts():
    policy, prompt = drawn(shaken(new_policy(tiny_config("olmoe"), seed=0))), random_ids(9, 1)
    stream = pack(*batch_of([(prompt, [5])], "left"))
    with torch.no_grad():
        trained = policy.logprobs(*batch_of([(prompt, [5])], "left")).sum()
        with decoding(policy, 1):
            last = stream.predicts
            sampled = policy(stream.tokens, stream.positions, stream.blocks, last).log_softmax(-1)[0, 5]
    assert sampled.item() == pytest.approx(trained.item(), abs=1e-5)


def test_adapters_of_experts_are_counted_and_their_rounding_is_measured():
    config = tiny_config("qwen2_moe")
    policy = drawn(shaken(new_policy(config, seed=0)))
    learning = sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
    assert learning == adapter_parameters(config, 3)
    assert sum(lora.on_experts for lora in adapters(policy).values()) == 2 * config.num_layers
    assert 0 < merge_noise(policy) < 1


def test_sft_learns_adapters_on_experts_and_exports_them_merged(run_script, job, inputs, tmp_path):  # noqa: F811
    policy = shaken(new_policy(tiny_config("olmoe", vocab_size=400, max_length=1024), seed=0))
    export_model(policy, tmp_path / "moe", load_tokenizer(inputs / "policy"))
    words = [f"policy={tmp_path / 'moe'}", "lora.rank=2", "num_steps=2", "optim.lr=0.1"]
    assert run_script(train_sft, *job("train_sft", "run", *words)[1:]) == 0
    merged, learned = load_policy(tmp_path / "run" / "model"), load_policy(tmp_path / "run" / "adapter")
    stack = "transformer.layers.1.mlp.down.weight"
    ours, base = dict(merged.named_parameters())[stack], dict(policy.named_parameters())[stack]
    assert (ours - base).abs().max() > 1e-3
    assert torch.allclose(ours, dict(learned.named_parameters())[stack], atol=1e-6)


def test_a_server_that_gets_adapters_gets_none_on_experts(run_script, job, inputs, tmp_path, capsys):  # noqa: F811
    policy = shaken(new_policy(tiny_config("olmoe", vocab_size=400, max_length=1024), seed=0))
    export_model(policy, tmp_path / "moe", load_tokenizer(inputs / "policy"))
    words = [f"policy={tmp_path / 'moe'}", "lora.rank=2", "engine=vllm", "engine.weights=lora"]
    words.append("engine.url=http://127.0.0.1:1")
    assert run_script(train_ppo, *job("train_ppo", "run", *words)[1:]) == 2
    assert "lora.targets=[qkv,out]" in capsys.readouterr().err
