"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): the final number of an answer, pass@k, and majority votes."""

import re
from collections import Counter
from decimal import Decimal, DivisionByZero, InvalidOperation, Overflow
from math import comb
from unicodedata import normalize

from evals.judge_text import without_thinking

_SIGN = r"(?:(?<![\w)\].])[-−–](?=[$€£]?\.?\d))?"  # a minus sign of a number, not of a difference or a range
_DIGITS = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)"  # 1,234 and 1,00,000 are one number, 3,4 are two
_BELOW = r"\s*/\s*\d+(?![\d/])"  # of a fraction
_PARTS = rf"(?:{_DIGITS}\s+\d+{_BELOW}|{_DIGITS}(?:\.\d+)?(?:[eE][-+−]?\d+)?(?:{_BELOW})?|\.\d+)"  # 2 1/2 is mixed
NUMBER = re.compile(rf"{_SIGN}[$€£]?{_PARTS}")
ANSWER = re.compile(
    rf"(?:final\s+)?\banswer\b[*_\s]*(?:\s(?:is|=)|[:=])[\s:*_$\\(\[]*(?P<number>{NUMBER.pattern})", re.I
)
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
# "#### 12. Add" is a heading
_MARKED = re.compile(rf"####[\s:*_$\\(\[]*(?P<number>(?>{NUMBER.pattern}))(?![.):]\s+[^\W\d])")
_SPACED = re.compile(r"(?<![\w.,/])([1-9]\d{0,2})((?:(?:\\? |['’])\d{3})+)(?![\d/'’]|,\d)")  # 1 000 000, 1\ 000, 1'000
_DECIMAL_COMMA = re.compile(r"(?<![\d.,(\[])(0),(\d+)(?![\d,)\]])")  # 0,5 is no thousands; (0,5) is a pair
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_FRACTION = re.compile(r"(\d)?\\[dt]?frac\s*(?:\{\s*([-−]?)\s*(\d+)\s*\}|()(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_POWER = re.compile(r"(?<=\d)\s*(?:\\times|\\cdot|[×·*])\s*10\s*(?:\^|\*\*)\s*\{?\s*([-−]?\d+)\s*\}?")
_PLAIN = re.compile(r"(?:[a-z]\s*=\s*)?[$€£]?(?P<number>[^=]+?)[$€£%°]?(?:\s+[^\W\d][^\d=+*/^_\\(){}\[\]]*)?\.?", re.I)
UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
WORDS = {word: i for i, word in enumerate(f"{UNITS} eighteen nineteen".split())}
TENS = {
    word: 10 * i
    for i, word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2)
}
THOUSANDS = {"thousand": 1000, "million": 10**6, "billion": 10**9}


def parse_number(text: str) -> Decimal | None:
    """The value of a number in common notation: 1,234.50, $5, −3, 1/2, 2 1/2, 1e6."""
    text = re.sub(r"[,$€£]", "", text.replace("−", "-").replace("–", "-")).strip()
    whole, _, text = text.rpartition(" ") if re.fullmatch(r"-?\d+\s+\d+\s*/\s*\d+", text) else ("", "", text)
    try:
        above, _, below = re.sub(r"\s", "", text).partition("/")
        value = Decimal(above) / Decimal(below or 1)
    except (InvalidOperation, DivisionByZero, Overflow):
        return None
    return value if not whole else Decimal(whole) + value.copy_sign(Decimal(whole))


def normal(text: str) -> str:
    """The text with fractions as a/b, powers of ten as e, thousands without spaces, and 0,5 with a point."""
    text = re.sub("[¼-¾⅐-⅞]", lambda m: " " + normalize("NFKC", m[0]).replace("⁄", "/"), text)
    text = re.sub(r"(?<=\d)(?:\\[,!;]|\{,\}|,\\!|[\u00a0\u202f\u2009])(?=\d{3}(?!\d))", "", text)
    text = _SPACED.sub(lambda m: m[1] + re.sub(r"\D", "", m[2]), text)
    text = _DECIMAL_COMMA.sub(r"\1.\2", text)
    text = _FRACTION.sub(lambda m: f"{m[1]} " * bool(m[1]) + f"{m[2] or ''}{m[3] or m[5]}/{m[6] or m[7]}", text)
    return _POWER.sub(r"e\1", text)


def last_number(text: str) -> Decimal | None:
    """The final number of an answer: after ####, in \\boxed{}, or after "the answer is"; else its last number.

    If the answer has a tag <answer>, only its text counts. Numbers in the thinking do not count. If there are no
    digits, the last number in words counts.
    """
    seen = normal(without_thinking(text) or "")
    if tagged := _TAGGED.findall(seen):
        seen = tagged[-1]
    _, mark, rest = seen.rstrip().rpartition("\n")[2].rpartition("####")
    found = NUMBER.findall(rest)[:1] if mark else [match["number"] for match in _MARKED.finditer(seen)][-1:]
    if not found and (boxes := BOXED.findall(seen)):
        found = NUMBER.findall(_content(boxes[-1]))[:1]
    if not found and (stated := list(ANSWER.finditer(seen))):
        found = [stated[-1]["number"]]
    found = found or NUMBER.findall(seen)[-1:]
    return parse_number(found[0]) if found else _number_word(seen)


def _content(box: str) -> str:
    return re.sub(r"\\(?:text|mathrm|,|!|\$|%)|[{}]", "", box)


def gold_number(text: str) -> Decimal:
    """The number of a solution: after ####, in \\boxed{}, or the whole text, with a unit or without.

    Raises:
        ValueError: the solution is not one number, such as 3\\pi, x + 1 or (3, 4).
    """
    value = normal(text.rsplit("####", 1)[-1]).strip()
    boxes = BOXED.findall(value)
    value = _content(boxes[-1]).strip() if boxes else value.strip("$ ").replace("\\$", "$").replace("\\%", "%")
    plain = _PLAIN.fullmatch(value)
    number = parse_number(plain["number"]) if plain and NUMBER.fullmatch(plain["number"]) else None
    if number is None:
        raise ValueError(f"the answer {text[-80:]!r} is not one number")
    return number


def _number_word(text: str) -> Decimal | None:
    """The value of the last run of number words: twenty-one, five hundred and six."""
    scales = {"hundred": 100, **THOUSANDS}
    total: int | None = None
    part, before = 0, ""
    for word in re.findall(r"[^\W\d_]+|[^\w\s-]", re.sub(r"\bno one\b", "nobody", text.lower())):
        if word in scales:
            if word == "hundred":
                part = (part or 1) * 100
            else:
                total, part = (total or 0) + (part or 1) * scales[word], 0
            before = word
            total = total or 0
            continue
        if word in WORDS or word in TENS:
            goes_on = before in scales or before == "and" or before in TENS and 0 < WORDS.get(word, 0) < 10
            total, part = (total if goes_on else 0) or 0, (part if goes_on else 0) + WORDS.get(word, TENS.get(word, 0))
            before = word
        else:
            before = "and" if word == "and" and before in scales else ""
    return None if total is None else Decimal(total + part)


def harness_matches(answer: str, gold: str) -> tuple[bool, bool]:
    """(strict-match, flexible-extract): the two string matches of lm-eval 0.4.13 on gsm8k."""
    strict = re.findall(r"#### (\-?[0-9\.\,]+)", answer)
    flexible = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", answer)
    last = next((part for part in flexible[-1] if part), "") if flexible else "[invalid]"
    gold, first = _harness_clean(gold), strict[0] if strict else "[invalid]"
    return _harness_clean(first) == gold, _harness_clean(last.strip()) == gold


def _harness_clean(text: str) -> str:
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


def pass_at_k(n: int, right: int, k: int) -> float:
    """The probability that at least one of k of n samples is right: 1 - C(n - c, k) / C(n, k), c = `right`.

    Chen et al. 2021, arXiv:2107.03374.
    """
    return 1 - comb(n - right, k) / comb(n, k)


def majority(values: list) -> object:
    """The most frequent value, without None. Of equally frequent values, the first one."""
    known = [value for value in values if value is not None]
    return Counter(known).most_common(1)[0][0] if known else None
