"""A packed stream cut into chunks for a recurrence: a tree, in which a prompt's last chunk has every answer's first."""

import torch
from torch import Tensor

from runtime.devices import send

SIZE = 64  # tokens of a chunk, as in the published kernels: longer ones compute more, shorter ones wait more often


class Chunks:
    """Chunks of up to SIZE tokens, none of which crosses the border of a prompt or an answer, in the order of `levels`.

    A level holds the chunks with equally many chunks before them in their rows: all of it is computed at once, from the
    states that the level before has left. So a state starts at zero in every block, and an answer's from its prompt.
    """

    def __init__(self, cuts: list[list[int]], device: torch.device):
        """cuts: of each block, where its prompt begins, where that ends, and where each answer ends."""
        levels = []  # of each the chunks (start, stop, place in the level before)
        segments = []  # of each prompt and answer, where it starts and the token before that
        self.ends = []  # of each block's prompt: the level and place of its last chunk
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
        before = torch.arange(-1, size)  # its last entry is of the token `size`, which stands for none before
        before[-1] = size
        for start, last in segments:
            before[start] = size if last is None else last
        self.index, self.idle, self.places, self.before = (send(x, device) for x in (index, ~real, places, before))
        self.sizes = [len(level) for level in levels]
        self.parents = [send(torch.tensor([chunk[2] for chunk in level]), device) for level in levels]

    def split(self, x: Tensor) -> Tensor:
        """(n, SIZE, ...) the rows of x (N, ...) chunk by chunk."""
        return x.index_select(0, self.index.flatten()).unflatten(0, self.index.shape)

    def join(self, x: Tensor) -> Tensor:
        """(N, ...) the rows of x (n, SIZE, ...) in the order of the stream."""
        return x.flatten(0, 1).index_select(0, self.places)


def grow(levels: list[list], start: int, stop: int, level: int, parent: int) -> tuple[int, int]:
    """Add the chunks of tokens [start, stop), the first at this level; returns the level and place of the last."""
    for begin in range(start, stop, SIZE):
        if level == len(levels):
            levels.append([])
        levels[level].append((begin, min(begin + SIZE, stop), parent))
        parent, level = len(levels[level]) - 1, level + 1
    return level - 1, parent
