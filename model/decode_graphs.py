"""Decoding with CUDA graphs: one launch per token, instead of some thirty operations per layer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from model.kv_cache import KVCache

STRIDE = 256  # tokens; a graph reads a fixed part of the cache, so there is one graph per rounded length


class DecodeGraphs:
    """`step(columns, pieces)` replayed from CUDA graphs, for any number of rows up to the number of slots.

    A graph has fixed shapes, so it computes all slots. The tokens of empty slots are dropped. The keys and values that
    they write are overwritten when a prompt enters the slot.
    """

    def __init__(self, step: Callable[[Tensor, list], Tensor], cache: KVCache):
        slots = cache.store.shape[1]
        self.step, self.length, self.rows = step, cache.length, slice(0, slots)
        self.columns = torch.zeros(4, slots, dtype=torch.int64, device=cache.store.device)
        self.graphs: dict[int, tuple] = {}  # number of cached tokens read -> (graph, its output tensor)

    def __call__(self, columns: Tensor, lengths: list[int]) -> Tensor:
        """(B, 2) the next token of the B rows of `columns` (4, B), and its log-prob: see `sampling.draw_tokens`.

        The first step at a length runs eagerly, which initialises the libraries. The second one is captured.
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
        """(graph, output tensor) of a step that reads `read` tokens of every slot. Capturing computes nothing."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            drawn = self.step(self.columns, [(self.rows, read)])
        return graph, drawn


def can_capture(policy: nn.Module) -> bool:
    """Whether the policy's decoding steps can be captured: on CUDA and not sharded, as FSDP's hooks synchronise."""
    on_cuda = next(policy.parameters()).is_cuda
    return on_cuda and not any(isinstance(module, FSDPModule) for module in policy.modules())
