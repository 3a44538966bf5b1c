"""Byte-level BPE from a vocabulary and its merges. Text is split as by GPT-2, Qwen2, Llama 3 or SmolLM."""

from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from data.vocabularies.added import add_tokens
from data.vocabularies.patterns import LLAMA3, QWEN2
from data.vocabularies.pieces import add_special
from data.vocabularies.vocabulary import json_object

# The rules of GGUF's `tokenizer.ggml.pre` for splitting text before byte-level BPE, with Hugging Face's settings.
_GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITS = {
    "gpt-2": [_GPT2_SPLIT],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), _GPT2_SPLIT],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), _BYTES],
    "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated"), _BYTES],
}


def byte_level_bpe(tokens: list, kinds: list, merges: list, split: str, path: Path) -> tokenizers.Tokenizer:
    """A byte-level BPE backend. Raises ValueError if `split` is not a known rule for splitting text."""
    if split not in SPLITS:
        raise ValueError(f"{str(path)!r} splits text as {split!r}; known splits: {', '.join(SPLITS)}")
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[split])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    add_special(backend, list(zip(tokens, kinds, strict=True)))
    return backend


def from_merges(path: Path, kind: str, settings: dict) -> tokenizers.Tokenizer:
    """vocab.json and merges.txt of GPT-2's or Qwen2's tokenizer, which differ in their rule for splitting text."""
    splits = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}
    name = kind.removesuffix("Fast")
    if name not in splits:
        known = ", ".join(splits)
        raise ValueError(
            f"{path}: vocab.json and merges.txt of tokenizer_class {kind!r} are not supported; known: {known}"
        )
    vocab = json_object(path / "vocab.json")
    lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    backend.normalizer = normalizers.NFC() if name == "Qwen2Tokenizer" else None
    backend.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[splits[name]])
    backend.decoder = decoders.ByteLevel()
    add_tokens(backend, settings, path, known_too=True)
    return backend
