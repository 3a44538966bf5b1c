"""The hand-written backward passes of model/functions.py and model/attention.py against definitions and differences."""

import pytest
import torch
from torch.autograd import gradcheck

from model.attention import BlockAttention
from model.functions import CastLinear, rms_norm, rotate, swiglu
from model.packing import make_rows, pack

F64 = torch.float64


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


@pytest.mark.parametrize("shape", [(5, 7), (3, 2, 8), (1, 1)])
def test_rms_norm_is_its_definition_and_its_gradient_the_difference_quotient(shape):
    x, weight, eps = randn(*shape), randn(shape[-1]), 1e-3
    expected = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, eps, F64), expected, rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda x, weight: rms_norm(x, weight, eps, F64), (x, weight))


def test_swiglu_is_its_definition_and_its_gradient_the_difference_quotient():
    gate_up = randn(4, 10)
    gate, up = gate_up[:, :5], gate_up[:, 5:]
    torch.testing.assert_close(swiglu(gate_up), gate / (1 + (-gate).exp()) * up, rtol=1e-12, atol=1e-12)
    assert gradcheck(swiglu, gate_up)


def test_rotation_multiplies_by_a_complex_number_and_its_gradient_turns_back():
    x, angles = randn(5, 2, 6), randn(5, 1, 3).detach()
    cos, sin = 1.2 * angles.cos(), 1.2 * angles.sin()  # a factor on both, as YaRN has
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.complex(cos, sin)
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(rotate(x, cos, sin), expected, rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda x: rotate(x, cos, sin), x)


def test_a_cast_product_has_the_gradients_of_a_product():
    x, weight, bias = randn(4, 3), randn(5, 3), randn(5)
    assert gradcheck(lambda x, weight, bias: CastLinear.apply(x, weight, weight.detach(), bias), (x, weight, bias))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [2, 6])
def test_attention_over_blocks_has_the_gradients_of_difference_quotients(heads, window, monkeypatch):
    """Two answers on a shared prompt and a second block; tiles of 4 queries, so that keys lie under several tiles."""
    monkeypatch.setattr("model.attention.CHUNK", 4)
    prompt = [5, 6, 7]
    rows = [
        {"input_ids": prompt + answer, "completion_mask": [False] * 3 + [True] * len(answer)}
        for answer in ([8, 9], [1, 2, 3])
    ]
    rows.append({"input_ids": [4, 5, 6, 7, 8], "completion_mask": [False] * 4 + [True]})
    stream = pack(*make_rows(rows, pad_id=0))
    N = len(stream.tokens)
    assert len(stream.blocks.spans) < len(rows)  # the prompt is shared
    q, k, v = randn(N, heads, 2), randn(N, 2, 2), randn(N, 2, 2)
    assert gradcheck(lambda q, k, v: BlockAttention.apply(q, k, v, stream.blocks, window), (q, k, v))


def test_in_bfloat16_gradients_are_no_worse_than_those_of_autograd():
    """Distance to float64: the hand-written norm and SwiGLU against the same formula under autograd."""
    x, weight, gate_up, grad = randn(64, 96), randn(96), randn(64, 192), randn(64, 96).detach()

    def gradients(dtype, norm, swiglu):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, gate_up)]
        out = norm(leaves[0], leaves[1], dtype) * 0.1 + swiglu(leaves[2])
        out.backward(grad.to(dtype))
        return [leaf.grad.double() for leaf in leaves]

    def by_hand(dtype):
        return gradients(dtype, lambda x, w, dtype: rms_norm(x, w, 1e-5, dtype), swiglu)

    def by_autograd(dtype):
        def swiglu(gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up

        return gradients(dtype, lambda x, w, _: torch.nn.functional.rms_norm(x, (96,), w, 1e-5), swiglu)

    truth = by_autograd(F64)
    for ours, plain, exact in zip(by_hand(torch.bfloat16), by_autograd(torch.bfloat16), truth, strict=True):
        assert (ours - exact).norm() <= 1.1 * (plain - exact).norm()
