"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): the final number of an answer, pass@k, and majority votes."""

import re
from collections import Counter
from decimal import Decimal, DivisionByZero, InvalidOperation
from math import comb

from evals.judge_text import without_thinking

_SIGN = r"(?:(?<![\w)\].])[-−–](?=[$€£]?\.?\d))?"  # a minus sign of a number, not of a difference or a range
NUMBER = re.compile(rf"{_SIGN}[$€£]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+(?![\d/]))?")
ANSWER = re.compile(
    rf"(?:final\s+)?\banswer\b[*_\s]*(?:\s(?:is|=)|[:=])[\s:*_$\\(\[]*(?P<number>{NUMBER.pattern})", re.I
)
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
WORDS = {word: i for i, word in enumerate(f"{UNITS} eighteen nineteen".split())}
TENS = {
    word: 10 * i
    for i, word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2)
}


def parse_number(text: str) -> Decimal | None:
    """The value of a number in common notation: 1,234.50, $5, −3, 1/2."""
    text = re.sub(r"[,$€£\s]", "", text.replace("−", "-").replace("–", "-"))
    try:
        above, _, below = text.partition("/")
        return Decimal(above) / Decimal(below or 1)
    except (InvalidOperation, DivisionByZero):
        return None


def last_number(text: str) -> Decimal | None:
    """The final number of an answer: after ####, in \\boxed{}, or after "the answer is"; else its last number.

    Numbers in the thinking do not count. If there are no digits, a word up to ninety-nine is the number.
    """
    seen = re.sub(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r"\1/\2", without_thinking(text) or "")
    marked = seen.rsplit("####", 1)
    found = NUMBER.findall(marked[-1])[:1] if len(marked) == 2 else []
    if not found and (boxes := BOXED.findall(seen)):
        found = NUMBER.findall(re.sub(r"\\(?:text|mathrm|,|!|\$|%)|[{}]", "", boxes[-1]))[:1]
    if not found and (stated := list(ANSWER.finditer(seen))):
        found = [stated[-1]["number"]]
    found = found or NUMBER.findall(seen)[-1:]
    return parse_number(found[0]) if found else _number_word(seen)


def _number_word(text: str) -> Decimal | None:
    found = [word for word in re.findall(r"[a-z]+", text.lower()) if word in WORDS or word in TENS]
    if not found:
        return None
    if len(found) > 1 and found[-2] in TENS and 0 < WORDS.get(found[-1], 0) < 10:
        return Decimal(TENS[found[-2]] + WORDS[found[-1]])
    return Decimal(WORDS.get(found[-1], TENS.get(found[-1])))


def is_right(answer: str, gold: str) -> bool:
    """Whether the answer's number equals the number of the solution (after ####)."""
    expected = last_number(gold)
    return expected is not None and last_number(answer) == expected


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
