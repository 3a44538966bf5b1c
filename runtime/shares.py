"""How ranks share rows: rank r of W has those numbered r, r + W, r + 2 W, ..."""

import numpy as np


def share(count: int, rank: int, world_size: int) -> range:
    """The numbers, among `count` rows of all ranks, of those that are this rank's."""
    return range(rank, count, world_size)


def number_of(place: int, rank: int, world_size: int) -> int:
    """The number, among all ranks' rows, of this rank's row at `place`."""
    return place * world_size + rank


def places_of(numbers: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Where this rank has those of the rows `numbers` that are its own; in their order."""
    return numbers[numbers % world_size == rank] // world_size
