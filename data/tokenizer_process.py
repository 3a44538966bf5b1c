"""A program that encodes with a tokenizer of unknown origin. `data/sandbox.py` starts it and stops it in time."""

import json
import resource
import struct
import sys
from collections.abc import Callable

import tokenizers

MEMORY = 4 << 30


def encode(backend: tokenizers.Tokenizer, text: str, specials: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """(ids of the text, the place of each in it). With `specials`, special tokens in the text are encoded as such."""
    backend.encode_special_tokens = not specials
    encoding = backend.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


def encode_text(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """Ids of the text without special tokens."""
    backend.encode_special_tokens = True
    return backend.encode(text, add_special_tokens=False).ids


def encode_letters(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """Ids of the spelling of one special token as letters and signs."""
    written = backend.normalizer.normalize_str(text) if backend.normalizer else text
    words = [written]
    if backend.pre_tokenizer:
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(written)]
    return [token.id for word in words for token in backend.model.tokenize(word)]


DOES: dict[str, Callable] = {"encode": encode, "encode_text": encode_text, "encode_letters": encode_letters}


def answer(backend: tokenizers.Tokenizer, name: str, words: list) -> list:
    """[result, null], or [null, error message]."""
    try:
        return [DOES[name](backend, *words), None]
    except BaseException as error:  # a panic of the library is not an Exception
        return [None, f"{type(error).__name__}: {error}"]


def main() -> None:
    """Answer requests until stdin is closed."""
    for limit, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(limit, (most, most))
    source, sink, backend = sys.stdin.buffer, sys.stdout.buffer, None
    while head := source.read(8):
        request = json.loads(source.read(*struct.unpack("<Q", head)))
        if "text" in request:
            backend, reply = tokenizers.Tokenizer.from_str(request["text"]), None
        else:
            reply = answer(backend, request["name"], request["words"])
        body = json.dumps(reply).encode()
        sink.write(struct.pack("<Q", len(body)) + body)
        sink.flush()


if __name__ == "__main__":
    main()
