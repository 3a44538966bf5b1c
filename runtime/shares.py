"""The assignment of rows to ranks: rank r of W has rows r, r + W, r + 2 W, ..."""

import numpy as np


def share(count: int, rank: int, world_size: int) -> range:
    """The numbers of this rank's rows among `count` rows of all ranks."""
    return range(rank, count, world_size)


def number_of(place: int, rank: int, world_size: int) -> int:
    """The number among all ranks' rows of this rank's row at `place`."""
    return place * world_size + rank


def places_of(numbers: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The places on this rank of those rows `numbers` that it has, in their order."""
    return numbers[numbers % world_size == rank] // world_size
