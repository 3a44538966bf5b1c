"""A checkpoint's tokenizer settings, and its tokenizer (`tokenizers`) for text that continues other text."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import tokenizers

from data.sandbox import BoundedTokenizer
from data.tokenizer_process import encode, encode_letters, encode_text
from data.vocabularies.patterns import KNOWN_PATTERNS
from model.weights.hf import read_json


@dataclass(frozen=True)
class Vocabulary:
    """A checkpoint's tokenizer settings. `templates` are Jinja texts by name, empty for a base model.

    `tokens` are the special tokens by their names in Jinja (bos_token, ...). `stop_ids` are the end tokens of
    generation_config.json or config.json. `files` are the tokenizer's files by name, unchanged.
    """

    backend: tokenizers.Tokenizer
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None = None
    unk_token: str | None = None
    _: KW_ONLY
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


def probe(backend: tokenizers.Tokenizer) -> None:
    """Raise ValueError if the tokenizer cannot split the texts on which greedy patterns are slowest."""
    encoder_of(backend).encode_text("".join(char * 256 for char in "aA1 \n.é") + "aA1 .é\n" * 64)


class UnboundedTokenizer:
    """A tokenizer's encoding in this process: the methods of `BoundedTokenizer` without its limits."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend

    def encode(self, text: str, specials: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """As `tokenizer_process.encode`. Raises ValueError if the tokenizer fails."""
        with panics_as_errors():
            return encode(self.backend, text, specials)

    def encode_text(self, text: str) -> list[int]:
        """As `tokenizer_process.encode_text`."""
        with panics_as_errors():
            return encode_text(self.backend, text)

    def encode_letters(self, text: str) -> list[int]:
        """As `tokenizer_process.encode_letters`."""
        with panics_as_errors():
            return encode_letters(self.backend, text)


def encoder_of(backend: tokenizers.Tokenizer) -> UnboundedTokenizer | BoundedTokenizer:
    """An encoder in this process if all patterns are known, else one in a process that can be stopped.

    The patterns determine the time. Known patterns, of published families, take a time proportional to the text's
    length. Others may try all ways to split a run of letters. The separate process takes about twice as long.
    """
    parts = (backend.normalizer, backend.pre_tokenizer)
    patterns = set(patterns_in([json.loads(part.__getstate__()) for part in parts if part]))
    return UnboundedTokenizer(backend) if patterns <= KNOWN_PATTERNS else BoundedTokenizer(backend)


def patterns_in(part) -> Iterator[str]:
    """Every regular expression in a tokenizer's JSON."""
    if isinstance(part, dict):
        if "Regex" in part:
            yield part["Regex"]
        part = list(part.values())
    if isinstance(part, list):
        for each in part:
            yield from patterns_in(each)


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turn a panic of the library, which is not an Exception, into a ValueError. Some patterns panic on a text."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer failed on a text: {error}") from None


def with_special(vocabulary: Vocabulary, markers: set[str]) -> Vocabulary:
    """The vocabulary with these added tokens marked as special, because some chat models do not mark them."""
    careless = {t.content for t in vocabulary.backend.get_added_tokens_decoder().values() if not t.special} & markers
    if not careless:
        return vocabulary
    spelled = json.loads(vocabulary.backend.to_str())
    for token in spelled["added_tokens"]:
        token["special"] |= token["content"] in careless
    return replace(vocabulary, backend=tokenizers.Tokenizer.from_str(json.dumps(spelled)))


class ReadingOn(NamedTuple):
    """The tokenizer for text that continues other text: it adds no SentencePiece space at the beginning.

    `only_first`: text after a special token also gets no space.
    """

    backend: tokenizers.Tokenizer
    only_first: bool


def reading_on(backend: tokenizers.Tokenizer) -> ReadingOn | None:
    """`ReadingOn` of the tokenizer. None if the tokenizer adds nothing at the beginning."""
    parts = {"normalizer": backend.normalizer, "pre_tokenizer": backend.pre_tokenizer}
    before = {name: part and json.loads(part.__getstate__()) for name, part in parts.items()}
    after = {name: _without_space(part) for name, part in before.items()}
    if after == before:
        return None
    other = tokenizers.Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | after))
    other.no_truncation()
    other.no_padding()
    return ReadingOn(other, only_first='"prepend_scheme": "first"' in json.dumps(before["pre_tokenizer"]))


def _without_space(part: dict | None) -> dict | None:
    """A normalizer or pre-tokenizer that does not add a space before the text."""
    for inside in ("normalizers", "pretokenizers"):
        if part and inside in part:
            return part | {inside: [step for each in part[inside] if (step := _without_space(each))]}
    if part and part["type"] == "Prepend":
        return None
    changes: dict[str, dict] = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}
    return part and part | changes.get(part["type"], {})


def json_object(path: Path) -> dict:
    """The object in the file, or an empty one if there is no file. Raises ValueError if it is not a JSON object."""
    if not path.is_file():
        return {}
    return read_json(path)
