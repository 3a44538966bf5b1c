"""activation_checkpointing=selective: the input of a matmul is recomputed for its backward pass if a cheap kernel made
it.

In a layer these are the outputs of the norms and the gated activation. Both are computed from tensors that autograd
keeps anyway. No matmul and no attention runs twice.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def recomputed(x: Tensor, again: Callable[[], Tensor]) -> Tensor:
    """x, for which a Linear keeps the function `again` instead. `again` returns the same bits."""
    x.again = again
    return x


def keeping_recipe(x: Tensor) -> AbstractContextManager:
    """Inside the block, autograd keeps `x.again` in place of x, if x has one."""
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
