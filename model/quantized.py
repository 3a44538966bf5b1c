"""The base of QLoRA: the layers' matrices are stored in 4 bits (NF4) and dequantised for each matmul.

Dettmers et al. 2023 (arXiv:2305.14314), sections 3 and 4: a block of 64 weights has one scale, and the scales are
quantised to 8 bits in blocks of 256. Codes and values are those of bitsandbytes: 0.516 bytes per weight. The codes are
buffers, and every rank holds all of them.
"""

import logging

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.linear import Linear, linear_plus
from model.recompute import keeping_recipe
from model.weights.names import parts_of

BASES = ("file", "nf4")
BLOCK, SCALES = 64, 256  # weights per scale, scales per scale of scales


def library():
    """The module bitsandbytes.functional. Raises ValueError where it is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # takes our `kernels` for Hugging Face's
    try:
        from bitsandbytes import functional
    except ImportError:
        raise ValueError("lora.base=nf4 needs bitsandbytes; pip install -e .[quantized]") from None
    return functional


class NF4Linear(Linear):
    """A frozen linear layer whose `weight` is dequantised at each access.

    Buffers: codes (n / 2, 1) uint8, two weights per byte. scales (n / 64,) uint8: a block's scale is
    values[scales] * wide[block of 256] + shift. wide (n / 64 / 256,) float32.
    """

    def __init__(self, linear: Linear, weight: Tensor):
        """weight: (out, in), float32 or bfloat16. Bias and shape are taken from `linear`."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.parts = linear.in_features, linear.out_features, linear.parts
        self.bias, self.lora, self.prepared = linear.bias, None, None
        codes, state = library().quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        found = {"codes": codes, "scales": state.absmax, "shift": state.offset, "levels": state.code}
        found |= {"wide": state.state2.absmax, "values": state.state2.code}
        for name, tensor in found.items():
            self.register_buffer(name, tensor)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """(out, in) the weight in `dtype`."""
        functional, shape = library(), (self.out_features, self.in_features)
        nested = functional.QuantState(self.wide, code=self.values, blocksize=SCALES, dtype=torch.float32)
        state = functional.QuantState(
            self.scales, shape, self.levels, BLOCK, "nf4", dtype, offset=self.shift, state2=nested
        )
        return functional.dequantize_4bit(self.codes, state)

    @property
    def weight(self) -> Tensor:
        return self.dequantized(torch.float32)

    def forward(self, x: Tensor, adapted: bool = True) -> Tensor:
        with keeping_recipe(x):
            return QuantizedProduct.apply(x, self, self.lora(x) if adapted and self.lora is not None else None)

    def prepare(self, dtype: torch.dtype, batch: int, adapted: bool) -> None:
        """Do nothing: there is no memory for a copy of every weight in `dtype`."""

    def twin(self) -> "NF4Linear":
        """Another layer on the same weight, without its adapter."""
        other = NF4Linear.__new__(NF4Linear)
        nn.Module.__init__(other)
        other.in_features, other.out_features, other.parts = self.in_features, self.out_features, self.parts
        other.bias, other.lora, other.prepared = self.bias, None, None
        for name, tensor in self.named_buffers(recurse=False):
            other.register_buffer(name, tensor)
        return other


class QuantizedProduct(torch.autograd.Function):
    """linear_plus of x (N, in) and the weight of `layer`, which is dequantised again for the backward pass.

    Neither the weight nor the bias gets a gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, layer: NF4Linear, added: Tensor | None) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return linear_plus(x, layer.dequantized(x.dtype), bias, added)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad @ ctx.layer.dequantized(grad.dtype), None, grad if ctx.needs_input_grad[2] else None


@torch.no_grad()
def quantize_layers(model: nn.Module) -> None:
    """Replace every linear layer inside the transformer layers by NF4Linear. Embeddings, lm_head and heads stay.

    In a process group the model has only shapes so far. Then every rank reads the matrices here, one at a time.

    Raises:
        ValueError: the model has experts, or bitsandbytes is absent.
    """
    if model.config.num_experts:
        raise ValueError("lora.base=nf4 does not support experts, which are most of this model; use lora.base=file")
    layers = model.transformer.layers
    for name, linear in [(n, m) for n, m in layers.named_modules() if isinstance(m, Linear)]:
        if isinstance(linear, NF4Linear):
            continue
        weight = linear.weight.detach()
        if weight.is_meta:
            pieces = [model.source.read(part) for part in parts_of(f"transformer.layers.{name}.weight", model.config)]
            weight = torch.cat(pieces).to(weight.dtype)
        layers.set_submodule(name, NF4Linear(linear, weight))
