"""LoRA: merged = adapters on, peft reads the same model, only adapters and heads learn, the reference is the base."""

import math

import pytest
import torch
from safetensors.torch import load_file

import train_dpo
import train_ppo
import train_rm
import train_sft
from data.tokenizer import load_tokenizer
from model.build import export_model, load_policy, load_reward_model, load_value_model, new_policy
from model.linear import Linear
from model.lora import AdaptersOff, Lora, adapters, add_lora, export_adapter, merge_noise, value_on
from model.packing import make_rows, pack
from model.sampling import decoding, generate
from tests.runtime.test_scale import inputs, job  # noqa: F401 - fixtures
from tests.tiny_models import batch_of, random_ids, shaken, tiny_config

LORA = {"rank": 3, "alpha": 7.0, "targets": ["qkv", "out", "gate_up", "down"], "seed": 5}
ROWS = batch_of([(random_ids(5, 1), random_ids(4, 2)), (random_ids(3, 3), random_ids(7, 4))], "right")
SCRIPTS = {"train_sft": train_sft, "train_rm": train_rm, "train_dpo": train_dpo, "train_ppo": train_ppo}


def trained(config, **changes):
    """A policy whose adapters have moved."""
    policy = add_lora(shaken(new_policy(config, seed=0)), **(LORA | changes))
    with torch.no_grad():
        for number, lora in enumerate(adapters(policy).values()):
            lora.B.normal_(0, 0.3, generator=torch.Generator().manual_seed(number))
    return policy


def total(policy):
    return policy.logprobs(*ROWS).sum(1)


def test_learning_starts_at_the_base_and_only_adapters_learn():
    policy = new_policy(tiny_config(), seed=0)
    before = total(policy).detach()
    add_lora(policy, **LORA)
    assert torch.equal(total(policy), before)
    total(policy).sum().backward()
    learning = {name for name, weight in policy.named_parameters() if weight.grad is not None}
    assert learning == {name for name, _ in policy.named_parameters() if ".lora." in name} and len(learning) == 16


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_merged_export_is_the_policy_with_its_adapters_on(inputs, tmp_path, family):  # noqa: F811
    policy = trained(tiny_config(family, vocab_size=400))
    export_model(policy, tmp_path / "model", load_tokenizer(inputs / "policy"))
    merged = load_policy(tmp_path / "model")
    assert (total(merged) - total(policy)).abs().max() < 1e-4  # nats of a whole row
    assert (merged.logprobs(*ROWS) - policy.logprobs(*ROWS)).abs().max() < 1e-5
    assert (total(merged) - total(AdaptersOff(policy))).abs().max() > 0.1


def test_peft_loads_the_adapter_with_the_same_logits(inputs, tmp_path):  # noqa: F811
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    policy, tokenizer = trained(tiny_config(vocab_size=400)), load_tokenizer(inputs / "policy")
    base = add_lora(new_policy(policy.config, seed=0), **LORA)
    base.load_state_dict({n: torch.zeros_like(w) if ".lora." in n else w for n, w in policy.state_dict().items()})
    export_model(base, tmp_path / "base", tokenizer)
    export_adapter(policy, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    ids = torch.tensor([random_ids(9, 7)])
    with torch.no_grad():
        everything = torch.ones_like(ids, dtype=torch.bool)
        stops = torch.arange(ids.shape[1]) > 0
        ours = policy.logprobs(ids, everything, stops[None])[0, 1:]
        want = theirs(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).squeeze(1)
    assert (ours - want).abs().max() < 1e-4


@pytest.mark.parametrize("kind, auto", [("reward", "SequenceClassification"), ("value", "TokenClassification")])
def test_peft_loads_an_adapter_with_its_head(inputs, tmp_path, kind, auto):  # noqa: F811
    """On a base with biases of q, k and v, and on some products alone. peft has no bias of the head: it lies beside."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    policy = shaken(new_policy(tiny_config("qwen2", vocab_size=400), seed=0))
    export_model(policy, tmp_path / "base", load_tokenizer(inputs / "policy"))
    load = {"reward": load_reward_model, "value": load_value_model}[kind]
    few = LORA | {"rank": 1, "targets": ["qkv", "down"]}
    model = add_lora(load(tmp_path / "base", precision="fp32", frozen=True, seed=3), **few)
    with torch.no_grad():
        for number, lora in enumerate(adapters(model).values()):
            lora.B.normal_(0, 0.3, generator=torch.Generator().manual_seed(number))
        model.head.bias.fill_(0.5)
    export_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    base = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(tmp_path / "base", num_labels=1)
    base.config.pad_token_id = 0
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([random_ids(9, 7)])
    rows = ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(9)[None] > 0
    bias = load_file(tmp_path / "adapter" / "head.safetensors")["score.bias"]
    with torch.no_grad():
        if kind == "reward":
            ours, want = model.score(*rows), theirs(ids).logits[:, 0]
        else:  # column t speaks of the state before token t
            ours, want = model(*rows)[0, 1:], theirs(ids).logits[0, :-1, 0] - bias
    assert (ours - bias - want).abs().max() < 1e-4


def test_the_reference_shares_every_weight_and_is_the_base():
    policy = trained(tiny_config())
    plain = shaken(new_policy(tiny_config(), seed=0))
    reference = AdaptersOff(policy)
    assert set(reference.parameters()) == set(policy.parameters())
    with torch.no_grad():
        assert torch.equal(reference.logprobs(*ROWS), plain.logprobs(*ROWS))
        kl = policy.exact_kl(reference, *ROWS)
        assert torch.allclose(kl, policy.exact_kl(plain, *ROWS), atol=1e-6) and kl.sum() > 1
    assert policy.adapted


def test_policy_and_value_share_one_base_and_learn_apart():
    policy = trained(tiny_config())
    value_model = add_lora(value_on(policy), **LORA)
    own = {name for name, weight in value_model.named_parameters() if weight not in set(policy.parameters())}
    assert own == {name for name, _ in value_model.named_parameters() if ".lora." in name or name.startswith("head.")}
    before = policy.logprobs(*ROWS).detach()
    with torch.no_grad():
        value_model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
        plain = value_model(*ROWS)
        for lora in adapters(value_model).values():
            lora.B.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    assert (value_model(*ROWS) - plain).abs().max() > 0.01  # its adapters are read, and the policy does not see them
    assert torch.equal(policy.logprobs(*ROWS), before)
    value_model(*ROWS).sum().backward()
    assert all(weight.grad is None for weight in policy.parameters())


def test_recomputed_layers_see_the_adapters():
    policy, grads = trained(tiny_config()), []
    for recompute in (False, True):
        policy.transformer.checkpointing = recompute
        policy.zero_grad()
        loss = total(policy).sum()
        AdaptersOff(policy).logprobs(*ROWS)  # between forward and backward
        loss.backward()
        grads.append([lora.B.grad.clone() for lora in adapters(policy).values()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_sampling_merges_the_adapters():
    policy = trained(tiny_config())
    how = dict(max_new_tokens=5, temperature=0.0, top_k=0, top_p=1.0, slots=2, stop_ids=[], seeds=[0, 1], pad_id=0)
    answers = generate(policy, [random_ids(5, 1), random_ids(3, 3)], **how)
    rows = answers.rows
    with torch.no_grad():
        told = policy.logprobs(*rows)
        for other in (1, 2, 3):  # greedy: no other token is likelier
            ids = torch.where(
                rows.completion_mask & (torch.arange(rows.input_ids.shape[1]) == 7), other, rows.input_ids
            )
            assert (policy.logprobs(ids, *rows[1:])[:, 7] <= told[:, 7] + 1e-5).all()
    assert generate(AdaptersOff(policy), [random_ids(5, 1)], **(how | {"seeds": [0]})).rows.input_ids.shape[1] == 10
    assert policy.adapted and policy.training


def young(path, precision="bf16"):
    """A frozen policy in bf16 whose adapters have moved less than bf16 can tell beside the weights."""
    policy = add_lora(load_policy(path, precision=precision, frozen=True), **LORA)
    with torch.no_grad():
        for number, lora in enumerate(adapters(policy).values()):
            lora.B.normal_(0, 1e-4, generator=torch.Generator().manual_seed(number))
    return policy


def decoded_logits(policy, prompt):
    """What a decoding step sees after the prompt's last token; and after one more token."""
    stream = pack(*make_rows([{"input_ids": prompt, "completion_mask": [False] * len(prompt)}], pad_id=0))
    with torch.inference_mode(), decoding(policy, 1):
        return policy(stream.tokens, stream.positions, stream.blocks, stream.last)


def test_what_samples_in_bf16_is_what_was_trained(inputs):  # noqa: F811
    policy, prompt = young(inputs / "policy"), random_ids(9, 1)
    sampled = decoded_logits(policy, prompt).log_softmax(-1)
    base = decoded_logits(AdaptersOff(policy).policy, prompt)  # adapters on: the same
    assert torch.equal(sampled, base.log_softmax(-1))
    row = {"input_ids": [*prompt, 5], "completion_mask": [False] * len(prompt) + [True]}
    with torch.no_grad():
        trained = policy.logprobs(*make_rows([row], 0)).sum()
        plain = AdaptersOff(policy).logprobs(*make_rows([row], 0)).sum()
    assert sampled[0, 5].item() == pytest.approx(trained.item(), abs=1e-6)
    assert trained != plain


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
def test_a_young_adapter_is_seen_whole_in_bf16(size, bias):
    """The mean effect on the outputs, learning and sampling, is what the adapter adds: none is lost to rounding."""
    torch.manual_seed(0)
    linear = Linear(64, 96, bias=bias).to(torch.bfloat16)
    linear.lora = Lora(linear, rank=4, alpha=4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2000, 64).bfloat16()
    with torch.no_grad():
        linear.weight.normal_(0, 1 / 8)
        linear.lora.B.normal_(0, size)
        exact = torch.nn.functional.linear(*(None if t is None else t.float() for t in (x, linear.weight, linear.bias)))
        adds = linear.lora(x).float()
        seen = [linear(x)]
        linear.prepare(torch.bfloat16, len(x), adapted=True)
        seen.append(linear(x))
    for y in seen:
        assert ((y.float() - exact) * adds).sum() / adds.square().sum() == pytest.approx(1, abs=0.15)


def test_the_export_of_a_bf16_training_is_the_fp32_file_with_the_adapter_merged_in_float32(inputs, tmp_path):  # noqa: F811
    policy, base = young(inputs / "policy"), load_file(inputs / "policy" / "model.safetensors")
    export_model(policy, tmp_path / "model", load_tokenizer(inputs / "policy"))
    merged, exact = load_file(tmp_path / "model" / "model.safetensors"), load_policy(inputs / "policy")
    for name, lora in adapters(policy).items():
        exact.get_submodule(name).weight.data += lora.delta()
    export_model(exact, tmp_path / "exact", load_tokenizer(inputs / "policy"))
    for name, tensor in load_file(tmp_path / "exact" / "model.safetensors").items():
        assert merged[name].dtype == torch.float32 and torch.equal(merged[name], tensor), name
    moved = [name for name in base if not torch.equal(base[name], merged[name])]
    assert len(moved) == 7 * policy.config.num_layers  # q k v o gate up down; all else is the file's, to the bit


def test_rounding_a_young_merge_is_said_to_cost_more_than_was_learned(inputs, tmp_path, caplog):  # noqa: F811
    policy = young(inputs / "policy")
    with torch.no_grad():
        for factor, least, most in ((0.1, 0.99, 1.01), (1e4, 0.0, 0.05)):  # 1: all of it is lost
            for lora in adapters(policy).values():
                lora.B.mul_(factor)
            assert least < merge_noise(policy) < most
    assert merge_noise(policy) < 0.05
    with caplog.at_level("INFO"):
        export_adapter(policy, tmp_path / "adapter", "base")
    assert f"{merge_noise(policy):.2f} times the adapter's contribution" in caplog.text


def test_a_bf16_training_with_adapters_gains_as_much_in_its_export_as_in_itself(run_script, job, inputs, tmp_path):  # noqa: F811
    """Through the whole command: the margin of base + adapter, and of model/ as float32 reads it."""
    words = ["lora.rank=4", "precision=bf16", "num_steps=4", "optim.lr=1e-3", "ref=live"]
    assert run_script(train_dpo, *job("train_dpo", "run", *words)[1:]) == 0
    merged = load_file(tmp_path / "run" / "model" / "model.safetensors")
    base = load_file(inputs / "policy" / "model.safetensors")
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for name in ("layers.0.self_attn.q_proj", "layers.0.mlp.down_proj"):
        A, B = (adapter[f"base_model.model.model.{name}.lora_{side}.weight"] for side in "AB")
        added = merged[f"model.{name}.weight"] - base[f"model.{name}.weight"]
        assert torch.allclose(added, B @ A * (16 / 4), atol=1e-7) and added.abs().max() > 0


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_every_script_learns_adapters(run_script, job, inputs, tmp_path, read_metrics, name):  # noqa: F811
    own = {"train_dpo": ["ref=live"], "train_ppo": ["value_start=policy"]}  # one base beside the reward model's
    words = ["lora.rank=4", "num_steps=2", *own.get(name, [])]
    assert run_script(SCRIPTS[name], *job(name, "run", *words)[1:]) == 0
    learned, base = (
        tmp_path / "run",
        load_file(inputs / ("rm" if name == "train_rm" else "policy") / "model.safetensors"),
    )
    merged = load_file(learned / "model" / "model.safetensors")
    assert torch.equal(
        merged["model.embed_tokens.weight"],
        load_file(inputs / "policy" / "model.safetensors")["model.embed_tokens.weight"],
    )
    moved = "model.layers.0.self_attn.v_proj.weight"
    assert (merged[moved] - load_file(inputs / "policy" / "model.safetensors")[moved]).abs().max() > 0 and base
    assert (learned / "adapter" / "adapter_config.json").exists()
    rows = read_metrics(learned)
    if name == "train_dpo":
        first = next(row for row in rows if "objective/loss" in row)
        assert first["objective/loss"] == pytest.approx(math.log(2), abs=1e-6)
    if name == "train_rm":
        head = load_file(learned / "adapter" / "head.safetensors")
        assert set(head) == {"score.bias", "score.gain", "score.shift"}
        bias = head["score.gain"] * head["score.bias"] + head["score.shift"]  # the export has the normalised score
        assert torch.equal(load_reward_model(learned / "model", precision="fp32").head.bias, bias)


@pytest.mark.parametrize(
    "words", [["lora.rank=-1"], ["lora.rank=2", "lora.alpha=0"], ["lora.rank=2", "lora.targets=[q]"]]
)
def test_settings_that_cannot_be_meant_are_refused(run_script, job, words, capsys):  # noqa: F811
    assert run_script(train_dpo, *job("train_dpo", "run", *words)[1:]) == 2
    assert "lora." in capsys.readouterr().err
