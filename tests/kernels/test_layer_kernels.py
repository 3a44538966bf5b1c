"""The kernels between a layer's products against their definitions in model/functions.py in float64."""

import pytest
import torch

from kernels import backend
from kernels.backend import interpreting, kernels_as
from kernels.gated import gated_backward, gated_forward
from kernels.norm import add_rms_norm_backward, add_rms_norm_forward
from kernels.rotary import rotary_backward, rotary_forward
from model import functions
from model.packing import make_rows, pack
from model.transformer import Transformer
from tests.tiny_models import tiny_config

pytestmark = pytest.mark.interpreter
if interpreting():
    from bench.kernels.interpreter import repair

    repair()


@pytest.fixture(autouse=True)
def three_programs(monkeypatch):
    """Sums over rows are shared by three programs, so that seven rows leave one of them short."""
    monkeypatch.setattr("kernels.norm.programs", lambda device: 3)
    monkeypatch.setattr("kernels.rotary.programs", lambda device: 3)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
EPS = 1e-5


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def assert_as_exact(ours, truth, dtype):
    """One rounding to `dtype` and float32's own error."""
    tolerance = max(torch.finfo(dtype).eps, 4e-6)
    torch.testing.assert_close(ours.double(), truth, rtol=tolerance, atol=tolerance)


def norm_by_definition(x, delta, weight, offset):
    total = x if delta is None else x + delta
    return total, total / (total.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight + offset)


@DTYPES
@pytest.mark.parametrize("N, D, add, offset", [(1, 1, True, 0.0), (5, 7, False, 1.0), (7, 96, True, 1.0)])
def test_add_rms_norm_and_its_gradients(N, D, add, offset, dtype):
    x, weight = randn(N, D), randn(D, seed=1)
    delta = randn(N, D, dtype=dtype, seed=2) if add else None
    total, normed, scale = add_rms_norm_forward(x, delta, weight, EPS, offset, dtype)
    leaves = [t.double().requires_grad_() for t in (x, weight)] + ([delta.double().requires_grad_()] if add else [])
    true_total, true_normed = norm_by_definition(leaves[0], leaves[2] if add else None, leaves[1], offset)
    assert_as_exact(normed, true_normed.detach(), dtype)
    if add:
        assert_as_exact(total, true_total.detach(), torch.float32)

    grad_normed, grad_total = randn(N, D, dtype=dtype, seed=3), randn(N, D, seed=4) if add else None
    grads = (grad_normed.double(),) + ((grad_total.double(),) if add else ())
    outputs = (true_normed, true_total)[: len(grads)]
    true_grads = torch.autograd.grad(outputs, leaves, grads)
    kind = dtype if add else None
    grad, grad_delta, parts = add_rms_norm_backward(
        total if add else x, weight, scale, grad_normed, grad_total, offset, kind
    )
    for ours, true in ((grad, true_grads[0]), (parts.sum(0), true_grads[1])):
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-4 * true.abs().max().item())
    if add:
        assert_as_exact(grad_delta, grad.double(), dtype)


@DTYPES
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("N, F", [(1, 1), (3, 7), (2, 1025)])
def test_the_gate_and_its_gradient(N, F, gelu, dtype):
    gate_up, grad = randn(N, 2 * F, dtype=dtype), randn(N, F, dtype=dtype, seed=1)
    exact = gate_up.double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    activate = torch.nn.functional.gelu(gate, approximate="tanh") if gelu else torch.nn.functional.silu(gate)
    truth = activate * up
    assert_as_exact(gated_forward(gate_up, gelu), truth.detach(), dtype)
    assert_as_exact(gated_backward(gate_up, grad, gelu), torch.autograd.grad(truth, exact, grad.double())[0], dtype)


def rotary_by_definition(qkv, cos, sin, weights, offset, heads, kv_heads):
    """q, k and v, with complex numbers."""
    q, k, v = qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), 1)
    if weights is not None:
        q, k = (norm_by_definition(x, None, w, offset)[1] for x, w in zip((q, k), weights, strict=True))
    R = cos.shape[-1]
    turn = torch.complex(cos[..., R // 2 :], sin[..., R // 2 :])

    def rotate(x):
        y = torch.complex(x[..., : R // 2], x[..., R // 2 : R]) * turn
        return torch.cat((y.real, y.imag, x[..., R:]), -1)

    return rotate(q), rotate(k), v


@DTYPES
@pytest.mark.parametrize(
    "N, heads, kv_heads, head_dim, rotated, norms, offset",
    [(1, 1, 1, 2, 2, False, 0), (5, 9, 3, 8, 8, True, 1), (7, 3, 1, 12, 6, True, 0), (4, 10, 9, 20, 12, False, 0)],
)
def test_rotation_with_norms_and_its_gradients(N, heads, kv_heads, head_dim, rotated, norms, offset, dtype):
    qkv = randn(N, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = randn(N, 1, rotated // 2, seed=1)
    cos = torch.cat((angles.cos(), angles.cos()), -1).to(dtype)
    sin = torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
    weights = [randn(head_dim, seed=2), randn(head_dim, seed=3)] if norms else [None, None]
    out = rotary_forward(qkv, cos, sin, *weights, EPS, offset, heads, kv_heads)

    exact = [t.double().requires_grad_() for t in (qkv, *weights) if t is not None]
    given = exact[1:] if norms else None
    q, k, v = rotary_by_definition(exact[0], cos.double(), sin.double(), given, offset, heads, kv_heads)
    assert_as_exact(out[:, :heads], q.detach(), dtype)
    assert_as_exact(out[:, heads:], k.detach(), dtype)

    grads = [randn(N, n, head_dim, dtype=dtype, seed=s) for s, n in ((4, heads), (5, kv_heads), (6, kv_heads))]
    grads[0] = grads[0].transpose(0, 1).contiguous().transpose(0, 1)  # as attention's backward pass leaves them
    truth = torch.autograd.grad((q, k, v), exact, [g.double() for g in grads])
    grad, parts = rotary_backward(qkv, cos, sin, *weights, EPS, offset, *grads)
    tolerance = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(grad.double(), truth[0], rtol=tolerance, atol=tolerance)
    for part, true in zip(parts.sum(0), truth[1:], strict=False):
        torch.testing.assert_close(part.double(), true, rtol=1e-4, atol=1e-4 * true.abs().max().item())
    assert len(parts) == 0 or norms


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "olmo2"])
def test_a_layer_with_kernels_is_the_layer_without(family):
    """Values and every gradient of a whole stack, whose last layer computes four tokens only."""
    config = tiny_config(family, num_layers=2)
    torch.manual_seed(0)
    net, ids = Transformer(config), torch.randint(0, 97, (2, 9)).tolist()
    stream = pack(*make_rows([{"input_ids": row, "completion_mask": [False] * 9} for row in ids], pad_id=0))
    picks, results = torch.tensor([3, 8, 9, 17]), []
    for choice in ("torch", "triton"):
        net.zero_grad()
        with kernels_as(choice):
            out = net(stream.tokens, stream.positions, stream.blocks, picks=picks)
            (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in net.parameters())])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item() + 1e-7)


def test_a_kernel_does_not_replace_an_edited_definition(monkeypatch):
    gate_up = randn(3, 8)
    with kernels_as("triton"):
        functions.swiglu(gate_up)  # held to its definition, once a run
        monkeypatch.setattr(backend, "_compared", set())
        monkeypatch.setattr(
            functions._SwiGLU, "forward", lambda ctx, x: ctx.save_for_backward(x) or x[:, :4] * x[:, 4:]
        )
        with pytest.raises(ValueError, match=r"functions.py \(swiglu\).*kernels=torch"):
            functions.swiglu(gate_up)
