"""Other people's tokenizer files, read into one engine (`tokenizers`): tokenizer.json, SentencePiece models, GGUF."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from model.weights.gguf import open_gguf
from model.weights.hf import read_json
from runtime.files import check_sums

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
MAX_TOKENIZER = 1 << 28  # bytes of a tokenizer.json; those of 256k pieces have some 30 MB
PROBE = "".join(char * 256 for char in "aA1 \n.é") + "aA1 .é\n" * 64  # what greedy patterns take longest for
MAX_PIECE = 512  # characters; the longest of the vocabularies that we know, runs of spaces, have some 90
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # piece types of SentencePiece, kept by GGUF
_TEMPLATE_FILE = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"
_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "tekken.json", "chat_template.json", _TEMPLATE_FILE,
)  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """What a checkpoint says about its tokenizer. `templates` are Jinja texts by name, empty for a base model.

    `tokens` are the special tokens by the names that Jinja knows (bos_token, ...), `stop_ids` what
    generation_config.json or config.json names as ends, `files` the tokenizer's files as they are, by name.
    """

    backend: tokenizers.Tokenizer
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None = None
    unk_token: str | None = None
    templates: dict[str, str] = field(default_factory=dict)
    more_tokens: dict[str, str] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    generation: dict = field(default_factory=dict)  # generation_config.json
    sentencepiece: bytes | None = field(default=None, repr=False)
    files: dict[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> dict[str, str]:
        named = {name: getattr(self, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return {name: token for name, token in named.items() if token is not None} | self.more_tokens


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
    check_sums(path, [*_FILES, "generation_config.json"])
    files = {name: (path / name).read_bytes() for name in _FILES if (path / name).is_file()}
    settings = _json(path / "special_tokens_map.json") | _json(path / "tokenizer_config.json")
    tokens = {name: _token(value) for name, value in settings.items() if name.endswith("_token")}
    tokens |= {name: _token(v) for name, v in (settings.get("model_specific_special_tokens") or {}).items()}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if settings.get(name) is not None and tokens[name] is None:
            raise ValueError(f"{path}/tokenizer_config.json: {name}={settings[name]!r} must be text")
    tokens = {name: token for name, token in tokens.items() if token}
    special = {name: tokens.pop(name, None) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    for file in sorted((path / _MORE_TEMPLATES).glob("*.jinja")):
        files[f"{_MORE_TEMPLATES}/{file.name}"] = file.read_bytes()
    generation = _json(path / "generation_config.json")
    about = {
        "templates": _templates(settings, files), "more_tokens": tokens, "generation": generation,
        "stop_ids": _stop_ids(generation, _json(path / "config.json")), "files": files,
    }  # fmt: skip
    kind = settings.get("tokenizer_class", "")
    if "tokenizer.json" in files:
        backend = as_llama(_read_backend(path / "tokenizer.json"), kind, settings)
        return Vocabulary(backend, **special, **about, sentencepiece=files.get("tokenizer.model"))
    if "tokenizer.model" in files and not _is_tiktoken(files["tokenizer.model"]):
        read = from_sentencepiece(files["tokenizer.model"])
        given = {name: token for name, token in special.items() if token}
        return replace(read, **given, **about, backend=as_llama(read.backend, kind, settings))
    if "vocab.json" in files and "merges.txt" in files:
        return Vocabulary(_from_merges(path, kind, settings), **special, **about)
    other = next((file.name for file in sorted(path.glob("*")) if _other_kind(file)), None)
    if other:
        raise ValueError(
            f"{str(path)!r} holds its tokenizer as {other} alone, which is not read here; write a tokenizer.json once: "
            f"transformers.AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained(DIRECTORY), and pass "
            "tokenizer=DIRECTORY"
        )
    raise ValueError(
        f"no tokenizer in {str(path)!r}: expected tokenizer.json, tokenizer.model, or vocab.json + merges.txt"
    )


def _is_tiktoken(content: bytes) -> bool:
    """Whether a vocabulary is tiktoken's: lines of base64 and a rank. Some are called tokenizer.model all the same."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content) is not None


def _other_kind(file: Path) -> bool:
    return file.suffix == ".tiktoken" or file.name in ("tekken.json", "tokenizer.model")


def as_llama(backend: tokenizers.Tokenizer, kind: str, settings: dict) -> tokenizers.Tokenizer:
    """The tokenizer under transformers 5's rule for Llama's class: where a space goes first is told by `legacy`.

    That class leaves aside what tokenizer.json says of it, except in byte-level files (Llama 3).
    """
    if kind not in ("LlamaTokenizer", "LlamaTokenizerFast") or "ByteLevel" in backend.to_str():
        return backend
    adds = settings.get("add_prefix_space") is not False
    scheme = ("always" if settings.get("legacy") else "first") if adds else "never"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    backend.decoder = _pieces_decoder(adds)
    return backend


def _pieces_decoder(space_first: bool):
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if space_first else []))


def _from_merges(path: Path, kind: str, settings: dict) -> tokenizers.Tokenizer:
    """vocab.json and merges.txt of GPT-2's or Qwen2's tokenizer, which differ in how they split text."""
    splits = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}
    name = kind.removesuffix("Fast")
    if name not in splits:
        known = ", ".join(splits)
        raise ValueError(f"{path}: vocab.json and merges.txt of tokenizer_class {kind!r} are not read; known: {known}")
    vocab = _json(path / "vocab.json")
    lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    added = {int(i): token for i, token in (settings.get("added_tokens_decoder") or {}).items()}
    added |= {i: {"content": token} for token, i in _json(path / "added_tokens.json").items() if i not in added}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    backend.normalizer = normalizers.NFC() if name == "Qwen2Tokenizer" else None
    backend.pre_tokenizer = pre_tokenizers.Sequence(_GGUF_SPLITS[splits[name]])
    backend.decoder = decoders.ByteLevel()
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    for i, token in sorted(added.items()):
        given = {flag: token[flag] for flag in flags if flag in token}
        backend.add_tokens([AddedToken(token["content"], **({"normalized": False} | given))])
        if backend.token_to_id(token["content"]) != i:
            raise ValueError(
                f"{path}: the added token {token['content']!r} has the id {i}, which leaves a gap before it"
            )
    return backend


def _json(path: Path) -> dict:
    """The object in the file, an empty one where there is no file. Raises ValueError where it is no JSON object."""
    if not path.is_file():
        return {}
    return read_json(path)


def _token(value) -> str | None:
    return value.get("content") if isinstance(value, dict) else value if isinstance(value, str) else None


def _templates(settings: dict, files: dict[str, bytes]) -> dict[str, str]:
    """Jinja texts by name: "default", and others such as "tool_use". Files go before tokenizer_config.json."""
    inside = settings.get("chat_template") or {}
    if isinstance(inside, list):
        inside = {entry["name"]: entry["template"] for entry in inside}
    found = {"default": inside} if isinstance(inside, str) else dict(inside)
    if _TEMPLATE_FILE in files:
        found = {"default": files[_TEMPLATE_FILE].decode()}
    more = {name: text for name, text in files.items() if name.startswith(_MORE_TEMPLATES)}
    found |= {Path(name).stem: text.decode() for name, text in more.items()}
    if found and "default" not in found:
        raise ValueError(f"the checkpoint has chat templates named {', '.join(found)}, but none named default")
    return found


def _stop_ids(generation: dict, config: dict) -> tuple[int, ...]:
    """Ids that end an answer, as transformers finds them: generation_config.json's, without that file config.json's."""
    given = (generation or config.get("text_config") or config).get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise ValueError(f"eos_token_id must be a token id or a list of ids, got {given!r}")
    return tuple(ids)


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        if path.stat().st_size > MAX_TOKENIZER:
            raise ValueError(f"it has more than {MAX_TOKENIZER} bytes")
        backend = tokenizers.Tokenizer.from_file(str(path))
        with panics_named():
            backend.encode(PROBE)
    except Exception as error:  # the library raises plain Exception for a file that it cannot parse
        raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error
    return backend


@contextmanager
def panics_named() -> Iterator[None]:
    """A panic of the library, say a pattern that gives up on a text, is a ValueError: it is no Exception by itself."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer gave up on a text: {error}") from None


def with_special(vocabulary: Vocabulary, markers: set[str]) -> Vocabulary:
    """The vocabulary with these added tokens marked as special: some chat models forget to say so."""
    careless = {t.content for t in vocabulary.backend.get_added_tokens_decoder().values() if not t.special} & markers
    if not careless:
        return vocabulary
    spelled = json.loads(vocabulary.backend.to_str())
    for token in spelled["added_tokens"]:
        token["special"] |= token["content"] in careless
    return replace(vocabulary, backend=tokenizers.Tokenizer.from_str(json.dumps(spelled)))


class ReadingOn(NamedTuple):
    """The tokenizer for text that other text goes before: without the space that SentencePiece puts first.

    `only_first`: a stretch after a special token goes without that space too.
    """

    backend: tokenizers.Tokenizer
    only_first: bool


def reading_on(backend: tokenizers.Tokenizer) -> ReadingOn | None:
    """None where the tokenizer puts nothing first."""
    before = json.loads(backend.to_str())
    after = before | {name: _without_space(before[name]) for name in ("normalizer", "pre_tokenizer")}
    if after == before:
        return None
    other = tokenizers.Tokenizer.from_str(json.dumps(after))
    other.no_truncation()
    other.no_padding()
    other.encode_special_tokens = True
    return ReadingOn(other, only_first='"prepend_scheme": "first"' in json.dumps(before["pre_tokenizer"]))


def _without_space(part: dict | None) -> dict | None:
    """A normalizer or pre-tokenizer without the space that it puts before a text."""
    for inside in ("normalizers", "pretokenizers"):
        if part and inside in part:
            return part | {inside: [step for each in part[inside] if (step := _without_space(each))]}
    if part and part["type"] == "Prepend":
        return None
    changes = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}
    return part and part | changes.get(part["type"], {})


def from_sentencepiece(proto: bytes) -> Vocabulary:
    """A SentencePiece BPE model as byte-fallback BPE: the same ids, as `test_tokenizer.py` shows on real text.

    SentencePiece merges the adjacent pair whose union has the highest score; a merge list sorted by that score says
    the same. Of equal scores (Mistral's runs of spaces) the leftmost union grows first: the longer left part goes
    before. Where the model says add_dummy_prefix, as Llama-2's, Mistral's and ours do, every stretch of text between
    special tokens begins with "▁".
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    try:
        spec = sentencepiece_model_pb2.ModelProto.FromString(proto)
    except DecodeError as error:
        raise ValueError(f"not a SentencePiece model: {error}") from error
    trainer, normalizer = spec.trainer_spec, spec.normalizer_spec
    if trainer.model_type != 2 or normalizer.precompiled_charsmap:
        raise ValueError("only SentencePiece BPE models without text normalisation are read (Llama-2, Mistral, ours)")
    for name, value, wanted in (
        ("remove_extra_whitespaces", normalizer.remove_extra_whitespaces, False),
        ("escape_whitespaces", normalizer.escape_whitespaces, True),
        ("treat_whitespace_as_suffix", trainer.treat_whitespace_as_suffix, False),
        ("byte_fallback", trainer.byte_fallback, True),
    ):
        if value != wanted:
            raise ValueError(f"a SentencePiece model with {name}={str(value).lower()} is not read: ids would differ")
    pieces = [(p.piece, p.score, p.type) for p in spec.pieces]
    _check_pieces([piece for piece, *_ in pieces])
    names = {p.type: p.piece for p in reversed(spec.pieces)}
    known = {name for name, _, kind in pieces if kind == _CONTROL}
    backend = _byte_fallback_bpe(pieces, names.get(_UNKNOWN), space_first=normalizer.add_dummy_prefix)
    bos, eos, pad = (n if n in known else None for n in (trainer.bos_piece, trainer.eos_piece, trainer.pad_piece))
    return Vocabulary(backend, bos, eos, pad, names.get(_UNKNOWN), sentencepiece=proto)


def _check_pieces(pieces: list[str]) -> None:
    """Every way to cut a piece in two is tried, so a long one costs the square of its length."""
    longest = max(pieces, key=len, default="")
    if len(longest) > MAX_PIECE:
        raise ValueError(f"the piece {longest[:20]!r}... of {len(longest)} characters is longer than {MAX_PIECE}")


def _byte_fallback_bpe(
    pieces: list[tuple[str, float, int]], unk: str | None, *, space_first: bool
) -> tokenizers.Tokenizer:
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
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if space_first else spaces
    backend.decoder = _pieces_decoder(space_first)
    _add_special(backend, [(piece, kind) for piece, _, kind in pieces])
    return backend


def _from_gguf(path: Path) -> Vocabulary:
    fields = open_gguf(path).fields
    get = {name.removeprefix("tokenizer."): part for name, part in fields.items() if name.startswith("tokenizer.")}
    try:
        read = {name: part.contents() for name, part in get.items()}
        return _from_fields(read, path)
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: its tokenizer cannot be meant ({error})") from error


def _from_fields(read: dict, path: Path) -> Vocabulary:
    if "ggml.tokens" not in read:
        raise ValueError(f"{str(path)!r} has no tokenizer inside (no tokenizer.ggml.tokens)")
    tokens, kinds = read["ggml.tokens"], read["ggml.token_type"]
    _check_pieces(tokens)
    if read["ggml.model"] == "gpt2":
        backend = _byte_level_bpe(tokens, kinds, read["ggml.merges"], read.get("ggml.pre", "gpt-2"), path)
    elif read["ggml.model"] == "llama":
        pieces = list(zip(tokens, read["ggml.scores"], kinds, strict=True))
        if read.get("ggml.remove_extra_whitespaces") or read.get("ggml.precompiled_charsmap") is not None:
            raise ValueError(f"{str(path)!r} normalises text before it splits it, which is not read: ids would differ")
        unk = next((t for t, k in zip(tokens, kinds, strict=True) if k == _UNKNOWN), None)
        backend = _byte_fallback_bpe(pieces, unk, space_first=bool(read.get("ggml.add_space_prefix", True)))
    else:
        raise ValueError(f"{str(path)!r} holds a {read['ggml.model']!r} tokenizer; known kinds: gpt2, llama")
    ids = (read.get(f"ggml.{name}_token_id") for name in ("bos", "eos", "padding", "unknown"))
    special = (None if i is None else tokens[i] for i in ids)
    templates = {"default": read["chat_template"]} if read.get("chat_template") else {}
    more = {name.split(".")[1]: text for name, text in read.items() if name.startswith("chat_template.")}
    return Vocabulary(backend, *special, templates=templates | more if templates else {})


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
