"""The scores and distances by which check=quality selects. Scores are in [0, 1]. The last two entries need a policy.

plain       the mean of five scores: length, no loops, a finished end, a prompt with substance, own words
length      the longest answers. Zhao et al. 2024 (arXiv:2402.04833): a thousand of them beat LIMA's and AlpaGasus's
difficulty  IFD, the loss of the answer after its prompt over its loss alone. Li et al. 2024 (arXiv:2308.12032). The
            highest values below 1 are selected. Above 1 the prompt makes the answer less likely: the row is dropped
random      the baseline of every selection
embeddings  a distance: cosine between mean last hidden states, instead of hashed word n-grams
"""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.feature_extraction.text import HashingVectorizer

from data.chat import encode_completion
from data.checks.texts import TextRow
from data.tokenizer import load_tokenizer
from generation.filters import words
from model.packing import pack
from model.reading import in_batches, read_policy
from runtime.devices import own_device

BY = ("plain", "length", "difficulty", "random")
DIVERSITY = ("words", "embeddings", "none")


def score_parts(row: TextRow) -> dict[str, float]:
    """The parts of the plain score, each in [0, 1]. They are simple on purpose: they rank, and a judge decides."""
    answer = row.answered[-1] if row.answered else ""
    tokens = words(" ".join(row.answered))
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return {
        # up to 200 words a longer answer is more informative
        "length": min(1.0, np.log1p(len(tokens)) / np.log1p(200)),
        "fresh": len(set(trigrams)) / len(trigrams) if trigrams else 0.5,  # loops repeat themselves
        "finished": float(answer.rstrip()[-1:] in tuple(".!?)]}\"'`:") or answer.rstrip()[-1:].isdigit()),
        # the lecture: short prompts are of little use
        "prompt": min(1.0, np.log1p(len(words(row.prompt))) / np.log1p(50)),
        "own_words": 1.0 - _copied(tokens, words(row.prompt)),
    }


def length_scores(rows: Sequence[TextRow]) -> np.ndarray:
    """(n,) number of words of the last answer, relative to the longest one."""
    counts = np.array([len(words(row.answered[-1])) if row.answered else 0 for row in rows], dtype=float)
    return counts / max(counts.max(initial=1.0), 1.0)


class Reader:
    """A policy that reads rows: the difficulty of their answers, and their embeddings."""

    def __init__(self, path: str, *, precision: str, batch_size: int, max_length: int):
        self.tokenizer, self.policy = load_tokenizer(path), read_policy(path, precision=precision)
        self.max_length = min(max_length, self.policy.config.max_length)
        self.settings = {"pad_id": self.tokenizer.pad_id, "batch_size": batch_size, "device": own_device()}

    def difficulty(self, rows: Sequence[TextRow]) -> np.ndarray:
        """(n,) loss per token of the last answer after the text before it, over its loss without that text."""
        given = [self._encoded(row) for row in rows]
        alone = [self._alone(row) for row in given]
        losses = [in_batches(self._mean_loss, side, **self.settings).numpy() for side in (given, alone)]
        return losses[0] / np.maximum(losses[1], 1e-6)

    def embeddings(self, rows: Sequence[TextRow]) -> np.ndarray:
        """(n, D) mean last hidden states of the whole row, with norm 1."""
        whole = [self._encoded(row)["input_ids"] for row in rows]
        whole = [{"input_ids": ids, "completion_mask": [False] + [True] * (len(ids) - 1)} for ids in whole]
        found = in_batches(self._mean_state, whole, **self.settings).numpy()
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)

    def _encoded(self, row: TextRow) -> dict:
        last = max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
        messages, longest = row.messages[:last], self.max_length
        return encode_completion(
            messages, row.answered[-1], self.tokenizer, max_length=longest, max_prompt_length=longest // 2
        )

    @staticmethod
    def _alone(row: dict) -> dict:
        """The answer after the first token of the prompt, which every tokenizer needs."""
        start = row["completion_mask"].index(True)
        return {key: row[key][:1] + row[key][start:] for key in ("input_ids", "completion_mask")}

    def _mean_loss(self, *rows) -> torch.Tensor:
        return -self.policy.logprobs(*rows).double().sum(1) / rows[2].sum(1)

    def _mean_state(self, *rows) -> torch.Tensor:
        states, counts = self.policy.hidden_states(pack(*rows)), rows[2].sum(1).tolist()
        return torch.stack([of_row.float().mean(0) for of_row in states.split(counts)])


def word_vectors(texts: Sequence[str]):
    """(n, 2^18) sparse: counts of hashed words and word pairs, with norm 1."""
    return HashingVectorizer(n_features=1 << 18, ngram_range=(1, 2), alternate_sign=False).transform(texts)


def k_center(vectors, scores: np.ndarray, num: int) -> list[tuple[int, float]]:
    """(index, cosine distance to the nearest earlier one) of `num` rows: first the best-scored, then always the
    furthest.

    This is the greedy algorithm of Sener and Savarese 2018 (arXiv:1708.00489). `vectors`: (n, D) with norm 1, sparse or
    dense. The distance is weighted by the score, so that of far rows a good one is preferred to an outlier.
    """
    if not vectors.shape[0]:
        return []
    nearest = np.ones(vectors.shape[0])
    at, chosen, distance = int(scores.argmax()), [], 1.0
    for _ in range(min(num, len(nearest))):
        chosen.append((at, distance))
        centre = vectors[at] if isinstance(vectors, np.ndarray) else np.asarray(vectors[at].todense()).ravel()
        nearest = np.minimum(nearest, 1.0 - vectors @ centre)
        nearest[at] = -1.0  # already chosen
        gain = np.where(nearest < 0, -np.inf, nearest * scores)
        at = int(gain.argmax())
        distance = float(max(nearest[at], 0.0))
    return chosen


def _copied(tokens: list[str], prompt: list[str]) -> float:
    """Share of the answer's words that are also in the prompt."""
    known = set(prompt)
    return sum(token in known for token in tokens) / len(tokens) if tokens else 0.0
