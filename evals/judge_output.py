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

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from evals.judge_text import BOXED, CUT, DOUBLE, UNABLE, json_objects, json_value, own_words, plain, without_thinking
from evals.judge_words import NOUN, Meaning, identifier_meaning, letter_meaning, read_words


class Reading(NamedTuple):
    """A parsed text: verdict a | b | tie | error, its weight (3: Arena-Hard's strong verdicts), why it is an error."""

    verdict: str
    weight: float = 1.0
    why: str = ""


# ---- statements: (position, meaning)

_TAGGED = (
    r"<((?:final[_ ]?)?(?:answer|verdict|winner|choice|judge?ment|decision|result|preference|output|preferred|"
    r"rating|score|grade))>\s*([^<>\n]{1,60}?)\s*</\1>"
)
_RESULT = r"\[RESULT\]\s*\(?(tie|[\w.]{1,4})\b"  # Prometheus
_CUE = (
    r"(?:verdict|decision|judge?ment|answer|choice|winner|winning (?:answer|response|assistant|model)|preference|"
    r"conclusion|selection|result|pick|vote|evaluation|"
    r"(?:best|better|preferred|superior|stronger)(?: (?:answer|response|assistant|model|one|output|option|reply|"
    r"choice))?(?: of the two)?|"
    r"ranking|gewinner(?:in)?|urteil|ganador|veredicto|gagnant|vainqueur|vincitore|vencedor|победитель|вердикт|"
    r"最终(?:判断|结论|判决|裁决|答案|选择|评价)|结论|答案|判定|勝者|胜者|승자)"
)
_LOSER = (
    r"(?:loser|(?:worse|worst|weaker|inferior|losing)(?: (?:answer|response|assistant|model|one|output|option|reply))?)"
)
_OTHER_CUE = re.compile(  # what stands before a cue that does not give the verdict on the whole
    r"\b(?:worse|worst|weaker|inferior|losing|correct|right|wrong|incorrect|expected|reference|user['’]s|accuracy|"
    r"correctness|clarity|style|depth|detail|helpfulness|relevance|creativity|completeness|conciseness|coherence|"
    r"safety|tone|structure|factuality|fluency)[\s*_]+$",
    re.IGNORECASE,
)
_LINK = (
    r"[*_)\"'\s]*(?:\s+(?:is|was|goes to|would be|must be|for me is|es|est|ist|è|é)\b|"
    r"\s*[:=：]|\s+[-–—→]|\s*(?:是|为))[*_\s:(\"']*"
)
_LETTERS = (
    rf"(?P<name>(?:{NOUN}\s*)?(?:\[{{0,2}}[*_]*(?:[AB]\s*(?:>>|<<|>|<|==?)\s*[AB]|[ABC]|[ab](?=[\s*_\]]*(?:[.,;!\n]|$)))"
    r"[*_]*\]{0,2}(?![\w'’])"
    r"|(?i:(?:(?:it is |it['’]s )?an? )?(?:tie|draw)\b|(?:they are )?tied\b|平局|"
    r"(?:both|neither|none)(?=[\s*_.]*(?:\n|$))))"
    rf"|{NOUN}\s*[_ ]?[12]\b|(?i:(?:the )?(?:first|second)) {NOUN})"
)
_IDENTIFIERS = rf"(?P<name>(?:{NOUN}\s*)?[*_`]*[mM](?![\w'’]))"
_KEYS = r"verdict|winner|choice|answer|preferred|preference|better|best|judge?ment|decision|result|selection|vote|pick"
_IF = re.compile(
    r"[\"'`*\s]*(?:if|when|means|for a tie|for (?:the )?(?:first|second)|stands for|cannot|can['’]t|is not|isn['’]t)\b"
    r"|[\"'`*\s]*=(?!=)"
    r"|[\]\"'`*\s]*(?:or\b|/)[\s\[\"'`*]*(?:answer |assistant |response )?[ABCab]\b",
    re.IGNORECASE,
)
_ARTICLE = re.compile(  # "A" before any other word is no name
    r" (?!(?:is|was|wins?|has|does|did|gives?|provides?|because|since|as|but|although|over|by|for|due|with|and|or|"
    r"while|though|slightly|clearly|better|in|on)\b)[a-z]"
)
_TURNS = re.compile(
    r"\s+(?:is|was|has|does|did|gives?|provides?)\b[^.!?\n]*\b(?:but|however|yet|although|though|while)\b",
    re.IGNORECASE,
)
_NO_VERDICT = r"\b(?:because|since|as|than|over|not|instead of|while|whereas|unlike|why)\s+(?:the\s+)?[*_]*$"
_LIST = re.compile(r"[\s,;/|\"'`*]*(?:or|nor|and)?[\s,\"'`*]*", re.IGNORECASE)


def _marks(
    text: str, blanked: str, meaning: Callable[[str], Meaning], names: str
) -> Iterator[tuple[int, int, Meaning]]:
    """(start, end, meaning) of every explicit mark. JSON also counts inside of code."""
    for pattern, group in ((DOUBLE, 1), (BOXED, 1), (_TAGGED, 2), (_RESULT, 1)):
        for found in re.finditer(pattern, blanked, re.IGNORECASE):
            yield found.start(), found.end(), meaning(found[group])
    cue = re.compile(rf"(?<![\w-])(?i:{_CUE}{_LINK}(?:assigned to |that )?){names}", re.MULTILINE)
    headed = re.compile(rf"(?i:{_CUE})[*_:#\s]*\n[\s*_#(]*{names}(?=[\s*_.)]*(?:\n|$))")
    for found in (*cue.finditer(blanked), *headed.finditer(blanked)):
        if _OTHER_CUE.search(blanked[max(0, found.start() - 30) : found.start()]):
            continue
        if found["name"] == "A" and _ARTICLE.match(blanked[found.end() : found.end() + 20]):
            continue
        if "[" not in found["name"] and _TURNS.match(blanked[found.end() : found.end() + 200]):
            continue  # "Verdict: A is better at style, but B ..." is a sentence
        yield found.start("name"), found.end(), meaning(found["name"])
    for found in re.finditer(rf"(?<![\w-])(?i:{_LOSER}{_LINK}){names}", blanked):
        reading = meaning(found["name"])
        if reading is not None and reading[0] != "tie":
            yield found.start("name"), found.end(), ({"a": "b", "b": "a"}[reading[0]], reading[1])
    for start, row in json_objects(text):
        value = json_value(row, _KEYS)
        if value is not None:
            yield start, start + len(row), meaning(value)


def _stated(text: str, found: list[tuple[int, int, Meaning]]) -> list[tuple[int, Meaning]]:
    """The marks that state a verdict, without marks that explain the format, like "[[A]] if ..."."""
    known, found, last = {mark for mark in found if mark[2] is not None}, [], -1
    for mark in sorted(known, key=lambda mark: (mark[0], -mark[1], mark[2])):
        if mark[1] > last:  # not inside of another mark
            found, last = [*found, mark], mark[1]
    stated = []
    for i, (start, end, meaning) in enumerate(found):
        listed = any(
            other[2][0] != meaning[0] and _LIST.fullmatch(text[min(end, other[1]) : max(start, other[0])])
            for other in (*found[max(i - 4, 0) : i], *found[i + 1 : i + 5])
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
    found = [(end, reading) for end, reading in found if reading is not None]
    if found and (len({reading for _, reading in found}) == 1 or not re.search(r"\w", blanked[found[-1][0] :])):
        return found[-1][1]
    return None


# ---- scores

_PAIR = r"^\W*(\d+(?:\.\d+)?)(?:\s*/\s*10)?\s*(?:[,\s/|]|vs\.?|versus)\s*(\d+(?:\.\d+)?)(?:\s*/\s*10)?\W*$"


def _two_scores(text: str, blanked: str) -> Meaning:
    """Two grades, A's then B's: [[8, 7]], a line "8 7", or a grade behind each name."""
    doubled = re.findall(r"\[\[\s*(\d+(?:\.\d+)?)\s*,\s*(\d+(?:\.\d+)?)\s*\]\]", blanked)
    lines = [line.strip() for line in blanked.splitlines() if line.strip()]
    lined = [match.groups() for line in (lines[:1] + lines[-1:]) if (match := re.match(_PAIR, line))]
    found = doubled[-1:] or lined[-1:]
    if not found:
        flat = re.sub(r"_", " ", re.sub(r"[*\"`]|(?<!\w)'|'(?!\w)", "", text))
        grade = (
            r"(?:['’]s)?(?:\s*(?:score|rating|grade))?\s*(?::|=|-|–|\||\bis\b|\bgets\b|\bscores?\b|\breceives\b|\bearns\b|"
            r"\bdeserves\b)?\s*(?:an?\s+)?"
        )
        scored = r"(?:score|rating|grade)[_ ](?:for )?"
        names = {
            side: rf"(?:{NOUN}[_ ]*(?:{letter}|{number})|{scored}{side}|"
            rf"(?<![A-Za-z0-9_])(?-i:{letter})(?=\s*[:=|]|\s+\d+(?:\.\d+)?\s*/\s*10\b))"
            for side, letter, number in (("a", "A", 1), ("b", "B", 2))
        }
        by_name = {
            side: re.findall(
                rf"{name}\b[^\d\n]{{0,24}}?{grade}\[*(\d+(?:\.\d+)?)(?:\s*/\s*10)?\b(?!\s*/\s*\d)"
                r"(?! (?!(?:points?|marks?|out|for|vs|and|because|since|as|but|while)\b)[a-z])"
                r"(?![^\n;]{0,60}?\d\s*(?:/\s*10|\|))",  # one grade a side
                re.sub(r"(?<=[\d)])[.,]?\s+(?:and\s+|vs\.?\s+)?(?=[A-Z])", "\n", flat),
                re.IGNORECASE,
            )
            for side, name in names.items()
        }
        if not all(by_name.values()) or len(by_name["a"]) != len(by_name["b"]):
            return None
        found = [*zip(by_name["a"], by_name["b"], strict=True)]
    pairs = [(float(a), float(b)) for a, b in found]
    reading = {"tie" if a == b else "a" if a > b else "b" for a, b in pairs}
    return (reading.pop(), 1.0) if len(reading) == 1 and max(map(max, pairs)) <= 10 else None


# ---- the parsers


def read_pair(text: str, *, identifiers: bool = False) -> Reading:
    """The verdict on two answers called A and B (`identifiers`: m and M)."""
    meaning, names = (identifier_meaning, _IDENTIFIERS) if identifiers else (letter_meaning, _LETTERS)
    seen = without_thinking(plain(text))
    if seen is None:
        return Reading("error", why="cut while thinking")
    if not seen.strip():
        return Reading("error", why="empty")
    if CUT.search(seen):
        return Reading("error", why="cut")
    seen, blanked = own_words(seen)
    stated = _stated(seen, [*_marks(seen, blanked, meaning, names)])
    if stated:
        return Reading(*stated[-1][1])
    reading = _bare(blanked, meaning) or _quoted(seen, meaning, names)
    if reading is not None:
        return Reading(*reading)
    reading, contradicts = read_words(blanked, meaning)
    if reading is None and not contradicts:
        reading = _two_scores(seen, blanked)
    if reading is not None:
        return Reading(*reading)
    why = (
        "contradicts itself"
        if contradicts
        else "refused"
        if re.search(rf"{UNABLE}|\bas an ai\b", seen, re.IGNORECASE)
        else "no verdict"
    )
    return Reading("error", why=why)


def _quoted(seen: str, meaning: Callable[[str], Meaning], names: str) -> Meaning:
    """A verdict in quotes or code, if it is the only one and is announced or has its own line."""
    bare = re.sub(
        r"[`\"“”„]|(?<!\w)'|'(?!\w)", " ", re.sub(r"^[ \t]*>.*$|^[ \t]*(?:```|~~~).*$", "", seen, flags=re.MULTILINE)
    )
    alone = _bare(bare, meaning)
    if alone is not None:
        return alone
    found = _stated(bare, [*_marks(bare, bare, meaning, names)])
    if len({reading for _, reading in found}) != 1:
        return None
    start = max(position for position, _ in found)
    line = bare[bare.rfind("\n", 0, start) + 1 :].split("\n")[0]
    announced = re.search(rf"{_CUE}{_LINK}\W*$", bare[max(0, start - 60) : start] + " ", re.IGNORECASE)
    only = not re.search(r"\w", re.sub(DOUBLE, "", line))
    cue = any(re.search(rf"{_CUE}{_LINK}\W*$", bare[:position], re.IGNORECASE) for position, _ in found)
    return found[-1][1] if announced or only or cue else None


def read_ranking(text: str) -> Reading:
    """The verdict in AlpacaEval's list of {"model": "model_1", "rank": 1}, or as in `read_pair`."""
    seen = without_thinking(plain(text))
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
