"""A packed stream in chunks, for a recurrence. The chunks form trees: a prompt's last chunk is the parent of the first
chunk of every answer."""

import torch
from torch import Tensor

from runtime.devices import send

SIZE = 64  # tokens of a chunk, as in published kernels; longer chunks compute more, shorter ones need more steps


class Chunks:
    """Chunks of up to SIZE tokens, sorted by level. No chunk crosses the border of a prompt or of an answer.

    The level of a chunk is the number of chunks before it in its row. All chunks of a level are computed together, from
    the states after the level before. So the state is zero at the start of a block, and an answer starts from the state
    at the end of its prompt.
    """

    def __init__(self, cuts: list[list[int]], device: torch.device):
        """cuts: per block, the start of its prompt, the end of its prompt, the end of each answer."""
        # per level, its chunks as (start, stop, index of the parent in the level before)
        levels: list[list[tuple[int, int, int | None]]] = []
        segments: list[tuple[int, int | None]] = []  # per prompt and answer, its start and the token before it
        self.ends = []  # per block, the level and index of its prompt's last chunk
        for begin, end, *answers in cuts:
            self.ends.append(grow(levels, begin, end, 0, 0))
            segments.append((begin, None))
            for start, stop in zip((end, *answers), answers, strict=False):
                if start < stop:
                    level, place = self.ends[-1]
                    grow(levels, start, stop, level + 1, place)
                    segments.append((start, end - 1))
        chunks = [chunk for level in levels for chunk in level]
        offsets = torch.arange(SIZE)
        starts, stops = (torch.tensor([chunk[side] for chunk in chunks])[:, None] for side in (0, 1))
        real = offsets < stops - starts
        index = torch.minimum(starts + offsets, stops - 1)  # (n, SIZE): a short chunk repeats its last token
        size = int(stops.max())
        places = torch.empty(size, dtype=torch.int64)
        places[index[real]] = real.flatten().nonzero()[:, 0]
        before = torch.arange(-1, size)  # last entry: the token `size` stands for no token before
        before[-1] = size
        for start, last in segments:
            before[start] = size if last is None else last
        self.index, self.idle, self.places, self.before = (send(x, device) for x in (index, ~real, places, before))
        self.sizes = [len(level) for level in levels]
        self.parents = [send(torch.tensor([chunk[2] for chunk in level]), device) for level in levels]

    def split(self, x: Tensor) -> Tensor:
        """(n, SIZE, ...) the rows of x (N, ...) in chunks."""
        return x.index_select(0, self.index.flatten()).unflatten(0, self.index.shape)

    def join(self, x: Tensor) -> Tensor:
        """(N, ...) the rows of the chunks x (n, SIZE, ...) in stream order."""
        return x.flatten(0, 1).index_select(0, self.places)


def grow(levels: list[list], start: int, stop: int, level: int, parent: int) -> tuple[int, int]:
    """Add the chunks of tokens [start, stop), the first one at this level. Returns level and index of the last one."""
    for begin in range(start, stop, SIZE):
        if level == len(levels):
            levels.append([])
        levels[level].append((begin, min(begin + SIZE, stop), parent))
        parent, level = len(levels[level]) - 1, level + 1
    return level - 1, parent
