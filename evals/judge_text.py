"""Shared by the parsers of verdicts and grades: remove thinking, quotes and code, and normalise spellings."""

import json
import re
import unicodedata
from collections.abc import Iterator

DOUBLE = r"\[\[\s*([^\[\]\n]{1,40}?)\s*\]\]"
BOXED = r"\\boxed\s*\{\s*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?([^{}\n]{1,40})\}"

_THINK = r"think(?:ing)?|thoughts?|reasoning|scratchpad|seed:think"
_OPEN = rf"<(?:{_THINK})>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|channel\|>\s*(?:analysis|commentary)"
_CLOSE = rf"</(?:{_THINK})>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|channel\|>\s*final\s*(?:<\|message\|>)?"
_ECHO = r"\[The Start of [^\]\n]*\].*?(?:\[The End of [^\]\n]*\]|\Z)"  # blocks of the prompt that the judge repeats
_FENCE = r"^[ \t]*(```|~~~)[^\n]*\n.*?(?:^[ \t]*\1[ \t]*$|\Z)"
_QUOTES = (
    r"^[ \t]*>.*$",
    r"`[^`\n]+`",
    r'(?<!\w)"[^"\n]*"(?!\w)',
    r"“[^”\n]*”",
    r"„[^“”\n]*[“”]",
    r"«[^»\n]*»",
    r"「[^」\n]*」",
    r"(?<!\w)'[^'\n]{1,60}'(?!\w)",
    r"‘[^’\n]{1,60}’",
)


def without_thinking(text: str) -> str | None:
    """The text after the last end of thinking. None if thinking does not end."""
    closed = list(re.finditer(_CLOSE, text, re.IGNORECASE))
    text = text[closed[-1].end() :] if closed else text
    opened = re.search(_OPEN, text, re.IGNORECASE)
    return None if opened else text


def blank(pattern: str, text: str) -> str:
    """The text with matches replaced by spaces, so that positions do not change."""
    flags = re.MULTILINE | re.DOTALL if pattern in (_ECHO, _FENCE) else re.MULTILINE
    return re.sub(pattern, lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=flags)


def own_words(text: str) -> tuple[str, str]:
    """(the text without the prompt's blocks and an outer code fence, the same with code and quotes blanked)."""
    seen = blank(_ECHO, text)
    inside = re.fullmatch(r"\s*(```|~~~)\w*\n(.*?)\n?\s*\1\s*", seen, re.DOTALL)
    seen = inside[2] if inside else seen
    blanked = blank(_FENCE, seen)
    for quote in _QUOTES:
        blanked = blank(quote, blanked)
    return seen, blanked


_SPELLINGS = {
    "【": "[", "】": "]", "〖": "[", "〗": "]", "≫": ">>", "≪": "<<", "≻": ">", "≺": "<", "≈": "=", "\r\n": "\n",
    r"\succ": ">", r"\prec": "<", r"\gg": ">>", r"\ll": "<<", "&gt;": ">", "&lt;": "<", r"\[\[": "[[", r"\]\]": "]]",
    "<|begin_of_box|>": r"\boxed{", "<|end_of_box|>": "}",
}  # fmt: skip


def plain(text: str) -> str:
    """The text with full-width letters, and brackets and signs of Markdown, LaTeX and HTML, replaced by ASCII."""
    text = unicodedata.normalize("NFKC", text.replace("【", "[").replace("】", "]"))
    for written, plain in _SPELLINGS.items():
        text = text.replace(written, plain)
    return re.sub(r"\[\[([AB])\]\]\s*(>>?|<<?|=)\s*\[\[([AB])\]\]", r"[[\1\2\3]]", text)


CUT = re.compile(r"(?:\[\[[^\[\]\n]{0,12}|,|\b(?i:but|however|although|while|whereas|and|because))\s*\Z")


UNABLE = (
    r"\b(?:i(?:'m|’m| am) (?:sorry|unable|not able)|i (?:cannot|can['’]t|won['’]t|will not) (?:\w+ ){0,2}"
    r"(?:assist|help|judge|compare|evaluate|choose|provide|engage|comply|rate))\b"
)


def json_objects(text: str) -> Iterator[tuple[int, str]]:
    """(position, text) of every object of a text that is JSON, with braces in its values, or is almost JSON."""
    decoder, end = json.JSONDecoder(), 0
    for brace in re.finditer(r"\{", text):
        start = brace.start()
        if start < end:
            continue  # a part of the last object
        try:
            _, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            almost = re.compile(r"\{[^{}]*\}").match(text, start)
            end = almost.end() if almost else end
        if start < end:
            yield start, text[start:end]


def json_value(text: str, keys: str) -> str | None:
    """The value of the first verdict key of a JSON object, or of text that is almost JSON."""
    try:
        row = json.loads(text)
        pairs = [(str(key), value) for key, value in row.items()] if isinstance(row, dict) else []
    except ValueError:
        pairs = re.findall(r"[\"']?([A-Za-z_ ]+)[\"']?\s*:\s*[\"']?([^\"',{}\n]+)[\"']?\s*(?=[,}\n])", text)
    for key, value in pairs:
        name = rf"(?:final|overall|my|the)?[_ ]?(?:{keys})(?:[_ ](?:answer|response|assistant|model|verdict))?"
        if re.fullmatch(name, key.strip(), re.IGNORECASE) and isinstance(value, str | int | float):
            return str(value)
    return None
