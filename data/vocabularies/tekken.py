"""Mistral's tekken.json: byte-level BPE by rank. The chat template is part of mistral-common, not of the file."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from data.vocabularies.pieces import MAX_PIECE
from data.vocabularies.tekken_template import TEMPLATES
from data.vocabularies.vocabulary import Vocabulary, probe

# Special tokens of version 7 and earlier, whose files do not list them.
_SPECIAL = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
]  # fmt: skip


def from_tekken(content: bytes, path: Path) -> Vocabulary:
    """The vocabulary. Its template is that of the file's version.

    Raises:
        ValueError: there is no such file, or the template of its version is unknown.
    """
    try:
        read = json.loads(content)
        config = read["config"]
        version, size, num_special = (
            config[name] for name in ("version", "default_vocab_size", "default_num_special_tokens")
        )
        if version not in TEMPLATES:
            raise ValueError(f"it is of version {version!r}; known versions: {', '.join(TEMPLATES)}")
        special = _special_tokens(read.get("special_tokens"), version, num_special)
        ranks = _ranks(read["vocab"], size - num_special)
        backend = _backend(ranks, special, config["pattern"])
        probe(backend)
    except Exception as error:  # the library raises plain Exception for a pattern that it cannot parse
        raise ValueError(f"{path} is not a readable tekken.json: {type(error).__name__}: {error}") from error
    named = (name if name in special else None for name in ("<s>", "</s>", "<pad>", "<unk>"))
    return Vocabulary(backend, *named, templates={"default": TEMPLATES[version]})


def _special_tokens(given: list[dict] | None, version: str, count: int) -> list[str]:
    """The special tokens with ids 0, 1, ..., `count` in total."""
    if given is None and version not in ("v3", "v7"):
        raise ValueError(f"a file of version {version!r} must name its special_tokens")
    named = {token["rank"]: token["token_str"] for token in given or []} or dict(enumerate(_SPECIAL))
    tokens = [named.get(i, f"<SPECIAL_{i}>") for i in range(count)]
    if len(named) > count or set(named) != set(range(len(named))) or len(set(tokens)) < count:
        raise ValueError(f"its special tokens do not have the ranks 0 to {len(named) - 1}, each once")
    return tokens


def _ranks(vocab: list[dict], count: int) -> dict[bytes, int]:
    """bytes -> rank of the first `count` tokens, which must include the 256 bytes."""
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in vocab[:count]}
    if sorted(ranks.values()) != list(range(count)) or any(ranks.get(bytes([i])) is None for i in range(256)):
        raise ValueError(f"its vocabulary does not have the ranks 0 to {count - 1}, each once, including every byte")
    # all splits of a token into two are tried, so the cost is quadratic in its length
    if max(map(len, ranks)) > MAX_PIECE:
        raise ValueError(f"it has a token of more than {MAX_PIECE} bytes")
    return ranks


def _backend(ranks: dict[bytes, int], special: list[str], pattern: str) -> tokenizers.Tokenizer:
    letters = _letters()
    spelled = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    vocab = {token: i for i, token in enumerate(special)}
    vocab |= {spelled[token]: rank + len(special) for token, rank in ranks.items()}
    merges = [(spelled[a], spelled[b]) for a, b in _merges(ranks)]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_alone])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return backend


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair whose union is a token, by the rank of the union; the lowest rank is merged first. Of pairs with the
    same union, the one with the longer left part comes first."""
    for token in sorted(ranks, key=ranks.__getitem__):
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in ranks and token[cut:] in ranks:
                yield token[:cut], token[cut:]


def _letters() -> dict[int, str]:
    """The character of each byte in byte-level BPE: printable Latin-1 unchanged, other bytes from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
