"""SentencePiece's BPE as byte-fallback BPE of the library `tokenizers`."""

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from data.vocabularies.vocabulary import Vocabulary

MAX_PIECE = 512  # in characters; the longest known pieces, runs of spaces, have about 90
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # piece types of SentencePiece, kept by GGUF


def from_sentencepiece(proto: bytes) -> Vocabulary:
    """A SentencePiece BPE model as byte-fallback BPE with the same ids, as `test_tokenizer.py` shows on real text.

    SentencePiece merges the adjacent pair whose union has the highest score. A merge list sorted by that score is
    equivalent. Of equal scores (Mistral's runs of spaces) the leftmost union grows first, so the longer left part has
    precedence. If the model has add_dummy_prefix, as Llama-2's, Mistral's and ours, every part of the text between
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
        raise ValueError(
            "only SentencePiece BPE models without text normalisation are supported (Llama-2, Mistral, ours)"
        )
    for name, value, wanted in (
        ("remove_extra_whitespaces", normalizer.remove_extra_whitespaces, False),
        ("escape_whitespaces", normalizer.escape_whitespaces, True),
        ("treat_whitespace_as_suffix", trainer.treat_whitespace_as_suffix, False),
        ("byte_fallback", trainer.byte_fallback, True),
    ):
        if value != wanted:
            raise ValueError(
                f"a SentencePiece model with {name}={str(value).lower()} is not supported: ids would differ"
            )
    if normalizer.add_dummy_prefix and any(p.type == USER_DEFINED for p in spec.pieces):
        raise ValueError(
            "a SentencePiece model with add_dummy_prefix=true and user-defined pieces is not supported: ids would "
            "differ; write a tokenizer.json with transformers"
        )
    pieces = [(p.piece.replace("▁", " ") if p.type == USER_DEFINED else p.piece, p.score, p.type) for p in spec.pieces]
    check_pieces([piece for piece, *_ in pieces])
    names = {p.type: p.piece for p in reversed(spec.pieces)}
    known = {name for name, _, kind in pieces if kind == CONTROL}
    backend = byte_fallback_bpe(pieces, names.get(UNKNOWN), space_first=normalizer.add_dummy_prefix)
    bos, eos, pad = (n if n in known else None for n in (trainer.bos_piece, trainer.eos_piece, trainer.pad_piece))
    return Vocabulary(backend, bos, eos, pad, names.get(UNKNOWN), sentencepiece=proto)


def check_pieces(pieces: list[str]) -> None:
    """Refuse long pieces. All splits of a piece into two are tried, so its cost is quadratic in its length."""
    longest = max(pieces, key=len, default="")
    if len(longest) > MAX_PIECE:
        raise ValueError(f"the piece {longest[:20]!r}... of {len(longest)} characters is longer than {MAX_PIECE}")


def byte_fallback_bpe(
    pieces: list[tuple[str, float, int]], unk: str | None, *, space_first: bool
) -> tokenizers.Tokenizer:
    """A byte-fallback BPE backend, as Llama 2's, from SentencePiece's (piece, score, kind)."""
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    # user-defined pieces are found before the text is split
    text = {piece for piece, _, kind in pieces if kind == NORMAL}
    ranked = []
    for piece, score, kind in pieces:
        if kind != NORMAL:
            continue
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [(a, b) for a, b in cuts if a in text and b in text]
        ranked += [(-score, -len(a), vocab[a], vocab[b], (a, b)) for a, b in pairs]
    merges = [pair for *_, pair in sorted(ranked)]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if space_first else spaces
    backend.decoder = _pieces_decoder(space_first)
    add_special(backend, [(piece, kind) for piece, _, kind in pieces])
    return backend


def as_llama(backend: tokenizers.Tokenizer, kind: str, settings: dict) -> tokenizers.Tokenizer:
    """The tokenizer by transformers 5's rule for Llama's class: `legacy` decides whether a space comes first.

    That class ignores this setting of tokenizer.json, except in byte-level files (Llama 3).
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


def add_special(backend: tokenizers.Tokenizer, pieces: list[tuple[str, int]]) -> None:
    """Let the backend find control pieces and user-defined pieces before it splits text."""
    special = [
        AddedToken(piece, normalized=False, special=True) for piece, kind in pieces if kind in (UNKNOWN, CONTROL)
    ]
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken(piece, normalized=False) for piece, kind in pieces if kind == USER_DEFINED])
