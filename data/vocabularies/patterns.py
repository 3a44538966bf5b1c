"""The regular expressions with which published tokenizers split text. None of them backtracks over long text."""

_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SAID = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"

LLAMA3 = rf"{_SAID}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}"  # cl100k's: Llama 3, Phi 4, SmolLM3
QWEN2 = rf"{_SAID}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}"  # Qwen 2 to 3
QWEN3_5 = rf"{_SAID}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_ENDS}"
TEKKEN = rf"{_CASED % ('', '')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"  # Mistral
O200K = rf"{_CASED % (_SAID + '?', _SAID + '?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"  # GPT-OSS
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # built into ByteLevel
SPACES = r" {2,}"  # runs of spaces that SentencePiece's normalizers join

KNOWN_PATTERNS = frozenset((LLAMA3, QWEN2, QWEN3_5, TEKKEN, O200K, GPT2, SPACES))
