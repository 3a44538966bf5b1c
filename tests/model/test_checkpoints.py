"""Checkpoints as people have them: read as transformers reads them, or refused with one sentence and a way out."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.tokenizer import find_tokenizer
from model.build import export_model, load_policy, load_reward_model, load_value_model, open_weights
from model.lora import adapters, add_lora, export_adapter
from model.ref_cache import weights_digest
from model.weights.hf import HFReader
from tests.family_checkpoints import CASES, LONGROPE, SIZES, YARN, checkpoint, shake
from tests.model.test_families import ROWS, Words, our_logprobs, their_logprobs
from tests.tiny_models import batch_of

transformers = pytest.importorskip("transformers")


def edit(directory, drop=(), **changes):
    raw = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in drop}))


def read_both(directory):
    """Log-probs by us and by transformers' AutoModel, both from the files."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    with torch.no_grad():
        return our_logprobs(load_policy(directory)), their_logprobs(theirs)


def assert_read_alike(directory):
    ours, theirs = read_both(directory)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


# ---- read as transformers reads it

THETA = {"rope_type": "default", "rope_theta": 300.0}
CONFIGS = {  # name -> family, keys that are dropped, keys that are set
    "rope_scaling beside rope_parameters": ("llama", (), {"rope_scaling": YARN, "rope_parameters": THETA}),
    "rope_theta beside rope_scaling": ("llama", ("rope_parameters",), {"rope_theta": 300.0, "rope_scaling": YARN}),
    "an outer original_max_position_embeddings": (
        "llama",
        ("rope_parameters",),
        {"rope_scaling": YARN, "original_max_position_embeddings": 8, "rope_theta": 500.0},
    ),
    "yarn without its old window": (
        "llama",
        ("rope_parameters",),
        {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 500.0},
    ),
    "no rope_theta": ("smollm3", ("rope_parameters",), {}),
    "no window": ("mistral", ("sliding_window",), {}),
    "a mistral with layer_types": (
        "mistral",
        (),
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    "a window that is switched off": ("qwen2", (), {"sliding_window": 4, "use_sliding_window": False}),
    "no tie_word_embeddings where it means tied": ("smollm3", ("tie_word_embeddings",), {}),
    "no no_rope_layers": ("smollm3", ("no_rope_layers",), {"no_rope_layer_interval": 2}),
    "no layer_types": ("olmo3", ("layer_types",), {}),
    "no layer with a window": ("exaone4", (), {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "olmo3 in its older form": ("olmo3", ("rope_parameters",), {"rope_theta": 700.0, "rope_scaling": YARN}),
    "no num_key_value_heads where it means all": ("olmo2", (), {}),
    "longrope by its first name": (
        "phi4-mini",
        ("rope_parameters",),
        {"rope_scaling": LONGROPE | {"rope_type": "su", "original_max_position_embeddings": 48}}
        | {"rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_read_as_transformers_reads_it(name, tmp_path):
    family, dropped, changes = CONFIGS[name]
    checkpoint(family, tmp_path)
    edit(tmp_path, dropped, **changes)
    assert_read_alike(tmp_path)


def test_a_single_file_goes_before_an_index_that_an_earlier_save_left(tmp_path):
    checkpoint("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: weight * 2 for name, weight in weights.items()}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}} | index))
    assert_read_alike(tmp_path)
    (tmp_path / "model-00001-of-00001.safetensors").unlink()
    assert_read_alike(tmp_path)


# ---- refused


def retie(directory):
    weights = load_file(directory / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["lm_head.weight"] + 1}, directory / "model.safetensors")
    edit(directory, tie_word_embeddings=True)


def shard(directory):
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, directory / "model-00001-of-00002.safetensors")


REFUSED = {  # name -> what is done to a Llama's directory, what is said
    "another lm_head under tie_word_embeddings": (retie, "stores an lm_head.weight that differs .* set tie_word_"),
    "an adapter beside a whole model": (
        lambda d: (d / "adapter_config.json").write_text("{}"),
        "a whole model .* and an adapter .* move the adapter's two files",
    ),
    "a missing shard": (shard, "lacks 1 of 2 weight files: model-00002-of-00002.safetensors; copy them too"),
    "fp8": (
        lambda d: edit(d, quantization_config={"quant_method": "fp8"}),
        r"its weights are quantised \(fp8, .* take the unquantised checkpoint",
    ),
    "bitsandbytes": (lambda d: edit(d, quantization_config={"quant_method": "bitsandbytes"}), r"quantised \(bitsandb"),
    "GPTQ": (lambda d: edit(d, quantization_config={"quant_method": "gptq", "bits": 4}), r"quantised \(gptq"),
    "architectures: null": (lambda d: edit(d, architectures=None), r'write "architectures": \["LlamaForCausalLM"\]'),
    "another model_type": (lambda d: edit(d, model_type="qwen3"), "contradicts itself: .*model_type='qwen3'"),
    "an unknown key": (
        lambda d: edit(d, logits_soft_cap=30.0),
        "logits_soft_cap=30.0 of a llama model, which this code",
    ),
    "a key of another family": (lambda d: edit(d, residual_multiplier=0.2), "residual_multiplier=0.2 of a llama model"),
    "a window where there is none": (lambda d: edit(d, sliding_window=8), "sliding_window=8 of a llama model"),
    "mrope": (lambda d: edit(d, use_mrope=True), "use_mrope=True of a llama model; only False is computed"),
    "a key inside rope_scaling": (
        lambda d: edit(d, ("rope_parameters",), rope_scaling=YARN | {"attn_factor": 2.0}),
        "rope_scaling of type yarn holds attn_factor, which this code does not know",
    ),
    "partial rotary": (lambda d: edit(d, partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not computed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_another_model_is_refused_by_name(name, tmp_path):
    checkpoint("llama", tmp_path)
    change, message = REFUSED[name]
    change(tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        load_policy(tmp_path)
    assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize("value", [None, 0.1])
def test_keys_that_change_nothing_are_passed_over(value, tmp_path):
    checkpoint("llama", tmp_path)
    edit(tmp_path, attention_dropout=value, initializer_range=0.5, some_new_key=None, is_llama_config=True)
    assert_read_alike(tmp_path)


# ---- adapters


def adapter_of(directory, base, **settings):
    """An adapter that peft made and saved, far from its start; and the model of peft."""
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
    for key, value in settings.items():
        setattr(config, key, value)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for number, (name, weight) in enumerate(model.named_parameters()):
            if "lora_" in name:
                weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(number))
    model.save_pretrained(directory)
    return model.eval()


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"layers_to_transform": [1]}], ids=str)
def test_an_adapter_of_peft_is_read_as_the_merged_model(settings, tmp_path):
    checkpoint("qwen3", tmp_path / "base")
    model = adapter_of(tmp_path / "adapter", tmp_path / "base", **settings)
    with torch.no_grad():
        ours, theirs = our_logprobs(load_policy(tmp_path / "adapter")), their_logprobs(model)
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
        assert (ours - our_logprobs(load_policy(tmp_path / "base"))).abs().max() > 0.1
    reader = open_weights(tmp_path / "adapter")
    for name in reader.adapted:  # some processors round a product by its shape
        torch.testing.assert_close(reader.read(name, slice(1, 3)), reader.read(name)[1:3], rtol=1e-6, atol=1e-7)
    assert find_tokenizer(tmp_path / "adapter") == tmp_path / "base"
    before = weights_digest(tmp_path / "adapter")
    edit(tmp_path / "base", max_position_embeddings=128)
    assert weights_digest(tmp_path / "adapter") != before  # the reference's cache sees the base too


def test_our_own_adapters_are_read_with_their_heads(tmp_path):
    checkpoint("qwen2", tmp_path / "base")
    load = {"reward": load_reward_model, "value": load_value_model}
    for kind, read in load.items():
        model = read(tmp_path / "base", precision="fp32", frozen=True, seed=3)
        add_lora(model, rank=2, alpha=5.0, targets=["qkv", "down"], seed=1)
        with torch.no_grad():
            for number, lora in enumerate(adapters(model).values()):
                lora.B.normal_(0, 0.3, generator=torch.Generator().manual_seed(number))
            model.head.bias.fill_(0.5)
            if kind == "reward":
                model.gain.fill_(2.0)
                model.shift.fill_(-1.0)
            export_adapter(model, tmp_path / kind, str(tmp_path / "base"))
            again, rows = read(tmp_path / kind, precision="fp32"), batch_of(ROWS, "left")
            torch.testing.assert_close(again(*rows), model(*rows), rtol=1e-5, atol=1e-5)


def test_an_adapter_trains_on_and_is_exported_merged(tmp_path):
    checkpoint("llama", tmp_path / "base")
    adapter_of(tmp_path / "adapter", tmp_path / "base")
    policy = load_policy(tmp_path / "adapter")
    export_model(policy, tmp_path / "merged", Words())
    with torch.no_grad():
        assert torch.equal(our_logprobs(load_policy(tmp_path / "merged")), our_logprobs(policy))


def rewritten(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


ADAPTERS = {
    "DoRA": (lambda d: rewritten(d, use_dora=True), "use_dora=True .* is more than LoRA; merge the adapter with peft"),
    "ranks of their own": (lambda d: rewritten(d, alpha_pattern={"q_proj": 3}), "alpha_pattern=.* is more than LoRA"),
    "PiSSA": (lambda d: rewritten(d, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "biases": (lambda d: rewritten(d, bias="all"), "bias='all'"),
    "saved modules": (lambda d: rewritten(d, modules_to_save=["lm_head"]), "modules_to_save="),
    "another kind": (lambda d: rewritten(d, peft_type="IA3"), "peft_type='IA3'"),
    "an unknown key": (lambda d: rewritten(d, use_qalora=True), "use_qalora=True"),
    "no base": (lambda d: rewritten(d, base_model_name_or_path="meta/llama"), "adapter to meta/llama, .*hf download"),
    "pickled": (
        lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
        "lacks adapter_model.safetensors; it holds a pickle",
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_more_than_lora_is_refused_by_name(name, tmp_path):
    checkpoint("llama", tmp_path / "base")
    adapter_of(tmp_path / "adapter", tmp_path / "base")
    change, message = ADAPTERS[name]
    change(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        load_policy(tmp_path / "adapter")


# ---- text and pictures in one checkpoint


def pictures(name, directory, **text):
    """A tiny checkpoint that reads pictures too, saved as transformers saves it; the model."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 4}
    if name.startswith("qwen3_5"):
        vision = sizes | {"depth": 1, "num_heads": 2, "out_hidden_size": 48, "num_position_embeddings": 16}
    else:
        vision = sizes | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
    text = {k: v for k, v in (SIZES | CASES[name][1]).items() if k != "attn_implementation"} | text
    config = transformers.AutoConfig.for_model(name, text_config=text, vision_config=vision)
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = name == "gemma3"
    kind = {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe", "gemma3": "Gemma3"}[name] + "ForConditionalGeneration"
    config._attn_implementation = "eager"
    model = shake(getattr(transformers, kind)(config).eval())
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe", "gemma3"])
def test_the_text_part_of_a_checkpoint_with_pictures_is_read_and_exported_as_a_text_model(name, tmp_path, caplog):
    model = pictures(name, tmp_path / "theirs")
    edit(tmp_path / "theirs", eos_token_id=2)
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    mtp = {"mtp.fc.weight": torch.zeros(4, 8)} if name != "gemma3" else {}
    save_file(weights | mtp, tmp_path / "theirs" / "model.safetensors")
    with caplog.at_level("INFO"):
        policy = load_policy(tmp_path / "theirs")
    assert "the text part is read" in caplog.text and ("multi-token" in caplog.text) == bool(mtp)
    with torch.no_grad():
        ours, theirs = our_logprobs(policy), their_logprobs(model)
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
        export_model(policy, tmp_path / "ours", Words())
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
        assert (their_logprobs(again) - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_experts_stacked_in_one_tensor_are_those_of_a_file_for_each(tmp_path):
    """As Qwen3.5's and 3.6's published files store them: gate and up of all experts in one tensor."""
    model = pictures("qwen3_5_moe", tmp_path)
    expected = {name: w.detach() for name, w in load_policy(tmp_path).named_parameters()}
    weights = {name: w for name, w in model.state_dict().items() if name != "lm_head.weight"}
    assert any(name.endswith("mlp.experts.gate_up_proj") and w.ndim == 3 for name, w in weights.items())
    save_file(weights | {"lm_head.weight": model.lm_head.weight.detach().clone()}, tmp_path / "model.safetensors")
    for name, weight in load_policy(tmp_path).named_parameters():
        assert torch.equal(weight, expected[name]), name
    reader = HFReader(tmp_path)
    part = "model.layers.1.mlp.experts.4.up_proj.weight"
    assert torch.equal(reader.read(part, slice(5, 9)), reader.read(part)[5:9])


def test_an_adapter_to_a_checkpoint_with_pictures_is_read_on_its_text_part(tmp_path):
    peft = pytest.importorskip("peft")
    model = pictures("qwen3_5", tmp_path / "base")
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj", "in_proj_qkv", "in_proj_b", "out_proj", "qkv"]
    )
    model = peft.get_peft_model(model, config)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    with torch.no_grad():
        for number, (name, weight) in enumerate(model.named_parameters()):
            if "lora_" in name:
                weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(number))
        model.save_pretrained(tmp_path / "adapter")
        ours, theirs = our_logprobs(load_policy(tmp_path / "adapter")), their_logprobs(model)
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
        assert (ours - our_logprobs(load_policy(tmp_path / "base"))).abs().max() > 0.1


def test_gemma3s_published_names_and_sparse_text_config_are_read(tmp_path):
    """Its files write language_model.model.*, and its text_config leaves out what transformers takes by itself."""
    model = pictures("gemma3", tmp_path, num_attention_heads=8, num_key_value_heads=4, head_dim=256)
    weights = load_file(tmp_path / "model.safetensors")
    older = {"model.language_model.": "language_model.model.", "model.": ""}
    renamed = {}
    for key, weight in weights.items():
        prefix = next((prefix for prefix in older if key.startswith(prefix)), "")
        renamed[older.get(prefix, "") + key.removeprefix(prefix)] = weight
    save_file(renamed, tmp_path / "model.safetensors")
    raw = json.loads((tmp_path / "config.json").read_text())
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"):
        raw["text_config"].pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with torch.no_grad():
        ours, theirs = our_logprobs(load_policy(tmp_path)), their_logprobs(model)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


WRAPPED = {  # what is done to its config.json -> what is said
    "no text_config": (lambda raw: raw.pop("text_config"), "needs a text_config"),
    "another text": (lambda raw: raw["text_config"].update(model_type="llama"), "text_config.model_type='llama'"),
    "two ties": (lambda raw: raw["text_config"].update(tie_word_embeddings=True), "tie_word_embeddings differs"),
    "an unknown key": (lambda raw: raw.update(new_router=3), "new_router=3 of a qwen3_5_text model, which this code"),
    "another gate": (lambda raw: raw["text_config"].update(attn_output_gate=False), "only True is computed"),
}


@pytest.mark.parametrize("what", WRAPPED)
def test_a_checkpoint_with_pictures_that_contradicts_itself_is_refused(what, tmp_path):
    pictures("qwen3_5", tmp_path)
    change, message = WRAPPED[what]
    raw = json.loads((tmp_path / "config.json").read_text())
    change(raw)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        load_policy(tmp_path)
