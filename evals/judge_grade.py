"""Parse a judge's text: its grade of one answer, from 1 to 10."""

import re

from evals.judge_text import CUT, UNABLE, blank, json_objects, json_value, own_words, plain, without_thinking

_NUMBER = r"(?<![\w.\-–/])(\d{1,3}(?:[.,]\d{1,2})?)"


def read_grade(text: str, *, low: float = 1, high: float = 10) -> float | None:
    """The grade on the scale from `low` to `high`. None if there is no grade, if there are two, or another scale."""
    seen = without_thinking(plain(text))
    if seen is None:
        return None
    seen, blanked = own_words(seen)
    if CUT.search(seen):
        return None
    seen, blanked = (re.sub(_TEN, lambda m: f"{_WORDS[m[1].lower()]}/10", text, flags=re.I) for text in (seen, blanked))
    blanked = blank(r"[(\[]\s*(?:out of|(?:from )?1\s*(?:-|–|to))\s*10\s*[)\]]", blanked)
    # such as 7 or 8
    blanked = blank(r"(?<![\w.])\d+(?:\.\d+)?\s*(?:-|–|or|to|and)\s*\d+(?:\.\d+)?(?!\w|\.\d)", blanked)
    blanked = blank(r"\bscale\b[^.\n]{0,12}?\b\d+\s*(?:to|-|–|through)\s*\d+\b", blanked)
    grades = _marked_grades(seen, blanked)
    if not grades and re.search(UNABLE, blanked, re.IGNORECASE):
        return None
    if not grades:
        grades = [grade for _, grade in _out_of(blanked)]
        if len(set(grades)) > 1:
            return None
    if not grades:
        lines = [line.strip(" \t*_#.()[]`\"'分") for line in seen.splitlines() if line.strip()]
        alone = re.fullmatch(r"\d+(?:[.,]\d+)?", lines[-1]) if lines else None
        verbs = r"\b(?:give|rate|score|grade|award|deserves|gets|earns|assign)\b"
        given = re.findall(rf"{verbs}[^.\d\n]{{0,40}}?\b(?:an?\s+)?{_NUMBER}(?!\s*[-–/%\w])", blanked, re.IGNORECASE)
        grades = [_number(alone[0], None)] if alone else [_number(value, None) for value in given[-1:]]
    grade = grades[-1] if grades else None
    return grade if grade is not None and low <= grade <= high else None


def _number(value: str, out_of: str | None) -> float:
    """The grade. NaN, which is in no range, if the scale does not end at 10."""
    if out_of is not None and float(out_of) != 10:
        return float("nan")
    return float(value.replace(",", "."))


_NOT_A = r"(?<!(?i:not a ))(?<!(?i:not an ))"
_COUNTED = (
    r"(?!\s+(?:questions|items|tests|cases|people|times|requirements|steps|facts|claims|examples|instructions)\b)"
)
_WORDS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_TEN = rf"\b({'|'.join(_WORDS)})\s*(?:/|out of)\s*(?:ten|10)\b"


def _out_of(blanked: str) -> list[tuple[int, float]]:
    return [
        (m.start(), _number(m[1], m[2]))
        for m in re.finditer(rf"{_NOT_A}{_NUMBER}[*_]*\s*(?:/|out of)\s*[*_]*(\d+)\b{_COUNTED}", blanked)
    ]


def _marked_grades(seen: str, blanked: str) -> list[float]:
    value = r"\s*(\d+(?:[.,]\d+)?)\s*(?:(?:/|out of)\s*(\d+))?\s*"
    found: list[tuple[int, float, bool]] = []
    if re.search(rf"\[\[{value}\]\][\s,;/]*(?:or|and)?[\s,;/]*\[\[(?!\1\s*\]){value}\]\]", blanked):
        return []  # [[7]] or [[8]]
    for pattern in (
        rf"\[RESULT\]\s*\(?{value}(?![\w.])",
        rf"(?<!(?i:not ))\[\[[*_]*{value}[*_]*\]\]",
        rf"\\boxed\s*\{{\s*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{{)?(?:(?:rating|score|grade)\s*:?\s*\}}?)?{value}\}}",
        rf"<(?:final[_ ]?)?(?:rating|score|grade|answer|verdict|judge?ment)>{value}</",
    ):
        found += [(m.start(), _number(m[1], m[2]), True) for m in re.finditer(pattern, blanked, re.IGNORECASE)]
    for start, row in json_objects(seen):
        stated = json_value(row, r"rating|score|grade|verdict|overall")
        match = re.fullmatch(value, stated) if stated is not None else None
        found += [(start, _number(match[1], match[2]), True)] if match else []
    if found:
        return [grade for _, grade, _ in sorted(found)]
    cue = re.compile(
        r"(?P<all>overall|final)?\s*(?:rating|score|grade|评分|得分|分数|評価)\b[*_\"'\s]*(?:\s+(?:is|of|would be)|"
        r"\s*[:=：]|\s+[-–—])?"
        r"[*_\"'\s]*\[{0,2}[*_]*(?P<n>\d{1,3}(?:[.,]\d{1,2})?)(?!(?!分)[\w\-–+])[*_]*\]{0,2}(?:\s*(?:/|out "
        r"of)\s*(?P<of>\d+))?",
        re.IGNORECASE,
    )
    cued = [(m.start(), _number(m["n"], m["of"]), bool(m["all"])) for m in cue.finditer(blanked)]
    whole = rf"(?:overall|total|final)[*_ ]*[:=][*_ ]*{_NUMBER}(?:\s*(?:/|out of)\s*(\d+)|(?=[*_.]*\s*(?:\n|$)))"
    cued += [(m.start(), _number(m[1], m[2]), True) for m in re.finditer(whole, blanked, re.IGNORECASE)]
    overall = sorted(row for row in cued if row[2])
    return [grade for _, grade, _ in (overall or cued)]
