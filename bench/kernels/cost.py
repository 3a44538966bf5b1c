"""The cost of a step at full size, counted without running it: operations, bytes, launches, scratch memory, GPU time.

The real wrappers run on tensors of the meta device, which have shapes and no memory. A torch operation counts two
operations per multiply-add, and the bytes of its distinct inputs and outputs. A Triton launch counts by a formula that
its author declares. A test compares the formula with the bytes that the interpreter counts at a small size.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from bench.kernels.traffic import FILLS, VIEWS, distinct_bytes

PRODUCTS_PER_SECOND = 790e12  # dense bfloat16 of an H100 in large library products
BYTES_PER_SECOND = 3e12  # bandwidth of an H100's memory

# kernel name -> (operations, bytes) of one launch, from the tensors and numbers it was given
Formula = Callable[..., tuple[float, float]]


@dataclass
class Cost:
    """Totals of a step. `peak` is the largest memory in use at one time, in bytes, without what existed before."""

    operations: float = 0
    bytes: float = 0
    launches: int = 0
    peak: int = 0

    @property
    def seconds(self) -> float:
        """Time on one H100 if products and memory never overlapped."""
        return self.operations / PRODUCTS_PER_SECOND + self.bytes / BYTES_PER_SECOND


@contextlib.contextmanager
def counting(formulas: dict[str, Formula], item: int = 0) -> Iterator[Cost]:
    """Count the operations inside the block on meta tensors. `x.item()` returns `item`; any two tensors are equal."""
    cost, run = Cost(), JITFunction.run

    def launch(self, *args, grid, warmup, **options):
        operations, moved = formulas[self.fn.__name__](*args, **options)
        cost.operations, cost.bytes, cost.launches = cost.operations + operations, cost.bytes + moved, cost.launches + 1

    JITFunction.run = launch
    try:
        with _Counter(cost, item):
            yield cost
    finally:
        JITFunction.run = run


class _Counter(TorchDispatchMode):
    def __init__(self, cost: Cost, item: int):
        super().__init__()
        self.cost, self.item = cost, item
        self.living: dict = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal"):  # the host would read a value, and meta tensors have none
            return self.item if name != "equal" else True
        out = func(*args, **(kwargs or {}))
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = {x.untyped_storage()._cdata for x in inputs}
        for x in outputs:
            if x.untyped_storage()._cdata not in known:
                self._born(x.untyped_storage())
        if name in ("mm", "addmm", "addmm_"):
            self.cost.operations += 2 * outputs[0].numel() * inputs[-2 if "out" in (kwargs or {}) else -1].shape[0]
        if name not in VIEWS:
            # an `out` that is also an input (addmm) is read and written; a plain `out` is only written
            read = {id(x): x for x in ([] if name in FILLS else tree_leaves(args)) if isinstance(x, Tensor)}
            self.cost.bytes += sum(map(distinct_bytes, [*read.values(), *outputs]))
            self.cost.launches += 1
        return out

    def _born(self, storage) -> None:
        size = storage.nbytes()
        self.living[storage._cdata] = size
        self.cost.peak = max(self.cost.peak, sum(self.living.values()))
        weakref.finalize(storage, self.living.pop, storage._cdata, None)
