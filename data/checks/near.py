"""Near duplicates: MinHash finds candidates (datasketch), the exact Jaccard of words and word pairs decides."""

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from datasketch import MinHash, MinHashLSH

PERMUTATIONS = 64
_EMPTY = MinHash(PERMUTATIONS, seed=1)  # draws the permutations once
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
BASE = np.uint64(0x9E3779B97F4A7C15)


def words(text: str) -> list[str]:
    """Runs of letters and digits of any script, lowercased; Chinese and Japanese, which put no spaces, by character."""
    return _WORD.findall(text.lower())


def normal(text: str) -> str:
    """Words with one space between them: two texts that differ in case or marks only are the same text."""
    return " ".join(words(text)) or text.strip()


@lru_cache(maxsize=1 << 20)
def _code(word: str) -> int:
    return zlib.crc32(word.encode("utf-8", "surrogatepass"))


def codes(tokens: Sequence[str]) -> np.ndarray:
    """A number for each word, the same in every process; uint64."""
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


class NearIndex:
    """Texts by similarity. `threshold`: Jaccard from which two texts are near duplicates."""

    def __init__(self, threshold: float):
        if not 0 < threshold < 1:
            raise ValueError(f"check.threshold={threshold} must lie between 0 and 1")
        self.threshold = threshold
        self._lsh = MinHashLSH(threshold, PERMUTATIONS, weights=(0.1, 0.9))  # a false candidate costs one comparison
        self._sets: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._sets)

    def add(self, grams: np.ndarray, sketch: MinHash) -> None:
        self._lsh.insert(len(self._sets), sketch, check_duplication=False)
        self._sets.append(grams)

    def near(self, grams: np.ndarray, sketch: MinHash) -> list[tuple[int, float]]:
        """(index, similarity) of the texts at or above the threshold, the most similar first."""
        found = [(i, jaccard(grams, self._sets[i])) for i in self._lsh.query(sketch)]
        return sorted((one for one in found if one[1] >= self.threshold), key=lambda one: (-one[1], one[0]))


def sketches(texts: Iterable[str]) -> Iterator[tuple[np.ndarray, MinHash]]:
    """(shingles, MinHash) of each `normal` text."""
    for text in texts:
        grams = shingles(text)
        sketch = _EMPTY.copy()
        sketch.hashfunc = int  # the shingles are hashes already
        sketch.update_batch(grams.tolist())
        yield grams, sketch
