"""Published tokenizer files, converted to one library (`tokenizers`): tokenizer.json, SentencePiece, tekken, GGUF."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers

from data.vocabularies.added import add_tokens, check_written
from data.vocabularies.byte_level import from_merges
from data.vocabularies.gguf import from_gguf
from data.vocabularies.pieces import as_llama, from_sentencepiece
from data.vocabularies.tekken import from_tekken
from data.vocabularies.vocabulary import Vocabulary, json_object, probe
from runtime.files import check_sums

MAX_TOKENIZER = 1 << 28  # limit in bytes of a tokenizer.json or tekken.json; those of 256k pieces have about 30 MB
_TEMPLATE_FILE = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"
# Model types of which transformers 5 reads tokenizer.json as it is, also if the settings name Llama's class (Phi-3).
_READ_AS_IT_IS = ("mistral", "ministral", "mixtral", "phi3", "granite", "olmo2", "olmo3")
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "chat_template.json",
    _TEMPLATE_FILE,
)


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a Hugging Face directory, a SentencePiece `*.model*` file or a `.gguf` file.

    Raises:
        ValueError: there is no tokenizer, or its kind is unknown.
    """
    if path.is_dir():
        return _from_directory(path)
    if not path.is_file():
        raise ValueError(f"no tokenizer at {str(path)!r}: neither a directory nor a file")
    if path.suffix == ".gguf":
        return from_gguf(path)
    if ".model" in path.suffixes:
        return from_sentencepiece(path.read_bytes())
    raise ValueError(
        f"{str(path)!r} is not a tokenizer; it must be a directory, a .gguf file or a SentencePiece .model file"
    )


def _from_directory(path: Path) -> Vocabulary:
    settings = json_object(path / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:  # as in transformers, which reads the older file only in this case
        settings |= json_object(path / "special_tokens_map.json")
    if settings.get("split_special_tokens"):
        raise ValueError(
            f"{path}/tokenizer_config.json: split_special_tokens=true reads special tokens as text, which is not "
            "supported; set it to false"
        )
    vocabulary = _from_settings(path, settings)
    check_written(vocabulary, settings, path)
    return vocabulary


def _from_settings(path: Path, settings: dict) -> Vocabulary:
    check_sums(path, [*_FILES, "generation_config.json"])
    files = {name: (path / name).read_bytes() for name in _FILES if (path / name).is_file()}
    tokens = {name: _token(value) for name, value in settings.items() if name.endswith("_token")}
    for field in ("model_specific_special_tokens", "extra_special_tokens"):
        more = settings.get(field) or {}
        tokens |= {name: _token(value) for name, value in more.items()} if isinstance(more, dict) else {}
    four = ("bos_token", "eos_token", "pad_token", "unk_token")
    for name in four:
        if settings.get(name) is not None and tokens[name] is None:
            raise ValueError(f"{path}/tokenizer_config.json: {name}={settings[name]!r} must be text")
    tokens = {name: token for name, token in tokens.items() if token}
    special: dict[str, Any] = {name: tokens.pop(name, None) for name in four}
    for file in sorted((path / _MORE_TEMPLATES).glob("*.jinja")):
        files[f"{_MORE_TEMPLATES}/{file.name}"] = file.read_bytes()
    generation, config = (json_object(path / name) for name in ("generation_config.json", "config.json"))
    about: dict[str, Any] = {
        "templates": _templates(settings, files),
        "more_tokens": tokens,
        "generation": generation,
        "stop_ids": _stop_ids(generation, config),
        "files": files,
    }
    kind = settings.get("tokenizer_class", "")
    if "tokenizer.json" in files:
        backend = _read_backend(path / "tokenizer.json")
        if config.get("model_type") not in _READ_AS_IT_IS:
            backend = as_llama(backend, kind, settings)
        add_tokens(backend, settings, path)
        return Vocabulary(backend, **special, **about, sentencepiece=files.get("tokenizer.model"))
    if "tokenizer.model" in files and not _is_tiktoken(files["tokenizer.model"]):
        read = from_sentencepiece(files["tokenizer.model"])
        given = {name: token for name, token in special.items() if token}
        backend = as_llama(read.backend, kind, settings)
        add_tokens(backend, settings, path)
        return replace(read, **given, **about, backend=backend)
    if "vocab.json" in files and "merges.txt" in files:
        return Vocabulary(from_merges(path, kind, settings), **special, **about)
    if "tekken.json" in files:
        _check_size(path / "tekken.json")
        read = from_tekken(files["tekken.json"], path / "tekken.json")
        return replace(read, **(about | {"templates": about["templates"] or read.templates}))
    other = next((file.name for file in sorted(path.glob("*")) if _other_kind(file)), None)
    if other:
        raise ValueError(
            f"{str(path)!r} has its tokenizer only as {other}, which is not supported; write a tokenizer.json once: "
            f"transformers.AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained(DIRECTORY), and pass "
            "tokenizer=DIRECTORY"
        )
    raise ValueError(
        f"no tokenizer in {str(path)!r}: expected tokenizer.json, tokenizer.model, tekken.json, or vocab.json and "
        "merges.txt"
    )


def _is_tiktoken(content: bytes) -> bool:
    """Whether a vocabulary is tiktoken's: lines of base64 and a rank. Some of these are called tokenizer.model."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content) is not None


def _other_kind(file: Path) -> bool:
    return file.suffix == ".tiktoken" or file.name == "tokenizer.model"


def _token(value) -> str | None:
    return value.get("content") if isinstance(value, dict) else value if isinstance(value, str) else None


def _templates(settings: dict, files: dict[str, bytes]) -> dict[str, str]:
    """Jinja texts by name: "default", and others such as "tool_use". Files precede tokenizer_config.json."""
    inside = settings.get("chat_template") or {}
    if isinstance(inside, list):
        inside = {entry["name"]: entry["template"] for entry in inside}
    found = {"default": inside} if isinstance(inside, str) else dict(inside)
    if _TEMPLATE_FILE in files:
        found = {"default": files[_TEMPLATE_FILE].decode()}
    more = {name: text for name, text in files.items() if name.startswith(_MORE_TEMPLATES)}
    found |= {Path(name).stem: text.decode() for name, text in more.items()}
    if found and "default" not in found:
        raise ValueError(f"the checkpoint has chat templates named {', '.join(found)}, but no default template")
    return found


def _stop_ids(generation: dict, config: dict) -> tuple[int, ...]:
    """Ids that end an answer, as in transformers: generation_config.json's, or else config.json's."""
    given = (generation or config.get("text_config") or config).get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise ValueError(f"eos_token_id must be a token id or a list of ids, got {given!r}")
    return tuple(ids)


def _check_size(path: Path) -> None:
    if path.stat().st_size > MAX_TOKENIZER:
        raise ValueError(f"{path} has more than {MAX_TOKENIZER} bytes")


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        _check_size(path)
        backend = tokenizers.Tokenizer.from_file(str(path))
        probe(backend)
    except Exception as error:  # the library raises plain Exception for a file that it cannot parse
        raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error
    return backend
