"""GPT-OSS's experts as they are published: MXFP4 blocks, read as float32 matrices.

A block is 32 numbers of four bits, two in a byte, the lower half first, under one power of two (OCP Microscaling 1.0).
"""

import torch
from torch import Tensor

HALVES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
VALUES = torch.cat((HALVES, -HALVES))  # sign, two bits of exponent, one of mantissa


def dequantise(blocks: Tensor, scales: Tensor) -> Tensor:
    """(E, in, out) float32 of blocks (E, out, in / 32, 16) uint8 and scales (E, out, in / 32) uint8, exponent + 127."""
    pairs = torch.stack((VALUES[(blocks & 15).long()], VALUES[(blocks >> 4).long()]), dim=-1)  # (E, out, G, 16, 2)
    numbers = torch.ldexp(pairs.flatten(-2), scales.int()[..., None] - 127)
    return numbers.flatten(-2).transpose(1, 2).contiguous()
