"""The tokenizer inside a .gguf file."""

from pathlib import Path

from data.vocabularies.byte_level import byte_level_bpe
from data.vocabularies.pieces import UNKNOWN, byte_fallback_bpe, check_pieces
from data.vocabularies.vocabulary import Vocabulary
from model.weights.gguf import open_gguf


def from_gguf(path: Path) -> Vocabulary:
    """The vocabulary of a GGUF file. Raises ValueError if a field is missing or unknown."""
    fields = open_gguf(path).fields
    get = {name.removeprefix("tokenizer."): part for name, part in fields.items() if name.startswith("tokenizer.")}
    try:
        read = {name: part.contents() for name, part in get.items()}
        return _from_fields(read, path)
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: its tokenizer is invalid ({error})") from error


def _from_fields(read: dict, path: Path) -> Vocabulary:
    if "ggml.tokens" not in read:
        raise ValueError(f"{str(path)!r} contains no tokenizer (no tokenizer.ggml.tokens)")
    tokens, kinds = read["ggml.tokens"], read["ggml.token_type"]
    check_pieces(tokens)
    if read["ggml.model"] == "gpt2":
        backend = byte_level_bpe(tokens, kinds, read["ggml.merges"], read.get("ggml.pre", "gpt-2"), path)
    elif read["ggml.model"] == "llama":
        pieces = list(zip(tokens, read["ggml.scores"], kinds, strict=True))
        if read.get("ggml.remove_extra_whitespaces") or read.get("ggml.precompiled_charsmap") is not None:
            raise ValueError(
                f"{str(path)!r} normalises text before it splits it, which is not supported: ids would differ"
            )
        unk = next((t for t, k in zip(tokens, kinds, strict=True) if k == UNKNOWN), None)
        backend = byte_fallback_bpe(pieces, unk, space_first=bool(read.get("ggml.add_space_prefix", True)))
    else:
        raise ValueError(f"{str(path)!r} has a {read['ggml.model']!r} tokenizer; known kinds: gpt2, llama")
    ids = (read.get(f"ggml.{name}_token_id") for name in ("bos", "eos", "padding", "unknown"))
    special = (None if i is None else tokens[i] for i in ids)
    templates = {"default": read["chat_template"]} if read.get("chat_template") else {}
    more = {name.split(".")[1]: text for name, text in read.items() if name.startswith("chat_template.")}
    return Vocabulary(backend, *special, templates=templates | more if templates else {})
