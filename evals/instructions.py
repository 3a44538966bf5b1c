"""Instructions that a program can verify, under IFEval's names (Zhou et al. 2023, arXiv:2311.07911)."""

import json
import operator
import re
from collections.abc import Callable

RELATIONS = {"at least": operator.ge, "less than": operator.lt, None: operator.ge}


def _holds(count: int, given: dict, limit: str, relation: str = "relation") -> bool:
    return RELATIONS[given.get(relation)](count, given[limit])


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _sentences(text: str) -> int:
    return len([part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part])


def _paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\s?\*\*\*\s?", text) if part.strip()]


def _blocks(text: str) -> list[str]:
    return [part for part in re.split(r"\n\n", text) if part.strip()]


def _count(text: str, word: str) -> int:
    return len(re.findall(rf"\b{re.escape(word)}\b", text, flags=re.IGNORECASE))


def _is_json(text: str) -> bool:
    text = re.sub(r"^```(?:json|JSON|Json)?|```$", "", text.strip()).strip()
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _nth_paragraph(text: str, given: dict) -> bool:
    parts = _blocks(text)
    n = given["nth_paragraph"]
    if len(parts) != given["num_paragraphs"] or n > len(parts):
        return False
    first = re.sub(r"^\W+|\W+$", "", parts[n - 1].split()[0]).lower()
    return first == given["first_word"].lower()


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _sections(text: str, given: dict) -> bool:
    found = re.findall(rf"\s?{re.escape(given['section_spliter'])}\s?\d+\s?", text)
    return len(found) >= given["num_sections"]


def _postscript(text: str, given: dict) -> bool:
    mark = given["postscript_marker"]
    pattern = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(mark, re.escape(mark.lower()))
    return re.search(rf"\s*{pattern}.*$", text.lower(), flags=re.MULTILINE) is not None


CHECKS: dict[str, Callable[[str, dict], bool]] = {
    "punctuation:no_comma": lambda text, given: "," not in text,
    "length_constraints:number_words": lambda text, given: _holds(len(_words(text)), given, "num_words"),
    "length_constraints:number_sentences": lambda text, given: _holds(_sentences(text), given, "num_sentences"),
    "length_constraints:number_paragraphs": lambda text, given: len(_paragraphs(text)) == given["num_paragraphs"],
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "keywords:existence": lambda text, given: all(re.search(w, text, re.IGNORECASE) for w in given["keywords"]),
    "keywords:forbidden_words": lambda text, given: not any(_count(text, w) for w in given["forbidden_words"]),
    "keywords:frequency": lambda text, given: _holds(
        len(re.findall(given["keyword"], text, re.IGNORECASE)), given, "frequency"
    ),
    "keywords:letter_frequency": lambda text, given: _holds(
        text.lower().count(given["letter"].lower()), given, "let_frequency", "let_relation"
    ),
    "detectable_format:number_bullet_lists": lambda text, given: (
        len(re.findall(r"^\s*\*[^\*].*$|^\s*-.*$", text, flags=re.MULTILINE)) == given["num_bullets"]
    ),
    "detectable_format:number_highlighted_sections": lambda text, given: (
        len(re.findall(r"\*\*[^\n\*]+\*\*|\*[^\n\*]+\*", text)) >= given["num_highlights"]
    ),
    "detectable_format:title": lambda text, given: any(t.strip() for t in re.findall(r"<<([^\n]+)>>", text)),
    "detectable_format:json_format": lambda text, given: _is_json(text),
    "detectable_format:multiple_sections": _sections,
    "detectable_format:constrained_response": lambda text, given: any(
        option in text for option in ("My answer is yes.", "My answer is no.", "My answer is maybe.")
    ),
    "detectable_content:postscript": _postscript,
    "detectable_content:number_placeholders": lambda text, given: (
        len(re.findall(r"\[.*?\]", text)) >= given["num_placeholders"]
    ),
    "change_case:english_lowercase": lambda text, given: text.islower(),
    "change_case:english_capital": lambda text, given: text.isupper(),
    "change_case:capital_word_frequency": lambda text, given: _holds(
        sum(word.isupper() for word in _words(text)), given, "capital_frequency", "capital_relation"
    ),
    "startend:end_checker": lambda text, given: (
        text.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower())
    ),
    "startend:quotation": lambda text, given: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
    "combination:repeat_prompt": lambda text, given: (
        text.strip().lower().startswith(given["prompt_to_repeat"].strip().lower())
    ),
    "combination:two_responses": lambda text, given: _two_responses(text),
}


def follows(name: str, answer: str, given: dict) -> bool:
    """Whether an answer follows the instruction `name` with its settings; an empty answer follows none.

    Raises:
        ValueError: an instruction that is not implemented (language:response_language needs a language detector).
    """
    if name not in CHECKS:
        raise ValueError(f"instruction {name!r} is not verifiable here; known: {', '.join(CHECKS)}. Take it out")
    given = {key: value for key, value in given.items() if value is not None}
    return bool(answer.strip()) and bool(CHECKS[name](answer, given))
