"""Near duplicates: MinHash finds candidates (datasketch), the exact Jaccard of words and word pairs decides."""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from datasketch import MinHash, MinHashLSH

PERMUTATIONS = 64
SHORT = 24  # words; shorter texts may differ in fewer words
_EMPTY = MinHash(PERMUTATIONS, seed=1)  # draws the permutations once
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
BASE = np.uint64(0x9E3779B97F4A7C15)


def words(text: str) -> list[str]:
    """Runs of letters and digits of any script, lowercased.

    Chinese and Japanese have no spaces: each character counts.
    """
    return _WORD.findall(text.lower())


def normal(text: str) -> str:
    """The words with one space between them. Texts that differ only in case or punctuation become equal."""
    return " ".join(words(text)) or text.strip()


@lru_cache(maxsize=1 << 20)
def _code(word: str) -> int:
    return zlib.crc32(word.encode("utf-8", "surrogatepass"))


def codes(tokens: Sequence[str]) -> np.ndarray:
    """A uint64 number for each word, the same in every process."""
    return np.fromiter(map(_code, tokens), np.uint64, len(tokens))


def shingles(text: str) -> np.ndarray:
    """Sorted 32-bit hashes of a `normal` text's words and pairs of neighbouring words."""
    single = codes(text.split())
    pairs = (single[:-1] * BASE + single[1:]) * BASE >> np.uint64(32)
    return np.unique(np.concatenate([single, pairs]).astype(np.uint32))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|A and B| / |A or B| of two sorted sets."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def same_but_few(a: str, b: str) -> bool:
    """Whether two short `normal` texts differ in at most one word of eight: "what is flu" is not "what is mould".

    In a text of a few words one word can be the topic, however many pairs the texts share.
    """
    x, y = Counter(a.split()), Counter(b.split())
    least, most = sorted((x.total(), y.total()))
    return least >= SHORT or most - (x & y).total() <= least // 8


class Sketch(NamedTuple):
    """The features by which two texts are compared."""

    text: str  # in the form of `normal`
    grams: np.ndarray
    hashes: MinHash


class NearIndex:
    """Texts by similarity.

    Texts that are `same_but_few` are near duplicates from the Jaccard similarity `threshold` on.
    """

    def __init__(self, threshold: float):
        if not 0 < threshold < 1:
            raise ValueError(f"check.threshold={threshold} must lie between 0 and 1")
        self.threshold = threshold
        # a false candidate costs only one comparison
        self._lsh = MinHashLSH(threshold, PERMUTATIONS, weights=(0.1, 0.9))
        self._sketches: list[tuple[str, np.ndarray]] = []

    def __len__(self) -> int:
        return len(self._sketches)

    def add(self, sketch: Sketch) -> None:
        self._lsh.insert(len(self._sketches), sketch.hashes, check_duplication=False)
        self._sketches.append((sketch.text, sketch.grams))

    def near(self, sketch: Sketch) -> list[tuple[int, float]]:
        """(index, similarity) of the texts at or above the threshold, the most similar first."""
        found = []
        for i in self._lsh.query(sketch.hashes):
            text, grams = self._sketches[i]
            similarity = jaccard(sketch.grams, grams)
            if similarity >= self.threshold and same_but_few(sketch.text, text):
                found.append((i, similarity))
        return sorted(found, key=lambda one: (-one[1], one[0]))


def sketches(texts: Iterable[str]) -> Iterator[Sketch]:
    """The sketch of each `normal` text."""
    for text in texts:
        grams = shingles(text)
        hashes = _EMPTY.copy()
        hashes.hashfunc = int  # the shingles are already hashes
        hashes.update_batch(grams.tolist())
        yield Sketch(text, grams, hashes)
