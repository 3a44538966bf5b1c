"""Parse a judge's text: its verdict is the last one outside of thinking, quotes and code.

The parser first removes thinking, then blanks quotes and code. Then it searches for statements of a verdict, from the
most explicit kind to the least explicit one. Within a kind the last statement counts:

    marks       [[A]], \\boxed{A}, <answer>A</answer>, {"winner": "A"}, "Final verdict: A"
    bare names  [A], or a last line that holds nothing but a name
    words       "Assistant A is better", "both are equally good"
    scores      "A: 8/10, B: 7/10", "8 7"

A text with two different verdicts, or none, is an error, and `Reading.why` has the reason. The parsers of published
benchmarks are in `evals/published_parsers.py`.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import NamedTuple

from evals.judge_words import NOUN, Meaning, identifier_meaning, letter_meaning, read_words


class Reading(NamedTuple):
    """A parsed text: verdict a | b | tie | error, its weight (3: Arena-Hard's strong verdicts), why it is an error."""

    verdict: str
    weight: float = 1.0
    why: str = ""


# ---- text that cannot contain a verdict

_THINK = r"think(?:ing)?|thoughts?|reasoning|scratchpad|seed:think"
_OPEN = rf"<(?:{_THINK})>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|channel\|>\s*(?:analysis|commentary)"
_CLOSE = rf"</(?:{_THINK})>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|channel\|>\s*final\s*(?:<\|message\|>)?"
_ECHO = r"\[The Start of [^\]\n]*\].*?(?:\[The End of [^\]\n]*\]|\Z)"  # the prompt's own blocks, repeated
_FENCE = r"^[ \t]*(```|~~~)[^\n]*\n.*?(?:^[ \t]*\1[ \t]*$|\Z)"
_QUOTES = (
    r"^[ \t]*>.*$", r"`[^`\n]+`", r'(?<!\w)"[^"\n]*"(?!\w)', r"“[^”\n]*”", r"„[^“”\n]*[“”]", r"«[^»\n]*»",
    r"「[^」\n]*」", r"(?<!\w)'[^'\n]{1,60}'(?!\w)", r"‘[^’\n]{1,60}’",
)  # fmt: skip


def without_thinking(text: str) -> str | None:
    """The text after the last end of thinking. None where thinking does not end."""
    closed = list(re.finditer(_CLOSE, text, re.IGNORECASE))
    text = text[closed[-1].end() :] if closed else text
    opened = re.search(_OPEN, text, re.IGNORECASE)
    return None if opened else text


def _blank(pattern: str, text: str) -> str:
    """The text with matches replaced by spaces, so that positions do not change."""
    flags = re.MULTILINE | re.DOTALL if pattern in (_ECHO, _FENCE) else re.MULTILINE
    return re.sub(pattern, lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=flags)


def _own_words(text: str) -> tuple[str, str]:
    """(the text without the prompt's blocks and an outer code fence, the same with code and quotes blanked)."""
    seen = _blank(_ECHO, text)
    inside = re.fullmatch(r"\s*(```|~~~)\w*\n(.*?)\n?\s*\1\s*", seen, re.DOTALL)
    seen = inside[2] if inside else seen
    blanked = _blank(_FENCE, seen)
    for quote in _QUOTES:
        blanked = _blank(quote, blanked)
    return seen, blanked


def _plain(text: str) -> str:
    """The text with full-width brackets, letters and signs replaced by ASCII."""
    text = unicodedata.normalize(
        "NFKC", text.replace("【", "[").replace("】", "]").replace("〖", "[").replace("〗", "]")
    )
    return text.replace("≫", ">>").replace("≪", "<<").replace("≻", ">").replace("≈", "=").replace("\r\n", "\n")


# ---- statements: (position, meaning)

_DOUBLE = r"\[\[\s*([^\[\]\n]{1,40}?)\s*\]\]"
_BOXED = r"\\boxed\s*\{\s*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?([^{}\n]{1,40})\}"
_TAGGED = (
    r"<((?:final[_ ]?)?(?:answer|verdict|winner|choice|judge?ment|decision|result|preference|output|preferred|"
    r"rating|score|grade))>\s*([^<>\n]{1,60}?)\s*</\1>"
)
_CUE = (
    r"(?:verdict|decision|judge?ment|answer|choice|winner|winning (?:answer|response|assistant|model)|preference|"
    r"conclusion|selection|result|pick|vote|evaluation|"
    r"(?:best|better|preferred|superior|stronger)(?: (?:answer|response|assistant|model|one|output|option|reply|"
    r"choice))?|"
    r"最终(?:判断|结论|判决|裁决|答案|选择|评价)|结论|答案)"
)
_LINK = (
    r"[*_)\"'\s]*(?:\s+(?:is|was|goes to|would be|must be|for me is)\b|\s*[:=：]|\s+[-–—→]|\s*(?:是|为))[*_\s:(\"']*"
)
_LETTERS = (
    rf"(?P<name>(?:{NOUN}\s*)?(?:\[{{0,2}}[*_]*(?:[AB]\s*(?:>>|<<|>|<|==?)\s*[AB]|[ABC]|[ab](?=[\s*_\]]*(?:[.,;!\n]|$)))"
    r"[*_]*\]{0,2}(?![\w'’])"
    r"|(?i:(?:a |an )?(?:tie|draw)\b|平局|(?:both|neither)(?=[\s*_.]*(?:\n|$))))"
    rf"|{NOUN}\s*[_ ]?[12]\b|(?i:(?:the )?(?:first|second)) {NOUN})"
)
_IDENTIFIERS = rf"(?P<name>(?:{NOUN}\s*)?[*_`]*[mM](?![\w'’]))"
_KEYS = r"verdict|winner|choice|answer|preferred|preference|better|best|judge?ment|decision|result|selection|vote|pick"
_IF = re.compile(r"[\"'`*\s]*(?:if|when|means|for a tie|for (?:the )?(?:first|second)|stands for)\b", re.IGNORECASE)
_NO_VERDICT = r"\b(?:because|since|as|than|over|not|instead of|while|whereas|unlike|why)\s+(?:the\s+)?[*_]*$"
_LIST = re.compile(r"[\s,;/|\"'`*]*(?:or|nor|and|,|/|\|)[\s,\"'`*]*", re.IGNORECASE)


def _marks(
    text: str, blanked: str, meaning: Callable[[str], Meaning], names: str
) -> Iterator[tuple[int, int, Meaning]]:
    """(start, end, meaning) of every explicit mark. JSON also counts inside of code."""
    for pattern, group in ((_DOUBLE, 1), (_BOXED, 1), (_TAGGED, 2)):
        for found in re.finditer(pattern, blanked, re.IGNORECASE):
            yield found.start(), found.end(), meaning(found[group])
    cue = re.compile(rf"(?<![\w-])(?i:{_CUE}{_LINK}(?:assigned to |that )?){names}", re.MULTILINE)
    headed = re.compile(rf"(?i:{_CUE})[*_:#\s]*\n[\s*_#(]*{names}(?=[\s*_.)]*(?:\n|$))")
    for found in (*cue.finditer(blanked), *headed.finditer(blanked)):
        yield found.start("name"), found.end(), meaning(found["name"])
    for found in re.finditer(r"\{[^{}]*\}", text):
        value = _json_value(found[0], _KEYS)
        if value is not None:
            yield found.start(), found.end(), meaning(value)


def _json_value(text: str, keys: str) -> str | None:
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


def _stated(text: str, found: list[tuple[int, int, Meaning]]) -> list[tuple[int, Meaning]]:
    """The marks that state a verdict, without marks that explain the format, like "[[A]] if ..."."""
    found = sorted(mark for mark in found if mark[2] is not None)
    stated = []
    for i, (start, end, meaning) in enumerate(found):
        listed = any(
            other[2] != meaning and _LIST.fullmatch(text[min(end, other[1]) : max(start, other[0])])
            for other in found[max(i - 1, 0) : i + 2]
        )
        reason = re.search(_NO_VERDICT, text[max(0, start - 30) : start], re.IGNORECASE)
        if not listed and not reason and not _IF.match(text[end : end + 40]):
            stated.append((start, meaning))
    return stated


def _bare(blanked: str, meaning: Callable[[str], Meaning]) -> Meaning:
    """The name on a last line that has nothing else, or the name in brackets if all brackets name the same side."""
    lines = [line for line in blanked.splitlines() if line.strip()]
    last = meaning(lines[-1]) if lines and len(lines[-1]) < 40 else None
    if last is not None:
        return last
    found = [
        (match.end(), meaning(match[1])) for match in re.finditer(r"(?<!\[)\[([^\[\]\n]{1,12})\](?![\]\(])", blanked)
    ]
    found = [(end, said) for end, said in found if said is not None]
    if found and (len({said for _, said in found}) == 1 or not re.search(r"\w", blanked[found[-1][0] :])):
        return found[-1][1]
    return None


# ---- scores

_NUMBER = r"(?<![\w.\-–/])(\d{1,3}(?:[.,]\d{1,2})?)"
_OUT_OF = r"(?:\s*(?:/|out of|of)\s*(\d+))"
_PAIR = r"^\W*(\d+(?:\.\d+)?)(?:\s*/\s*10)?\s*[,\s/|]\s*(\d+(?:\.\d+)?)(?:\s*/\s*10)?\W*$"


def _two_scores(text: str, blanked: str) -> Meaning:
    """Two grades, A's then B's: [[8, 7]], a line "8 7", or a grade behind each name."""
    doubled = re.findall(r"\[\[\s*(\d+(?:\.\d+)?)\s*,\s*(\d+(?:\.\d+)?)\s*\]\]", blanked)
    lines = [line.strip() for line in blanked.splitlines() if line.strip()]
    lined = [match.groups() for line in (lines[:1] + lines[-1:]) if (match := re.match(_PAIR, line))]
    found = doubled[-1:] or lined[-1:]
    if not found:
        flat = re.sub(r"[*_\"'`]", "", text)
        grade = (
            r"(?:\s*(?:score|rating|grade))?\s*(?::|=|-|–|\bis\b|\bgets\b|\bscores?\b|\breceives\b|\bearns\b|"
            r"\bdeserves\b)?\s*(?:an?\s+)?"
        )
        scored = r"(?:score|rating|grade)[_ ](?:for )?"
        names = {
            side: rf"(?:{NOUN}[_ ]*(?:{letter}|{number})|{scored}{side}|(?<![A-Za-z0-9_])(?-i:{letter})(?=\s*[:=]))"
            for side, letter, number in (("a", "A", 1), ("b", "B", 2))
        }
        by_name = {
            side: re.findall(
                rf"{name}\b[^\d\n]{{0,24}}?{grade}\[*(\d+(?:\.\d+)?)(?:\s*/\s*10)?\b(?!\s*/\s*\d)", flat, re.IGNORECASE
            )
            for side, name in names.items()
        }
        if not all(by_name.values()):
            return None
        found = [(by_name["a"][-1], by_name["b"][-1])]
    a, b = map(float, found[0])
    if max(a, b) > 10:
        return None
    return ("tie" if a == b else "a" if a > b else "b"), 1.0


# ---- the parsers

_REFUSES = re.compile(
    r"\b(?:i(?:'m|’m| am) (?:sorry|unable|not able)|i (?:cannot|can['’]t|won['’]t|will not) (?:\w+ ){0,2}"
    r"(?:assist|help|judge|compare|evaluate|choose|provide|engage|comply|rate)|as an ai\b)",
    re.IGNORECASE,
)


def read_pair(text: str, *, identifiers: bool = False) -> Reading:
    """The verdict on two answers called A and B (`identifiers`: m and M)."""
    meaning, names = (identifier_meaning, _IDENTIFIERS) if identifiers else (letter_meaning, _LETTERS)
    seen = without_thinking(_plain(text))
    if seen is None:
        return Reading("error", why="cut while thinking")
    if not seen.strip():
        return Reading("error", why="empty")
    seen, blanked = _own_words(seen)
    stated = _stated(seen, [*_marks(seen, blanked, meaning, names)])
    if stated:
        return Reading(*stated[-1][1])
    said = _bare(blanked, meaning) or _quoted(seen, meaning, names)
    if said is not None:
        return Reading(*said)
    said, contradicts = read_words(blanked, meaning)
    if said is None and not contradicts:
        said = _two_scores(seen, blanked)
    if said is not None:
        return Reading(*said)
    why = "contradicts itself" if contradicts else "refused" if _REFUSES.search(seen) else "no verdict"
    return Reading("error", why=why)


def _quoted(seen: str, meaning: Callable[[str], Meaning], names: str) -> Meaning:
    """A verdict in quotes or code, if it is the only one and is announced or has its own line."""
    bare = re.sub(r"[`\"“”„]", " ", re.sub(r"^[ \t]*>.*$|^[ \t]*(?:```|~~~).*$", "", seen, flags=re.MULTILINE))
    alone = _bare(bare, meaning)
    if alone is not None:
        return alone
    found = [(start, said) for start, _, said in _marks(bare, bare, meaning, names) if said is not None]
    if len({said for _, said in found}) != 1:
        return None
    start = max(position for position, _ in found)
    line = bare[bare.rfind("\n", 0, start) + 1 :].split("\n")[0]
    announced = re.search(rf"{_CUE}{_LINK}\W*$", bare[max(0, start - 60) : start] + " ", re.IGNORECASE)
    alone = not re.search(r"\w", re.sub(_DOUBLE, "", line))
    cue = any(re.search(rf"{_CUE}{_LINK}\W*$", bare[:position], re.IGNORECASE) for position, _ in found)
    return found[-1][1] if announced or alone or cue else None


def read_ranking(text: str) -> Reading:
    """The verdict in AlpacaEval's list of {"model": "model_1", "rank": 1}, or as in `read_pair`."""
    seen = without_thinking(_plain(text))
    if seen is None:
        return Reading("error", why="cut while thinking")
    name = r"['\"]?model['\"]?\s*:\s*['\"]?(?P<m>model_[12])['\"]?"
    rank = r"['\"]?rank['\"]?\s*:\s*['\"]?(?P<r>\d{1,9})\b"
    found = [
        m.groupdict() for p in (rf"{name}\s*,\s*{rank}", rf"{rank}['\"]?\s*,\s*{name}") for m in re.finditer(p, seen)
    ]
    ranks = {row["m"]: int(row["r"]) for row in found}
    if found:
        if len(found) != 2 or len(ranks) != 2:
            return Reading("error", why="no two ranks")
        if ranks["model_1"] == ranks["model_2"]:
            return Reading("error", why="equal ranks")
        return Reading("a" if ranks["model_1"] < ranks["model_2"] else "b")
    return read_pair(text)


def read_grade(text: str, *, low: float = 1, high: float = 10) -> float | None:
    """The grade on the scale from `low` to `high`. None if there is no grade, if there are two, or on another scale."""
    seen = without_thinking(_plain(text))
    if seen is None:
        return None
    seen, blanked = _own_words(seen)
    blanked = _blank(r"\bscale\b[^.\n]{0,12}?\b\d+\s*(?:to|-|–|through)\s*\d+\b|\(\s*1\s*[-–]\s*10\s*\)", blanked)
    grades = _marked_grades(seen, blanked)
    if not grades:
        grades = [grade for _, grade in _out_of(blanked)]
        if len(set(grades)) > 1:
            return None
    if not grades:
        lines = [line.strip(" \t*_#.()[]`\"'") for line in seen.splitlines() if line.strip()]
        alone = re.fullmatch(r"\d+(?:[.,]\d+)?", lines[-1]) if lines else None
        verbs = r"\b(?:give|rate|score|grade|award|deserves|gets|earns|assign)\b"
        given = re.findall(rf"{verbs}[^.\d\n]{{0,40}}?\b(?:an?\s+)?{_NUMBER}(?!\s*[-–/%\w])", blanked, re.IGNORECASE)
        grades = [_number(alone[0], None)] if alone else [_number(value, None) for value in given[-1:]]
    grade = grades[-1] if grades else None
    return grade if grade is not None and low <= grade <= high else None


def _number(value: str, out_of: str | None) -> float:
    """The grade, or NaN, which is in no range, on any scale but 1 to 10."""
    if out_of is not None and float(out_of) != 10:
        return float("nan")
    return float(value.replace(",", "."))


def _out_of(blanked: str) -> list[tuple[int, float]]:
    return [
        (m.start(), _number(m[1], m[2])) for m in re.finditer(rf"{_NUMBER}[*_]*\s*(?:/|out of)\s*[*_]*(\d+)\b", blanked)
    ]


def _marked_grades(seen: str, blanked: str) -> list[float]:
    value = r"\s*(\d+(?:[.,]\d+)?)\s*(?:(?:/|out of)\s*(\d+))?\s*"
    found: list[tuple[int, float, bool]] = []
    for pattern in (
        rf"\[\[[*_]*{value}[*_]*\]\]",
        rf"\\boxed\s*\{{\s*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{{)?{value}\}}",
        rf"<(?:final[_ ]?)?(?:rating|score|grade|answer|verdict|judge?ment)>{value}</",
    ):
        found += [(m.start(), _number(m[1], m[2]), True) for m in re.finditer(pattern, blanked, re.IGNORECASE)]
    for row in re.finditer(r"\{[^{}]*\}", seen):
        said = _json_value(row[0], r"rating|score|grade|verdict|overall")
        match = re.fullmatch(value, said) if said is not None else None
        found += [(row.start(), _number(match[1], match[2]), True)] if match else []
    if found:
        return [grade for _, grade, _ in sorted(found)]
    cue = re.compile(
        r"(?P<all>overall|final)?\s*(?:rating|score|grade|评分|得分|分数)\b[*_\"'\s]*(?:\s+(?:is|of|would be)|"
        r"\s*[:=：]|\s+[-–—])?"
        r"[*_\"'\s]*\[{0,2}[*_]*(?P<n>\d{1,3}(?:[.,]\d{1,2})?)(?![\w\-–])[*_]*\]{0,2}(?:\s*(?:/|out "
        r"of)\s*(?P<of>\d+))?",
        re.IGNORECASE,
    )
    cued = [(m.start(), _number(m["n"], m["of"]), bool(m["all"])) for m in cue.finditer(blanked)]
    overall = [row for row in cued if row[2]]
    return [grade for _, grade, _ in (overall or cued)]
