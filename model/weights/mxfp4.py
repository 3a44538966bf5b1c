"""Dequantise MXFP4, the published format of GPT-OSS's experts.

A block is 32 numbers of four bits and one power of two as scale. A byte holds two numbers, the lower four bits first
(OCP Microscaling 1.0).
"""

import torch
from torch import Tensor

HALVES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
VALUES = torch.cat((HALVES, -HALVES))  # sign, two bits of exponent, one of mantissa


def dequantise(blocks: Tensor, scales: Tensor) -> Tensor:
    """(E, in, out) float32 from blocks (E, out, in / 32, 16) uint8 and scales (E, out, in / 32), exponent + 127."""
    pairs = torch.stack((VALUES[(blocks & 15).long()], VALUES[(blocks >> 4).long()]), dim=-1)  # (E, out, G, 16, 2)
    numbers = torch.ldexp(pairs.flatten(-2), scales.int()[..., None] - 127)
    return numbers.flatten(-2).transpose(1, 2).contiguous()
