"""Other people's tokenizer files, read into one engine (`tokenizers`): tokenizer.json, SentencePiece models, GGUF."""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from data.chat import TEMPLATES
from model.weights.gguf import open_gguf

# How GGUF's `tokenizer.ggml.pre` splits text before byte-level BPE: Hugging Face's own settings for these families.
_GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GGUF_SPLITS = {
    "gpt-2": [_GPT2_SPLIT],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), _GPT2_SPLIT],
    "llama-bpe": [pre_tokenizers.Split(Regex(_WORDS % r"\p{N}{1,3}"), "isolated"), _BYTES],
    "qwen2": [pre_tokenizers.Split(Regex(_WORDS % r"\p{N}"), "isolated"), _BYTES],
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # piece types of SentencePiece, kept by GGUF
_MARKERS = {name for template in TEMPLATES.values() for name in template.needs}
_DEFAULT_SYSTEM = re.compile(r"<\|im_start\|>system(?:\\n|\n)([^'\"{}<]+)<\|im_end\|>")


@dataclass(frozen=True)
class Vocabulary:
    """What a file says about its tokenizer; `chat_template` is Jinja text, None for a base model."""

    backend: tokenizers.Tokenizer
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None = None
    unk_token: str | None = None
    chat_template: str | None = None
    sentencepiece: bytes | None = field(default=None, repr=False)

    @property
    def default_system(self) -> str | None:
        """The system message that a ChatML template adds when a conversation has none (SmolLM2, Qwen2.5)."""
        found = _DEFAULT_SYSTEM.search(self.chat_template or "")
        return found.group(1) if found else None


def read_vocabulary(path: Path) -> Vocabulary:
    """Reads a Hugging Face directory, a SentencePiece `*.model*` file or a `.gguf` file.

    Raises:
        ValueError: nothing is there, or its kind of tokenizer is unknown.
    """
    if path.is_dir():
        return _from_directory(path)
    if not path.is_file():
        raise ValueError(f"no tokenizer at {str(path)!r}: neither a directory nor a file")
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if ".model" in path.suffixes:
        return from_sentencepiece(path.read_bytes())
    raise ValueError(
        f"{str(path)!r} is no tokenizer: expected a directory, a .gguf file or a SentencePiece .model file"
    )


def _from_directory(path: Path) -> Vocabulary:
    config, vocab, spm = path / "tokenizer_config.json", path / "tokenizer.json", path / "tokenizer.model"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    names = path / "special_tokens_map.json"
    if names.is_file():
        settings = json.loads(names.read_text(encoding="utf-8")) | settings
    special = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = settings.get(name)
        special[name] = token["content"] if isinstance(token, dict) else token
    jinja = path / "chat_template.jinja"
    template = jinja.read_text(encoding="utf-8") if jinja.is_file() else settings.get("chat_template")
    if isinstance(template, list):  # several named templates; "default" is the one for chat
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if vocab.is_file():
        backend = _read_backend(vocab)
        sentencepiece = spm.read_bytes() if spm.is_file() else None
        return Vocabulary(backend, **special, chat_template=template, sentencepiece=sentencepiece)
    if spm.is_file():
        read = from_sentencepiece(spm.read_bytes())
        given = {name: token for name, token in special.items() if token}
        return replace(read, chat_template=template, **given)
    raise ValueError(f"no tokenizer in {str(path)!r}: expected tokenizer.json or tokenizer.model")


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        spelled = json.loads(path.read_text(encoding="utf-8"))
        for token in spelled.get("added_tokens", []):
            token["special"] |= token["content"] in _MARKERS  # some chat models forget to say so
        splitter = spelled.get("pre_tokenizer") or {}
        if splitter.get("prepend_scheme") == "first":  # we encode stretch by stretch: each of them is a first one
            splitter["prepend_scheme"] = "always"
        return tokenizers.Tokenizer.from_str(json.dumps(spelled))
    except Exception as error:  # the library raises plain Exception for a file that it cannot parse
        raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error


def from_sentencepiece(proto: bytes) -> Vocabulary:
    """A SentencePiece BPE model as byte-fallback BPE: the same ids, as `test_tokenizer.py` shows on real text.

    SentencePiece merges the adjacent pair whose union has the highest score; a merge list sorted by that score says
    the same. Of equal scores (Mistral's runs of spaces) the leftmost union grows first: the longer left part goes
    before. Every stretch of text between special tokens begins with "▁" (Llama-2's, Mistral's and our convention).
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    try:
        spec = sentencepiece_model_pb2.ModelProto.FromString(proto)
    except DecodeError as error:
        raise ValueError(f"not a SentencePiece model: {error}") from error
    if spec.trainer_spec.model_type != 2 or spec.normalizer_spec.precompiled_charsmap:
        raise ValueError("only SentencePiece BPE models without text normalisation are read (Llama-2, Mistral, ours)")
    pieces = [(p.piece, p.score, p.type) for p in spec.pieces]
    names = {p.type: p.piece for p in reversed(spec.pieces)}
    trainer = spec.trainer_spec
    known = {name for name, _, kind in pieces if kind == _CONTROL}
    backend = _byte_fallback_bpe(pieces, names.get(_UNKNOWN))
    bos, eos, pad = (n if n in known else None for n in (trainer.bos_piece, trainer.eos_piece, trainer.pad_piece))
    return Vocabulary(backend, bos, eos, pad, names.get(_UNKNOWN), sentencepiece=proto)


def _byte_fallback_bpe(pieces: list[tuple[str, float, int]], unk: str | None) -> tokenizers.Tokenizer:
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    text = {piece for piece, _, kind in pieces if kind in (_NORMAL, _USER_DEFINED)}
    merges = []
    for piece, score, kind in pieces:
        if kind != _NORMAL:
            continue
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [(a, b) for a, b in cuts if a in text and b in text]
        merges += [(-score, -len(a), vocab[a], vocab[b], (a, b)) for a, b in pairs]
    merges = [pair for *_, pair in sorted(merges)]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _add_special(backend, [(piece, kind) for piece, _, kind in pieces])
    return backend


def _from_gguf(path: Path) -> Vocabulary:
    fields = open_gguf(path).fields
    get = {name.removeprefix("tokenizer."): part for name, part in fields.items() if name.startswith("tokenizer.")}
    read = {name: part.contents() for name, part in get.items()}
    if "ggml.tokens" not in read:
        raise ValueError(f"{str(path)!r} has no tokenizer inside (no tokenizer.ggml.tokens)")
    tokens, kinds = read["ggml.tokens"], read["ggml.token_type"]
    if read["ggml.model"] == "gpt2":
        backend = _byte_level_bpe(tokens, kinds, read["ggml.merges"], read.get("ggml.pre", "gpt-2"), path)
    elif read["ggml.model"] == "llama":
        pieces = list(zip(tokens, read["ggml.scores"], kinds, strict=True))
        backend = _byte_fallback_bpe(
            pieces, next((t for t, k in zip(tokens, kinds, strict=True) if k == _UNKNOWN), None)
        )
    else:
        raise ValueError(f"{str(path)!r} holds a {read['ggml.model']!r} tokenizer; known kinds: gpt2, llama")
    ids = (read.get(f"ggml.{name}_token_id") for name in ("bos", "eos", "padding", "unknown"))
    special = (None if i is None else tokens[i] for i in ids)
    return Vocabulary(backend, *special, chat_template=read.get("chat_template"))


def _byte_level_bpe(tokens: list, kinds: list, merges: list, split: str, path: Path) -> tokenizers.Tokenizer:
    if split not in _GGUF_SPLITS:
        raise ValueError(f"{str(path)!r} splits text as {split!r}; known splits: {', '.join(_GGUF_SPLITS)}")
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(_GGUF_SPLITS[split])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    _add_special(backend, list(zip(tokens, kinds, strict=True)))
    return backend


def _add_special(backend: tokenizers.Tokenizer, pieces: list[tuple[str, int]]) -> None:
    special = [
        AddedToken(piece, normalized=False, special=True) for piece, kind in pieces if kind in (_UNKNOWN, _CONTROL)
    ]
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken(piece, normalized=False) for piece, kind in pieces if kind == _USER_DEFINED])
