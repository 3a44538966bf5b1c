"""Count the bytes that kernels move, without a GPU: loads and stores in Triton's interpreter, and torch operations.

    with Traffic() as traffic:      # under TRITON_INTERPRET=1
        step()
    traffic.unique / minimum        # 1.0: each input was read once, each output written once

    requested   bytes of all unmasked lanes
    sectors     bytes of the whole 32-byte sectors that each load or store touches (coalescing)
    unique      each address counts once per launch, as with an unlimited cache: a lower bound

An atomic counts twice, as a read and a write. A torch operation counts its distinct inputs and its outputs.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

VIEWS = {
    "view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "detach", "alias",
    "as_strided", "_unsafe_view", "reshape", "split", "split_with_sizes", "chunk", "unbind", "empty", "empty_like",
    "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense", "lift_fresh",
}  # fmt: skip
FILLS = {"zeros", "zeros_like", "zero_", "ones", "ones_like", "full", "full_like", "fill_", "new_zeros", "new_full",
         "arange"}  # fmt: skip


@dataclass
class Count:
    """Bytes moved and operations computed by all launches of one kernel, or by all calls of one operation."""

    launches: int = 0
    operations: int = 0  # of a kernel: elements times float operations; matmuls are not counted
    requested: int = 0
    sectors: int = 0
    unique: int = 0

    def add(self, moved: int) -> None:
        """Count one more call of a torch operation."""
        self.launches, self.requested, self.unique = self.launches + 1, self.requested + moved, self.unique + moved


class Traffic(TorchDispatchMode):
    """Counts by name, of Triton kernels in `kernels` and of torch operations in `operations`."""

    def __init__(self):
        super().__init__()
        self.kernels, self.operations = defaultdict(Count), defaultdict(Count)
        self._current, self._addresses, self._undo = None, {}, []

    @property
    def requested(self) -> int:
        return sum(count.requested for count in (*self.kernels.values(), *self.operations.values()))

    @property
    def unique(self) -> int:
        return sum(count.unique for count in (*self.kernels.values(), *self.operations.values()))

    @property
    def launches(self) -> int:
        return sum(count.launches for count in (*self.kernels.values(), *self.operations.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self._current is None and name not in VIEWS:
            inputs = [] if name in FILLS else [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.operations[name].add(sum(map(distinct_bytes, inputs + outputs)))
        return out

    def __enter__(self):
        builder, grid = interpreter.InterpreterBuilder, interpreter.GridExecutor
        for name, pointer, mask in (
            ("create_masked_load", 0, 1),
            ("create_masked_store", 0, 2),
            ("create_atomic_rmw", 1, 3),
            ("create_atomic_cas", 0, None),
        ):
            self._wrap(builder, name, self._access(getattr(builder, name), pointer, mask, "atomic" in name))
        for name in ("unary_op", "binary_op"):
            self._wrap(builder, name, self._arithmetic(getattr(builder, name)))
        self._wrap(grid, "__call__", self._launch(grid.__call__))
        return super().__enter__()

    def __exit__(self, *error):
        for owner, name, original in self._undo:
            setattr(owner, name, original)
        return super().__exit__(*error)

    def _wrap(self, owner, name: str, replacement) -> None:
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, replacement)

    def _access(self, original, pointer: int, mask: int | None, atomic: bool):
        def access(builder, *args, **kwargs):
            addresses = args[pointer].data.reshape(-1)
            if mask is not None and args[mask] is not None:
                addresses = addresses[np.broadcast_to(args[mask].data.reshape(-1), addresses.shape)]
            size = max(1, args[pointer].get_element_ty().primitive_bitwidth // 8)
            times = 2 if atomic else 1
            self._current.requested += addresses.size * size * times
            self._current.sectors += np.unique(addresses >> np.uint64(5)).size * 32 * times
            kind = "atomic" if atomic else original.__name__  # an address that is read and written counts twice
            self._addresses.setdefault((kind, size, times), []).append(np.unique(addresses))
            return original(builder, *args, **kwargs)

        return access

    def _arithmetic(self, original):
        def arithmetic(builder, *args, **kwargs):
            out = original(builder, *args, **kwargs)
            if out.data.dtype.kind == "f":
                self._current.operations += out.data.size
            return out

        return arithmetic

    def _launch(self, original):
        def launch(grid, *args, **kwargs):
            self._current, self._addresses = self.kernels[grid.fn.__name__], {}
            self._current.launches += 1
            try:
                return original(grid, *args, **kwargs)
            finally:
                for (_, size, times), seen in self._addresses.items():
                    self._current.unique += np.unique(np.concatenate(seen)).size * size * times
                self._current = None

        return launch


def distinct_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, where expanded dimensions (stride 0) count once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return int(np.prod(sizes, dtype=np.int64)) * tensor.element_size()
