"""Read GGUF files of llama.cpp: metadata -> ModelConfig, quantised blocks -> float32 tensors."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig, resized
from model.families import FAMILIES
from model.rope import llama3_frequencies
from model.weights.gguf_header import check_header

# GGUF's architecture -> our family. Mistral's files have the architecture llama, and the models are the same.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
NAMES = {  # Hugging Face's -> GGUF's
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@cache
def open_gguf(path: Path):
    """The open file. It is cached, because weights and tokenizer share it and parsing 50k tokens takes seconds."""
    import gguf

    try:
        check_header(path)
        return gguf.GGUFReader(path)
    except (ValueError, OSError, LookupError, TypeError, OverflowError, AttributeError) as error:
        raise ValueError(f"{path} is truncated or no GGUF file ({error}); copy it again") from error


class GGUFReader:
    """Weights of a .gguf file by Hugging Face name, dequantised when read."""

    kind = "policy"

    def __init__(self, path: Path):
        from gguf import quants

        self.path, self.dequantize = path, quants.dequantize
        file = open_gguf(path)
        self.fields = file.fields
        architecture = self.fields.get("general.architecture")
        self.architecture = architecture and architecture.contents()
        self.tensors = {hf_name(tensor.name, self.architecture): tensor for tensor in file.tensors}
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"{path}: unknown architecture {self.architecture!r}; known in GGUF: {known}")
        try:
            self.config = self.parse_config()
        except (TypeError, IndexError, ArithmeticError, AttributeError) as error:  # a value of the wrong type
            raise ValueError(f"{path}: its metadata is invalid ({error})") from error

    def field(self, name: str, default=None):
        """The metadata value `name` of this architecture. Raises ValueError if it is missing and has no default."""
        field = self.fields.get(f"{self.architecture}.{name}")
        if field is None and default is None:
            raise ValueError(f"{self.path} lacks the metadata field {self.architecture}.{name}")
        return default if field is None else field.contents()

    def parse_config(self) -> ModelConfig:
        heads, width = self.field("attention.head_count"), self.field("embedding_length")
        config = ModelConfig(
            family=ARCHITECTURES[self.architecture],
            vocab_size=self.shape("model.embed_tokens.weight")[0],
            hidden_size=width,
            intermediate_size=self.field("feed_forward_length"),
            num_layers=self.field("block_count"),
            num_heads=heads,
            num_kv_heads=self.field("attention.head_count_kv", heads),
            head_dim=self.field("attention.key_length", width // heads),
            max_length=self.field("context_length"),
            rope_theta=float(self.field("rope.freq_base", 10000.0)),
            norm_eps=float(str(np.float32(self.field("attention.layer_norm_rms_epsilon")))),  # 1e-05, not 9.99..e-06
            tie_embeddings="lm_head.weight" not in self.tensors,
            qkv_bias=self.architecture == "qwen2",
            **(self.gemma(width // heads) if self.architecture == "gemma3" else {}),
        )
        return with_rope(config, self)

    def gemma(self, share: int) -> dict:
        """The extra settings of Gemma 3: five of six layers have a window and their own RoPE base."""
        kinds = FAMILIES["gemma3_text"].kinds
        options = {"sliding_window": self.field("attention.sliding_window"), "layer_kinds": kinds}
        options["window_rope_theta"] = float(self.field("rope.freq_base_swa", 10000.0))
        if self.field("block_count") == 62:  # the 27B model scales by hidden_size / num_heads, which no field contains
            options["attention_scale"] = share**-0.5
        return options

    def names(self) -> set[str]:
        return set(self.tensors) - {"rope_freqs.weight"}

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise ValueError(f"{self.path} lacks the tensor {name}")
        return tuple(
            int(size) for size in reversed(self.tensors[name].shape)
        )  # GGUF writes the fastest dimension first

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or these rows of it."""
        return self._whole(name) if rows is None else self._whole(name)[rows]

    def _whole(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        try:
            weight = torch.from_numpy(np.array(self.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        except NotImplementedError as error:
            raise ValueError(f"{self.path}: {name} is stored as {tensor.tensor_type.name}, unknown to gguf") from error
        weight = weight.reshape(self.shape(name))
        if self.architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = self.config.num_heads if "q_proj" in name else self.config.num_kv_heads
            # llama.cpp rotates pairs (2i, 2i + 1), we rotate (i, i + Dh/2): reorder the rows of each head.
            return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        # llama.cpp stores the factor of a norm, Hugging Face's Gemma the factor minus 1.
        return weight - 1 if self.architecture == "gemma3" and name.endswith("norm.weight") else weight


def hf_name(name: str, architecture: str) -> str:
    """The Hugging Face name of a GGUF tensor. An unknown name is returned as it is, and loading then refuses it."""
    modules = {gguf: hf for hf, gguf in (NAMES | (GEMMA if architecture == "gemma3" else {})).items()}
    module, _, leaf = name.rpartition(".")
    if not module.startswith("blk."):
        return f"{modules.get(module, module)}.{leaf}"
    _, layer, module = module.split(".", 2)
    return f"model.layers.{layer}.{modules.get(module, module)}.{leaf}"


def with_rope(config: ModelConfig, reader: GGUFReader) -> ModelConfig:
    """The config with the file's RoPE scaling. Llama 3's is inferred from a tensor of divisors."""
    if "rope_freqs.weight" in reader.tensors:
        divisors = torch.from_numpy(np.array(reader.tensors["rope_freqs.weight"].data, dtype=np.float32))
        scaling = {"rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0}
        scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        if not torch.allclose(frequencies / divisors, llama3_frequencies(frequencies, scaling), rtol=1e-3):
            raise ValueError(f"{reader.path}: rope_freqs is not Llama-3's scaling; convert the model to a HF directory")
        return resized(config, rope_scaling=scaling)
    kind = reader.field("rope.scaling.type", "none")
    if kind == "none":
        return config
    scaling = {"rope_type": kind, "factor": reader.field("rope.scaling.factor")}
    if kind == "yarn":
        old = reader.field("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = old
    return resized(config, rope_scaling=scaling)
