"""Tokens that a checkpoint's settings add to its vocabulary."""

from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from data.vocabularies.vocabulary import Vocabulary, json_object

_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def add_tokens(backend: tokenizers.Tokenizer, settings: dict, path: Path, *, known_too: bool = False) -> None:
    """Add the tokens of `added_tokens_decoder` and added_tokens.json that the vocabulary lacks.

    With `known_too` the flags of `added_tokens_decoder` hold for tokens of the vocabulary, too.

    Raises:
        ValueError: a token would get another id than the file says.
    """
    added = {int(i): token for i, token in (settings.get("added_tokens_decoder") or {}).items()}
    added |= {i: {"content": token} for token, i in json_object(path / "added_tokens.json").items() if i not in added}
    for i, token in sorted(added.items()):
        content = token["content"]
        if known_too or backend.token_to_id(content) is None:
            given = {flag: token[flag] for flag in _FLAGS if flag in token}
            backend.add_tokens([AddedToken(content, **({"normalized": False} | given))])
        if (found := backend.token_to_id(content)) != i:
            raise ValueError(
                f"{path}: the added token {content!r} has the id {i}, but would get {found}, because ids before it are "
                "missing or the vocabulary has it elsewhere; write the tokenizer once with transformers' "
                "save_pretrained"
            )


def check_written(vocabulary: Vocabulary, settings: dict, path: Path) -> None:
    """Raise ValueError if a template writes a special token that the settings name and the vocabulary lacks."""
    jinja = "".join(vocabulary.templates.values())
    named = list(vocabulary.tokens.items())
    for field in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(tokens := settings.get(field), list):
            named += [("", token["content"] if isinstance(token, dict) else token) for token in tokens]
    for name, token in named:
        if vocabulary.backend.token_to_id(token) is None and (token in jinja or name and name in jinja):
            raise ValueError(
                f"{path}: the chat template writes {token!r}, which tokenizer_config.json names and the vocabulary "
                "lacks, so the model has no embedding of it; use the tokenizer that was saved with this model"
            )
