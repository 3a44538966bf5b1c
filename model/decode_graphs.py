"""Decoding on CUDA from captured graphs: one launch a token instead of some thirty operations a layer from the host."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from model.kv_cache import KVCache

STRIDE = 256  # tokens: a graph reads a fixed part of the cache, so there is one for each rounded length


class DecodeGraphs:
    """`step(columns, pieces)` for any number of rows up to the cache's slots, replayed from graphs.

    A graph has fixed shapes: it computes all slots. What those without a row draw is dropped, and the key and value
    that they write lie in slots that a prompt will fill.
    """

    def __init__(self, step: Callable[[Tensor, list], Tensor], cache: KVCache):
        slots = cache.store.shape[1]
        self.step, self.length, self.rows = step, cache.length, slice(0, slots)
        self.columns = torch.zeros(4, slots, dtype=torch.int64, device=cache.store.device)
        self.graphs = {}  # tokens read -> (graph, what it draws)

    def __call__(self, columns: Tensor, lengths: list[int]) -> Tensor:
        """(B,) int64 what the B rows of `columns` (4, B) draw.

        A length's first step runs as it is, which readies the libraries; its second is captured.
        """
        self.columns.zero_()
        self.columns[:, : len(lengths)] = columns
        read = min(-(-max(lengths) // STRIDE) * STRIDE, self.length)
        if read not in self.graphs:
            self.graphs[read] = None
            drawn = self.step(self.columns, [(self.rows, read)])
        else:
            graph, drawn = self.graphs[read] = self.graphs[read] or self.capture(read)
            graph.replay()
        return drawn[: len(lengths)]

    def capture(self, read: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph of a step that reads `read` tokens of every slot; nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            drawn = self.step(self.columns, [(self.rows, read)])
        return graph, drawn


def can_capture(policy: nn.Module) -> bool:
    """Whether the policy's decoding steps may be captured: on CUDA, and not split over ranks (FSDP's hooks wait)."""
    on_cuda = next(policy.parameters()).is_cuda
    return on_cuda and not any(isinstance(module, FSDPModule) for module in policy.modules())
