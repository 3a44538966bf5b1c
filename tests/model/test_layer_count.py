"""What one decoder layer would launch and move on a GPU, in training and in decoding, counted on the meta device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from kernels.backend import HAS_TRITON
from model import transformer
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.linear import Linear

N, D, F = 8192, 2048, 8192
NO_LAUNCH = (
    "view", "expand", "transpose", "t", "detach", "unsqueeze", "split", "split_with_sizes", "slice", "alias", "empty",
    "empty_like", "new_empty", "unflatten", "flatten", "select", "permute", "_unsafe_view", "as_strided",
    "view_as",
)  # fmt: skip


class Count(TorchDispatchMode):
    """Launches, and the bytes of what is read and written by those that are no product."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if operator.overloadpacket.__name__ not in NO_LAUNCH:
            self.launches += 1
            if not operator.__name__.startswith("mm"):
                tensors = (x for x in tree_flatten((args, kwargs, out))[0] if isinstance(x, torch.Tensor))
                self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


class Attention(torch.autograd.Function):
    """Stands for a fused attention, which is counted on its own."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.shapes = q.shape, k.shape, v.shape
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx, grad):
        return tuple(grad.new_empty(shape) for shape in ctx.shapes)


@pytest.mark.skipif(not HAS_TRITON, reason="without Triton the torch definitions run")
def test_a_layer_launches_and_moves_little_between_its_products(monkeypatch):
    monkeypatch.setattr(transformer, "attend", lambda q, k, v, blocks, window: Attention.apply(q, k, v))
    config = ModelConfig(
        vocab_size=49152, hidden_size=D, intermediate_size=F, num_layers=2, num_heads=32, num_kv_heads=32, head_dim=64,
        max_length=8192, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        layer = transformer.Transformer(config, torch.bfloat16).layers[0]
        x, grad = torch.zeros(N, D, requires_grad=True), torch.zeros(N, D)
        rope = (torch.zeros(N, 1, 64, dtype=torch.bfloat16),) * 2
    counts = []
    for _ in range(2):  # the first forward after an optimizer step casts the weights
        with Count() as count:
            layer(x, rope, None, None, True, None).backward(grad)
        counts.append((count.launches, count.bytes))
        layer.zero_grad()
        x.grad = None
    assert counts[0][0] <= 45 and counts[0][1] <= 3.2e9
    casts = 6 * (4 * D * D + 3 * D * F)  # four bytes read and two written for each weight of the four products
    assert (counts[0][0] - counts[1][0], counts[0][1] - counts[1][1]) == (4, casts)


@pytest.mark.skipif(not HAS_TRITON, reason="without Triton the torch definitions run")
def test_a_decoding_step_launches_twelve_kernels_a_layer():
    launches = []
    for layers in (
        1,
        2,
    ):  # the difference is one layer's; captured, all of them are one launch (model/decode_graphs.py)
        config = ModelConfig(
            vocab_size=1000, hidden_size=D, intermediate_size=F, num_layers=layers, num_heads=32, num_kv_heads=8,
            head_dim=64, max_length=8192, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True,
        )  # fmt: skip
        with torch.device("meta"):
            model = transformer.Transformer(config, torch.bfloat16)
        with torch.device("meta"), torch.inference_mode():
            for part in model.modules():
                if isinstance(part, Linear):
                    part.prepare(torch.bfloat16, 64, True)
            for rope in model.ropes.values():
                rope.frequencies = rope.frequencies.to("meta")
            cache = KVCache(config, slots=64, length=1024, dtype=torch.bfloat16, device="meta")
            tokens = positions = torch.zeros(64, dtype=torch.int64)
            with Count() as count:
                model(tokens, positions, None, cache.decode(positions, [(slice(0, 64), 512)]))
        launches.append(count.launches)
    assert launches[1] - launches[0] <= 12
