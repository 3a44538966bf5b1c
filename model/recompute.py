"""activation_checkpointing=selective: what a cheap kernel made for a matmul is computed again for its backward pass.

Of a layer that is the norms' outputs and the gated activation: both come from tensors that autograd keeps anyway. No
matmul and no attention runs twice.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def recomputed(x: Tensor, again: Callable[[], Tensor]) -> Tensor:
    """x, of which a Linear keeps `again`, that returns the same bits, in its place."""
    x.again = again
    return x


def keeping_recipe(x: Tensor) -> AbstractContextManager:
    """Inside the block, autograd keeps `x.again` wherever it would keep x. It keeps x where there is none."""
    again = getattr(x, "again", None)
    if again is None or not torch.is_grad_enabled():
        return nullcontext()
    storage, shape, strides = x.untyped_storage()._cdata, x.shape, x.stride()

    def pack(kept: Tensor) -> Tensor | Callable[[], Tensor]:
        same = kept.untyped_storage()._cdata == storage and kept.shape == shape and kept.stride() == strides
        return again if same else kept

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return kept()

    return saved_tensors_hooks(pack, unpack)
