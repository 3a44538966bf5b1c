"""The order of rows: shuffled by seed, the same for every number of ranks, and resumable at any step."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from runtime.shares import share


class Loader:
    """An endless iterator over this rank's share of each global batch.

    The items form one endless sequence of epochs. An epoch is a permutation that depends only on (seed, epoch). Step s
    takes items [s * batch_size, (s + 1) * batch_size). Of these, rank r takes every world_size-th, starting with the
    r-th. So the global batches do not depend on the number of ranks, and the position is the whole state.

    `weights`, one per file: an epoch has every row floor(weight) times. The fraction of the weight is the share
    of the file's rows that is added, drawn again each epoch. 1: the file once, 0.5: half of it, 2.5: twice and a half.

    Without `shuffle` rows come in file order, file after file (with a weight of 2: the file twice in a row).

    Raises:
        ValueError: there is no item, weights do not fit, or batch_size is not a multiple of the number of ranks.
    """

    def __init__(
        self,
        items: Sequence[Any],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        rank: int,
        world_size: int,
        file_sizes: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
    ):
        if not items:
            raise ValueError("there is no row to train on")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size={batch_size} must be a positive multiple of the {world_size} ranks")
        self.items, self.batch_size, self.seed, self.shuffle = items, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.file_sizes = list(file_sizes or [len(items)])
        self.weights = _check_weights(weights, self.file_sizes)
        self.taken = 0  # items of the endless sequence that all ranks together have taken
        self._epoch, self._order = 0, self._permutation(0)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> list[Any]:
        own_numbers = share(self.batch_size, self.rank, self.world_size)
        batch = [self.items[self._index(self.taken + place)] for place in own_numbers]
        self.taken += self.batch_size
        return batch

    def first(self, count: int) -> Iterator[Any]:
        """The distinct items among the first `count` of the sequence, in the order of the files."""
        places = range(min(count, self.epoch_size)) if self._repeats() else range(count)
        return (self.items[i] for i in sorted({self._index(place) for place in places}))

    def _repeats(self) -> bool:
        """Whether every epoch has the same items, because no file has a fractional weight."""
        return all(weight == int(weight) for weight in self.weights)

    def peek(self) -> list[Any]:
        """The items of the next step, without taking them."""
        batch = next(self)
        self.taken -= self.batch_size
        return batch

    @property
    def epoch_size(self) -> int:
        """Rows of an epoch, including weights."""
        return len(self._order)

    @property
    def epoch(self) -> float:
        return self.taken / self.epoch_size

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "order": self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of `state`, with any batch_size and number of ranks."""
        if state["order"] != self._fingerprint():
            raise ValueError(
                "the data differs from that of the checkpoint: files, data.weights, data.shuffle, data.max_length, "
                "tokenizer "
                "or seed changed; restore them, or start a new run from the exported model"
            )
        self.taken = int(state["taken"])

    def _fingerprint(self) -> str:
        lengths = getattr(self.items, "num_tokens", None)  # a store knows them without reading an item
        lengths = [num_tokens(item) for item in self.items] if lengths is None else lengths.tolist()
        identity = (self.seed, self.shuffle, self.file_sizes, self.weights, lengths)
        return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]

    def _index(self, place: int) -> int:
        epoch, inside = divmod(place, self.epoch_size)  # every epoch has the same size
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        return int(self._order[inside])

    def _permutation(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        parts, start = [], 0
        for size, weight in zip(self.file_sizes, self.weights, strict=True):
            rows = np.arange(start, start + size)
            some = rng.choice(rows, round((weight - int(weight)) * size), replace=False)
            parts += [rows] * int(weight) + [np.sort(some)]
            start += size
        order = np.concatenate(parts)
        return rng.permutation(order) if self.shuffle else order


def micro_batches(batch: Sequence[Any], size: int) -> list[list[Any]]:
    """The batch in parts of `size`, longest rows first, so that rows of similar length share a forward.

    The first part is the largest, so a run without enough memory fails in its first step.
    """
    ordered = sorted(batch, key=num_tokens, reverse=True)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def num_tokens(item: Any) -> int:
    """Number of tokens of an item. An example is {"input_ids", ...}; a preference group has `rows` of these."""
    rows = item.rows if hasattr(item, "rows") else [item]
    return sum(len(row["input_ids"]) for row in rows)


def _check_weights(weights: Sequence[float] | None, file_sizes: list[int]) -> list[float]:
    weights = [1.0] * len(file_sizes) if not weights else [float(w) for w in weights]
    if len(weights) != len(file_sizes):
        raise ValueError(f"data.weights has {len(weights)} entries for {len(file_sizes)} files; give one per file")
    if any(not 0 < w < float("inf") for w in weights):
        raise ValueError(f"data.weights must be positive numbers, got {weights}; leave a file out instead")
    if not sum(round(w * n) for w, n in zip(weights, file_sizes, strict=True)):
        raise ValueError(f"data.weights={weights} select no row of files with {file_sizes} rows")
    return weights
