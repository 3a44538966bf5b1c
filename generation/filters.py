"""What a generated text must pass before it is kept: ROUGE-L novelty, and Self-Instruct's plain rules, each named.

Wang et al. 2023 (arXiv:2212.10560), section 2.2. A rule returns the reason of a drop, so drops are counted by reason.
"""

import re
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

CANNOT_DO = "image images picture pictures photo graph graphs chart map maps file files video audio draw plot"
# Marks that a text may begin with: quotes, brackets, code.
OPENS = "\"'([{<`$@/\\\u00bf\u00a1\u00ab\u201c\u2018\u201e\u300c\u300e"
_UNSPACED = (  # scripts that put no space between words: each character counts as one
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_MARKS = (
    r"\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0dff"  # vowels and accents that are written as marks of their own
)
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[^\W_]|[{_MARKS}])+")
_REFUSAL = re.compile(
    r"\W*(i['\u2019]?m (very |so )?sorry,? (but|i)|i am (very |so )?sorry,? (but|i)|sorry,? (but )?i (can|am|won)"
    r"|i['\u2019]?m sorry for (any|the) [^.]{0,40}?,? but|i am sorry for (any|the) [^.]{0,40}?,? but"
    r"|i (can['\u2019]?t|cannot|can not|won['\u2019]?t|am (not able|unable)|['\u2019]m (not able|unable)) "
    r"(\w+ )?(help|assist|provide|do that|answer|comply|fulfil|create|generate|write|discuss)"
    r"|(as|i['\u2019]?m|i am) (just )?an? (ai|artificial intelligence|(large )?language model)\b"
    r"|\u5bf9\u4e0d\u8d77|\u62b1\u6b49|\u7533\u3057\u8a33|lo siento,? pero|je suis d\u00e9sol\u00e9|es tut mir leid)",
    re.IGNORECASE,
)
_CANNOT_DO = re.compile(rf"\b({'|'.join(CANNOT_DO.split())}|go to|attached|website|link)\b", re.IGNORECASE)


def words(text: str) -> list[str]:
    """Runs of letters and digits of any script, lowercased, not stemmed: of ASCII text the tokens of rouge-score.

    Where a script puts no space between words (Chinese, Japanese, Thai, ...), each character is one.
    """
    return _WORD.findall(text.lower())


def lcs_masks(tokens: Sequence[str]) -> dict[str, int]:
    """For each token the bit set of the places where it stands: what `lcs_length` needs of its first sequence."""
    masks: dict[str, int] = defaultdict(int)
    for place, token in enumerate(tokens):
        masks[token] |= 1 << place
    return masks


def lcs_length(masks: dict[str, int], length: int, other: Sequence[str]) -> int:
    """Longest common subsequence, bit-parallel (Hyyro 2004): one addition of a `length`-bit integer per token."""
    full = (1 << length) - 1
    zeros = full  # a bit that is 0 marks a place where the LCS of the prefixes grows by one
    for token in other:
        if mask := masks.get(token):
            hit = zeros & mask
            zeros = ((zeros + hit) | (zeros - hit)) & full
    return length - zeros.bit_count()


def f_measure(lcs: int, m: int, n: int) -> float:
    """rouge-score's F, operation by operation: a score on the threshold falls on the same side."""
    if lcs == 0:
        return 0.0
    precision, recall = lcs / m, lcs / n
    return 2 * precision * recall / (precision + recall)


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L F-measure of two texts, equal to rouge-score without stemming."""
    x, y = words(a), words(b)
    return f_measure(lcs_length(lcs_masks(x), len(x), y), len(x), len(y)) if x and y else 0.0


class Novelty:
    """The texts kept so far, and whether a new one is at least `threshold` similar (ROUGE-L) to any of them. Exact.

    The LCS of two texts is at most the overlap of their bags of words. An inverted index gives all overlaps with one
    bincount, and only texts whose bound reaches the threshold are compared word by word. The k-th occurrence of a word
    is a key of its own, so that the overlap of bags is an overlap of sets.
    """

    def __init__(self, threshold: float, texts: Sequence[str] = ()):
        if not 0 < threshold <= 1:
            raise ValueError(f"ROUGE-L threshold {threshold} is not in (0, 1]; Self-Instruct uses 0.7")
        self.threshold = threshold
        self.tokens: list[list[str]] = []
        self._lengths = array("I")
        self._postings: dict[tuple[str, int], array] = defaultdict(lambda: array("I"))
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, text: str) -> None:
        """Keep a text."""
        tokens = words(text)
        for key in _occurrences(tokens):
            self._postings[key].append(len(self.tokens))
        self.tokens.append(tokens)
        self._lengths.append(len(tokens))

    def most_similar(self, text: str) -> tuple[int, float] | None:
        """(index, score) of the most similar kept text where its score reaches the threshold, else None."""
        tokens = words(text)
        postings = [np.frombuffer(self._postings[k], np.uint32) for k in _occurrences(tokens) if k in self._postings]
        if not postings:
            return None
        overlap = np.bincount(np.concatenate(postings), minlength=len(self))  # (kept,)
        bound = 2.0 * overlap / (len(tokens) + np.frombuffer(self._lengths, np.uint32))  # (kept,) F is at most this
        near = np.flatnonzero(bound >= self.threshold - 1e-9)
        near = near[np.argsort(-bound[near], kind="stable")]
        masks, best, best_score = lcs_masks(tokens), None, 0.0
        for index in near.tolist():
            if bound[index] <= best_score:
                break
            other = self.tokens[index]
            score = f_measure(lcs_length(masks, len(tokens), other), len(tokens), len(other))
            if score > best_score:
                best, best_score = index, score
        return (best, best_score) if best_score >= self.threshold else None


def instruction_fault(text: str, count: Callable[[str], int], *, least: int, most: int | None) -> str | None:
    """Why an instruction is dropped, or None. `count`: tokens of a text; `least` and `most` of them."""
    tokens = count(text)
    if tokens < least:
        return "instruction_too_short"
    if most is not None and tokens > most:
        return "instruction_too_long"
    if _CANNOT_DO.search(text):
        return "keyword_beyond_text"
    if not starts_well(text):
        return "starts_with_punctuation"
    if re.match(r"write a program\b", text, re.IGNORECASE):
        return "write_a_program"  # of a task that is only named: models then answer with code to anything
    if is_refusal(text):
        return "refusal"
    return None


def instance_fault(
    instruction: str, given: str, output: str, count: Callable[[str], int], *, most: int | None
) -> str | None:
    """Why an instance (input may be empty) is dropped, or None. An output has at most `most` tokens."""
    if not output.strip():
        return "empty_output"
    if most is not None and count(output) > most:
        return "output_too_long"
    if output.strip() in (given.strip(), instruction.strip()):
        return "output_repeats_input"
    if output.rstrip().endswith((":", ",", "\uff1a", "\uff0c", "\u3001")):
        return "output_unfinished"
    if is_refusal(output):
        return "refusal"
    if _CANNOT_DO.search(given) and re.search(r"\b(attached|see the|shown)\b", given, re.IGNORECASE):
        return "keyword_beyond_text"
    return None


def starts_well(text: str) -> bool:
    """Whether a text begins with a letter or digit of any script, a quotation, a bracket or code."""
    first, second = text[:1], text[1:2]
    if unicodedata.category(first)[0] not in "PS" or first in OPENS:
        return True
    return first in "#.-_%" and second.isalnum()  # #include, .gitignore, -1, _name, %matplotlib; a list has "- "


def is_refusal(text: str) -> bool:
    """Whether a text begins by refusing: an answer that declines teaches to decline."""
    return _REFUSAL.match(text) is not None


def drop_conflicting(
    instances: list[tuple[str, str]],
) -> tuple[list[tuple[str, str]], list[tuple[str, tuple[str, str]]]]:
    """Instances of one task without repeats; an input with two different outputs loses both.

    -> (kept, [(reason, instance) of the others])
    """
    stripped = [(given.strip(), output.strip()) for given, output in instances]
    outputs = defaultdict(set)
    for given, output in stripped:
        outputs[given].add(output)
    kept, dropped = [], []
    for instance in stripped:
        if len(outputs[instance[0]]) > 1:
            dropped.append(("same_input_different_output", instance))
        elif instance in kept:
            dropped.append(("duplicate_instance", instance))
        else:
            kept.append(instance)
    return kept, dropped


def _occurrences(tokens: Sequence[str]):
    seen: Counter = Counter()
    for token in tokens:
        seen[token] += 1
        yield token, seen[token]
