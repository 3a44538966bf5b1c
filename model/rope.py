"""Rotary position embeddings: the frequencies of the rotated pairs. Su et al. 2021 (arXiv:2104.09864)."""

import math

import torch
from torch import Tensor

from model.config import ModelConfig


class Rope:
    """The angles for the tokens of a forward. They are no buffers: a model in bf16 must keep them in float32."""

    def __init__(self, config: ModelConfig, *, of_windows: bool = False):
        """of_windows: for the layers with a sliding window, which may have another base."""
        base = config.window_rope_theta if of_windows else None
        self.frequencies, self.gain = rope_frequencies(config) if base is None else (turns(config, base), 1.0)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin for `rotate`. Angles are computed in float32: bf16 has no exact whole numbers above 256."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        angles = (positions[:, None].float() * self.frequencies)[:, None]  # (N, 1, R / 2)
        cos, sin = angles.cos() * self.gain, angles.sin() * self.gain
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def turns(config: ModelConfig, theta: float) -> Tensor:
    """(R / 2,) float32 radians per position, unscaled. R is the number of rotated dimensions of a head."""
    size = config.rotary_dim
    return 1.0 / (theta ** (torch.arange(0, size, 2, device="cpu").float() / size))


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """(R / 2,) float32 radians per position, and the factor on cos and sin (YaRN's attention temperature)."""
    frequencies, scaling = turns(config, config.rope_theta), config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"], 1.0
    if scaling["rope_type"] == "llama3":
        return llama3_frequencies(frequencies, scaling), 1.0
    if scaling["rope_type"] == "longrope":
        return frequencies / torch.tensor(scaling["short_factor"], device="cpu"), longrope_gain(scaling)
    return yarn_frequencies(frequencies, config), yarn_gain(scaling)


def llama3_frequencies(frequencies: Tensor, scaling: dict) -> Tensor:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, a linear blend between."""
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the old window
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / scaling["factor"] + keep * frequencies


def yarn_frequencies(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """YaRN, Peng et al. 2023 (arXiv:2309.00071), section 3.2: blend by the number of turns within the old window."""
    scaling = config.rope_scaling

    def dimension(turns: float) -> float:  # the (real-valued) pair index that makes `turns` turns
        old = scaling["original_max_position_embeddings"]
        return config.rotary_dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotary_dim - 1)
    pairs = torch.arange(config.rotary_dim // 2, device="cpu").float()
    stretch = ((pairs - low) / (high - low or 0.001)).clamp(0, 1)
    return stretch * frequencies / scaling["factor"] + (1 - stretch) * frequencies


def yarn_gain(scaling: dict) -> float:
    """The factor on cos and sin that makes attention sharper on stretched windows: 0.1 ln(factor) + 1."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return temperature(scaling["mscale"]) / temperature(scaling["mscale_all_dim"])
    return temperature(1.0)


def longrope_gain(scaling: dict) -> float:
    """The factor on cos and sin. Ding et al. 2024 (arXiv:2402.13753), section 4.2."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    stretch = math.log(max(scaling["factor"], 1.0)) / math.log(scaling["original_max_position_embeddings"])
    return math.sqrt(1 + stretch)
