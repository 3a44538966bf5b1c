from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from model import offload
from model.attention import attend_blocks, attend_flex
from model.build import load_policy, new_policy
from model.config import ModelConfig, make_config
from model.heads import Policy
from model.linear import Linear
from model.packing import pack
from model.transformer import neftune_noise
from tests.tiny_models import FAMILY, SIZES, batch_of, random_ids, tiny_config

# What an architecture is made of, in its own config's words: the names of transformers, which is the oracle.
ROPES = {
    "plain": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 500000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0},
}
MODELS = {
    "Llama-2": ("LlamaForCausalLM", {"num_key_value_heads": 6}, "plain"),
    "Llama-2, window stretched": ("LlamaForCausalLM", {"num_key_value_heads": 6}, "linear"),
    "Llama-3": ("LlamaForCausalLM", {"head_dim": 32}, "llama3"),
    "SmolLM2": ("LlamaForCausalLM", {"tie_word_embeddings": True}, "plain"),
    "Mistral": ("MistralForCausalLM", {"sliding_window": 7, "head_dim": 16}, "plain"),
    "Mistral, no window": ("MistralForCausalLM", {"sliding_window": None}, "plain"),
    "Qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}, "plain"),
    "Llama, YaRN": ("LlamaForCausalLM", {"head_dim": 32}, "yarn"),
    "Qwen2, YaRN": ("Qwen2ForCausalLM", {}, "yarn"),
    "Qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}, "plain"),
}


def oracle(name: str):
    """transformers' own model of this kind with large random weights, biases and norms included."""
    transformers = pytest.importorskip("transformers")
    architecture, changes, rope = MODELS[name]
    config = getattr(transformers, architecture.replace("ForCausalLM", "Config"))(
        **{
            "vocab_size": 97,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "rope_parameters": ROPES[rope],
            "pad_token_id": None,  # a padding_idx would zero one row's gradient
            "attn_implementation": "eager",
        }
        | changes
    )
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            draw = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
            weight.copy_(0.15 * draw if weight.ndim == 2 else 1 + 0.2 * draw)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_transformers(name, tmp_path):
    reference = oracle(name)
    reference.save_pretrained(tmp_path)
    policy = load_policy(tmp_path)
    rows = [random_ids(50, 0), random_ids(33, 1)]
    batch = batch_of([(row[:1], row[1:]) for row in rows], "left")
    stream = pack(*batch)
    logits = policy(stream.tokens, stream.positions, stream.blocks)
    expected = torch.cat([reference(torch.tensor([row])).logits[0] for row in rows])
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()

    logits.square().mean().backward()
    expected.square().mean().backward()
    grads = {name: weight.grad for name, weight in reference.named_parameters()}
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    qkv = torch.cat([grads[f"{attention}{part}_proj.weight"] for part in "qkv"])
    gate_up = torch.cat([grads[f"{mlp}{part}_proj.weight"] for part in ("gate", "up")])
    layer = policy.transformer.layers[1]
    for ours, theirs in (
        (policy.transformer.embed.weight.grad, grads["model.embed_tokens.weight"]),
        (layer.attention.qkv.weight.grad, qkv),
        (layer.mlp.gate_up.weight.grad, gate_up),
        (layer.mlp_norm.weight.grad, grads["model.layers.1.post_attention_layernorm.weight"]),
    ):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (3, 3), (4, 1)])
def test_both_attention_backends_agree(heads, kv_heads, window):
    prompt = random_ids(9, 0)
    rows = [(prompt, random_ids(5, 1)), (prompt, random_ids(8, 2)), (random_ids(3, 3), random_ids(4, 4))]
    rows += [(random_ids(200, 5), random_ids(120, 6))]  # longer than one product's share of queries
    stream = pack(*batch_of(rows, "left"))
    torch.manual_seed(0)
    q, k, v = (torch.randn(len(stream.tokens), n, 16, dtype=torch.float64) for n in (heads, kv_heads, kv_heads))
    outs = [backend(q, k, v, stream.blocks, window) for backend in (attend_blocks, attend_flex)]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lengths", [[128, 128], [5, 300, 2, 77], [700], [40] * 20])
def test_tiles_that_flex_attention_skips_hold_nothing(lengths):
    rows = [(random_ids(n // 2, 100 + i), random_ids(n - n // 2, i)) for i, n in enumerate(lengths)]
    blocks = pack(*batch_of(rows, "right")).blocks
    tiles = blocks.block_mask(None).to_dense()[0, 0].bool()
    owner = torch.repeat_interleave(torch.arange(len(blocks.spans)), torch.tensor([b - a for a, b in blocks.spans]))
    index = torch.arange(len(owner))
    seen = blocks.allowed(index[:, None], index[None, :], None) & (owner[:, None] == owner[None, :])
    pad = -len(owner) % 128
    needed = (
        torch.nn.functional.pad(seen, (0, pad, 0, pad)).unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(3).any(1)
    )
    assert torch.equal(tiles, needed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex_attention has no backward pass on a CPU")
@pytest.mark.parametrize("window", [None, 4])
def test_both_attention_backends_have_equal_gradients(window):
    prompt = random_ids(9, 0)
    rows = batch_of(
        [(prompt, random_ids(50, 1)), (prompt, random_ids(80, 2)), (random_ids(3, 3), random_ids(4, 4))], "left"
    )
    stream = pack(*rows.to("cuda"))
    torch.manual_seed(0)
    q, k, v = (torch.randn(len(stream.tokens), n, 32, device="cuda") for n in (6, 2, 2))
    outs, grads = [], []
    for backend in (attend_blocks, attend_flex):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        outs.append(backend(*inputs, stream.blocks, window))
        grads.append(torch.autograd.grad(outs[-1].sin().sum(), inputs))
    torch.testing.assert_close(outs[0], outs[1], rtol=2e-3, atol=2e-3)
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=5e-3)


def test_checkpointing_changes_memory_and_not_one_bit_of_the_gradients(monkeypatch):
    rows = batch_of([(random_ids(5, 0), random_ids(9, 1)), (random_ids(5, 0), random_ids(4, 2))], "right")
    grads, waiting = [], []
    leave = offload._leave
    monkeypatch.setattr(offload, "_leave", lambda tensor: waiting.append(tensor.shape) or leave(tensor))
    for checkpointing in (False, True, "offload"):
        policy = new_policy(tiny_config("qwen3"), seed=0)
        policy.transformer.checkpointing = checkpointing
        policy.transformer.regularise(residual_dropout=(0.0, 0.3), neftune_alpha=5.0)
        torch.manual_seed(3)
        policy.logprobs(*rows).sum().backward()
        grads.append([weight.grad for weight in policy.parameters()])
        inputs = [(18, 48)] * len(policy.transformer.layers) + [(13,)]  # of each layer, and the picks, which stay
        assert sorted(waiting) == sorted(inputs if checkpointing == "offload" else [])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads, strict=True))


def test_residual_dropout_grows_with_depth_and_noise_stops_without_gradients():
    policy = new_policy(tiny_config(num_layers=4), seed=0)
    rows = batch_of([(random_ids(5, 0), random_ids(9, 1))], "right")
    clean = policy.logprobs(*rows)
    policy.transformer.regularise(residual_dropout=(0.0, 0.3), neftune_alpha=5.0)
    assert [round(layer.dropout, 6) for layer in policy.transformer.layers] == [0.0, 0.1, 0.2, 0.3]
    assert not torch.equal(policy.logprobs(*rows), clean)
    with torch.no_grad():
        assert torch.equal(policy.logprobs(*rows), clean)
    assert torch.equal(policy.eval().logprobs(*rows), clean)


def test_neftune_noise_is_bounded_by_alpha_over_the_root_of_its_own_rows_size():
    stream = pack(*batch_of([(random_ids(5, 0), random_ids(4, 1)), (random_ids(20, 2), random_ids(5, 3))], "left"))
    noise = neftune_noise(torch.zeros(34, 48), stream.blocks, alpha=5.0)
    for (start, stop), length in zip(stream.blocks.spans, (9, 25), strict=True):
        bound = 5.0 / (length * 48) ** 0.5
        assert 0.9 * bound < noise[start:stop].abs().max() <= bound


def test_bf16_keeps_fp32_masters_and_frozen_models_hold_bf16():
    trained = new_policy(tiny_config(), seed=0, precision="bf16")
    assert {weight.dtype for weight in trained.parameters()} == {torch.float32}
    rows = batch_of([(random_ids(5, 0), random_ids(9, 1))], "right")
    stream = pack(*rows)
    assert trained.hidden_states(stream).dtype == torch.bfloat16
    logprobs = trained.logprobs(*rows)
    assert logprobs.dtype == torch.float32
    exact = new_policy(tiny_config(), seed=0).logprobs(*rows)
    assert 0 < (logprobs - exact).abs().max() < 0.02
    logprobs.sum().backward()
    assert {weight.grad.dtype for weight in trained.parameters()} == {torch.float32}


def test_master_weights_multiply_as_their_copy_does_which_is_made_once_for_each_value_of_the_weight():
    torch.manual_seed(0)
    layer, x = Linear(24, 40, bias=True), torch.randn(7, 24, dtype=torch.bfloat16, requires_grad=True)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for change in (optimizer.step, lambda: layer.load_state_dict({k: -v for k, v in layer.state_dict().items()})):
        out, again = layer(x), layer(x)
        assert layer.kept[0] is layer.cast(x.dtype) and torch.equal(out, again)
        plain = torch.nn.functional.linear(x, layer.weight.bfloat16(), layer.bias.bfloat16())
        assert torch.equal(out, plain)
        mix = torch.randn(7, 40).bfloat16()
        inputs = (x, layer.weight, layer.bias)
        ours, theirs = (torch.autograd.grad(y, inputs, mix) for y in (out, plain))
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours[:2], theirs[:2], strict=True))
        torch.testing.assert_close(ours[2], mix.float().sum(0), rtol=1e-6, atol=1e-6)
        layer(x).sum().backward()
        before = layer.kept[0]
        change()
        assert layer.cast(x.dtype) is not before and torch.equal(layer.cast(x.dtype), layer.weight.bfloat16())


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("smollm2_135m", 134_515_008),
        ("smollm2_360m", 361_821_120),
        ("smollm2_1_7b", 1_711_376_384),
        ("qwen2_5_0_5b", 494_032_768),
        ("llama2_7b", 6_738_415_616),
        ("mistral_7b", 7_241_732_096),
        ("llama3_8b", 8_030_261_248),
    ],
)
def test_the_size_tables_have_the_published_numbers_of_parameters(name, parameters):
    sizes = OmegaConf.load(Path(__file__).parents[2] / f"conf/model/{name}.yaml")
    with torch.device("meta"):
        policy = Policy(make_config(sizes, vocab_size=1))
    assert sum(weight.numel() for weight in policy.parameters()) == parameters


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_kv_heads": 4}, "num_heads=6 is not a multiple of num_kv_heads=4"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"family": "gpt2"}, "unknown model family 'gpt2'; known: llama"),
        ({"family": "phi3", "qkv_bias": True}, "qkv_bias=True contradicts family=phi3"),
        ({"family": "qwen2", "qkv_bias": False}, "qkv_bias=False contradicts family=qwen2"),
        ({"sliding_window": 4}, "sliding_window=4 contradicts family=llama"),
        ({"family": "mistral", "sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ({"family": "qwen3", "layer_kinds": ["full", "window"]}, "contradicts sliding_window=None"),
        ({"family": "phi3", "rotary_share": 0.4}, "rotary_share=0.4 of head_dim=8"),
        ({"num_layers": 0}, "num_layers=0 must be"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "unknown rope_type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"missing \['original_max_position_embeddings'\]"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**(SIZES | changes))


def test_a_row_longer_than_the_window_is_refused():
    policy = new_policy(tiny_config(max_length=16), seed=0)
    policy.logprobs(*batch_of([(random_ids(4, 0), random_ids(12, 1))], "left"))
    with pytest.raises(ValueError, match="a row of 17 tokens exceeds the model's window of 16; lower data.max_length"):
        policy.logprobs(*batch_of([(random_ids(4, 0), random_ids(13, 1))], "left"))


def test_every_family_has_a_tiny_model():
    for family in FAMILY:
        assert new_policy(tiny_config(family), seed=0).config.family == family


@pytest.mark.parametrize("checkpointing", [False, True])
def test_picked_states_and_their_gradients_are_those_of_the_whole_stream(checkpointing):
    policy = new_policy(tiny_config(), seed=0).double()
    policy.transformer.checkpointing = checkpointing
    stream = pack(*batch_of([(random_ids(4, seed), random_ids(5, seed + 9)) for seed in range(3)], "right"))
    picks = torch.tensor([5, 0, 5, 20])  # any order; twice, as a shared prompt's last token is
    mix = torch.randn(4, policy.config.hidden_size, dtype=torch.float64)
    given = (stream.tokens, stream.positions, stream.blocks)
    found = []
    for states in (policy.transformer(*given)[picks], policy.transformer(*given, picks=picks)):
        policy.zero_grad()
        (states * mix).sum().backward()
        found.append([states.detach(), *(p.grad.clone() for p in policy.transformer.parameters())])
    for whole, picked in zip(*found, strict=True):
        torch.testing.assert_close(picked, whole, rtol=1e-10, atol=1e-12)
