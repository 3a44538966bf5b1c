"""The linear layer of every model: master weights, matmuls in another dtype, adapters, weights prepared to decode."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from model.functions import CastLinear
from model.recompute import keeping_recipe
from runtime.distributed import whole


class Linear(nn.Linear):
    """A linear layer on (N, in) that multiplies in the dtype of its input: fp32 master weights, bf16 matmuls."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, parts: tuple[int, ...] | None = None):
        super().__init__(in_features, out_features, bias=bias)
        self.parts = {"weight": parts or (out_features,)}  # numbers of rows of the matrices stacked in the weight
        # while sampling: the layer as a function of x with a weight prepared for decoding; of a Stack, the cast weight
        self.prepared: Any = None
        self.lora = None  # the adapter, if there is one (model/lora.py)
        # (the weight in the dtype of matmuls, the version of the weight that it is a copy of)
        self.kept: tuple[Tensor, tuple] | None = None

    def forward(self, x: Tensor, adapted: bool = True) -> Tensor:
        if self.prepared is not None:
            return self.prepared(x)
        with keeping_recipe(x):
            added = self.lora(x) if adapted and self.lora is not None else None
            if self.weight.dtype == x.dtype:
                return linear_plus(x, self.weight, self.bias, added)
            y = CastLinear.apply(x, self.weight, self.cast(x.dtype), self.bias)
            return y if added is None else y + added

    def cast(self, dtype: torch.dtype) -> Tensor:
        """(out, in) the weight in `dtype`. It is cast again only after the weight changed (autograd counts changes)."""
        if self.weight.dtype == dtype:
            return self.weight.detach()
        value = self.weight._version, self.weight.device, dtype
        if self.kept is None or self.kept[1] != value:
            with torch.inference_mode(False), torch.no_grad():  # a backward pass may read this copy later
                self.kept = self.weight.to(dtype), value
        return self.kept[0]

    def prepare(self, dtype: torch.dtype, batch: int, adapted: bool) -> None:
        """Cast the weight once before decoding, instead of at every token.

        On a CPU in bf16 the weight is also reordered for oneDNN and `batch` rows. A decoding step is bound by reading
        weights, and these matmuls then run 1.2-2 times faster.

        An adapter is merged only in float32. In bf16 the sum would lose most of what a new adapter adds, so weight and
        adapter stay separate, as in training.
        """
        lora = self.lora if adapted else None
        if lora is not None and dtype == torch.float32:
            weight, lora = whole(self.weight.detach()).float() + lora.delta().detach(), None
        else:
            weight = self.cast(dtype)
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        if dtype == torch.bfloat16 and weight.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, batch)
            product = torch.ops.mkldnn._linear_pointwise
            if lora is None:
                self.prepared = lambda x: product(x, weight, bias, "none", [], "")
            else:
                add_bias = (lambda y: y) if bias is None else (lambda y: y + bias)
                self.prepared = lambda x: add_bias(product.binary(x, lora(x), weight, None, "add"))
        else:
            self.prepared = lambda x: linear_plus(x, weight, bias, None if lora is None else lora(x))


def linear_plus(x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None) -> Tensor:
    """(N, out) x @ weight.T + added + bias, where matmul and addition are rounded once, together.

    In bf16 the sum of two rounded numbers equals the larger one where the other is smaller than half of its last digit.
    Half of an adapter's contribution was lost at a relative size of 1e-3, and nearly all at 1e-4.
    """
    if added is None:
        return F.linear(x, weight, bias)
    y = torch.addmm(added, x, weight.t())
    return y if bias is None else y + bias


def count_changes(optimizer: torch.optim.Optimizer, *step_arguments) -> None:
    """Count each optimizer step as a change of its weights, because torch's fused optimizers do not."""
    increment_version([p for group in optimizer.param_groups for p in group["params"]])


register_optimizer_step_post_hook(count_changes)
