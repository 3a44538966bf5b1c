"""The log-prob sweep against its definition in float64: the torch fold everywhere, Triton's in the interpreter."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import logprob
from kernels.backend import interpreting, set_kernels, use_triton
from kernels.logprob import ReferenceInputs, linear_kl, linear_logprob, linear_logprob_ref

if interpreting():
    from bench.kernels.interpreter import repair

    repair()

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SHAPES = [(1, 1, 1), (1, 7, 129), (7, 33, 1000), (129, 12, 77)]  # (M, D, V): odd, and no multiple of a tile


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def kernels(request):
    set_kernels(request.param)
    yield request.param
    set_kernels("auto")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setitem(logprob.TILES, "cpu", 300)  # so that a small vocabulary takes several tiles and a rest


def problem(M, D, V, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(M, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    targets = torch.randint(0, V, (M,), generator=generator)
    reference = ReferenceInputs(
        torch.randn(M, D + 1, generator=generator).to(dtype), torch.randn(V, D + 1, generator=generator).to(dtype)
    )
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, reference


def run(function, hidden, weight, targets, **settings):
    """Every output, then the gradients of a fixed mixture of them to hidden and weight."""
    out = function(hidden, weight, targets, **settings)
    out = out if isinstance(out, tuple) else (out,)
    mixture = sum((x * torch.linspace(-1, 2, len(x), dtype=x.dtype)).sum() * (i + 1) for i, x in enumerate(out))
    return [x.detach() for x in out] + list(torch.autograd.grad(mixture, (hidden, weight)))


def assert_no_worse_than_torch(hidden, weight, targets, reference=None, **settings):
    double = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    double_reference = None if reference is None else ReferenceInputs(*(x.double() for x in reference))
    truth = run(linear_logprob_ref, *double, targets, reference=double_reference, **settings)
    by_torch = run(linear_logprob_ref, hidden, weight, targets, reference=reference, **settings)
    ours = run(linear_logprob, hidden, weight, targets, reference=reference, **settings)
    for name, exact, other, got in zip(range(len(truth)), truth, by_torch, ours, strict=True):
        allowed = 2 * (other - exact).abs().max() + 2e-6 * (1 + exact.abs().max())
        error = (got - exact).abs().max()
        assert error <= allowed, f"result {name}: error {error:.2e}, torch's with a margin {allowed:.2e}"


@DTYPES
@pytest.mark.parametrize("M, D, V", SHAPES)
def test_log_probs_and_gradients_are_as_exact_as_torch(kernels, M, D, V, dtype):
    assert_no_worse_than_torch(*problem(M, D, V, dtype)[:3])


@DTYPES
@pytest.mark.parametrize("M, D, V", SHAPES)
def test_entropy_and_kl_are_as_exact_as_torch(kernels, M, D, V, dtype):
    assert_no_worse_than_torch(*problem(M, D, V, dtype), entropy=True)


@DTYPES
@pytest.mark.parametrize("temperature", [0.1, 10.0])
@pytest.mark.parametrize("softcap", [None, 5.0, 30])
def test_temperature_and_softcap_are_as_exact_as_torch(kernels, temperature, softcap, dtype):
    assert_no_worse_than_torch(*problem(7, 33, 650, dtype), entropy=True, temperature=temperature, softcap=softcap)


@DTYPES
@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_all_negative_and_huge_logits_are_as_exact_as_torch(kernels, shift, dtype):
    hidden, weight, targets, reference = problem(5, 17, 650, dtype)
    with torch.no_grad():  # one more feature that adds `shift` to every logit
        hidden[:, 0], weight[:, 0] = shift, 1.0
    assert_no_worse_than_torch(hidden, weight, targets, reference, entropy=True)


@DTYPES
def test_logits_far_apart_are_as_exact_as_torch(kernels, dtype):
    assert_no_worse_than_torch(*problem(5, 17, 650, dtype, scale=300.0)[:3], entropy=True)


@pytest.mark.parametrize("target", [0, 299, 300, 649])
def test_every_token_may_have_the_same_target_at_either_side_of_a_tile(kernels, target):
    hidden, weight, targets, _ = problem(7, 5, 650)
    assert_no_worse_than_torch(hidden, weight, torch.full_like(targets, target))


def test_a_tile_wider_than_a_block_is_folded_whole(kernels, monkeypatch):
    monkeypatch.setitem(logprob.TILES, "cpu", 9000)
    assert_no_worse_than_torch(*problem(2, 3, 9001), entropy=True)


def test_no_tokens_give_no_log_probs_and_zero_gradients(kernels):
    hidden, weight, targets, reference = problem(0, 5, 650)
    logprobs, entropy, kl, grad_hidden, grad_weight = run(
        linear_logprob, hidden, weight, targets, reference=reference, entropy=True
    )
    assert logprobs.shape == entropy.shape == kl.shape == (0,)
    assert grad_hidden.shape == (0, 5) and not grad_weight.any()


def test_a_float32_master_weight_gets_a_float32_gradient_from_bfloat16_products(kernels):
    hidden, weight, targets, _ = problem(7, 33, 650, torch.bfloat16)
    master = weight.detach().float().requires_grad_()
    got = run(linear_logprob, hidden, master, targets)
    assert got[0].dtype == got[2].dtype == torch.float32 and got[1].dtype == torch.bfloat16
    expected = run(linear_logprob, hidden, weight, targets)
    torch.testing.assert_close(got[:2], expected[:2], rtol=0, atol=0)
    torch.testing.assert_close(got[2], expected[2].float(), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_one_result_alone_has_the_gradient_it_has_among_the_others(kernels, used):
    *inputs, targets, reference = problem(7, 33, 650)
    double = [x.detach().double().requires_grad_() for x in inputs]
    double_reference = ReferenceInputs(*(x.double() for x in reference))
    out = linear_logprob(*inputs, targets, entropy=True, reference=reference)[used]
    truth = linear_logprob_ref(*double, targets, entropy=True, reference=double_reference)[used]
    exact = torch.autograd.grad(truth.sum(), double)
    for got, wanted in zip(torch.autograd.grad(out.sum(), inputs), exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_have_the_dtypes_of_what_they_belong_to(hidden_dtype, weight_dtype, device):
    hidden = torch.randn(3, 5, device=device).to(hidden_dtype).requires_grad_()
    weight = torch.randn(650, 5, device=device).to(weight_dtype).requires_grad_()
    logprobs = linear_logprob(hidden, weight, torch.zeros(3, dtype=torch.int64, device=device))
    grads = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    assert logprobs.dtype == torch.float32
    assert [x.dtype for x in grads] == [hidden_dtype, weight_dtype]


def test_kl_to_itself_is_zero_and_flat(kernels):
    hidden, weight, _, _ = problem(7, 33, 650)
    kl = linear_kl(hidden, weight, hidden.detach(), weight.detach())
    grads = torch.autograd.grad(kl.sum(), (hidden, weight))
    assert kl.abs().max() < 1e-5 and max(g.abs().max() for g in grads) < 1e-5


def test_nothing_of_all_tokens_by_all_words_is_ever_made(kernels):
    M, V = 13, 1000

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.is_floating_point()]
            Largest.elements = max([Largest.elements, *sizes])
            return out

    inputs = problem(M, 3, V)[:3]
    with Largest():
        run(linear_logprob, *inputs, entropy=True)
    assert Largest.elements <= M * logprob.TILES["cpu"] < M * V


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(kernels, frozen):
    *inputs, targets, _ = problem(7, 5, 650)
    full = torch.autograd.grad(linear_logprob(*inputs, targets).sum(), inputs)
    inputs[frozen] = inputs[frozen].detach()
    (grad,) = torch.autograd.grad(linear_logprob(*inputs, targets).sum(), inputs[1 - frozen])
    assert torch.equal(grad, full[1 - frozen])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_pass_gradcheck(softcap, monkeypatch):
    monkeypatch.setitem(logprob.TILES, "cpu", 4)
    *inputs, targets, reference = problem(3, 4, 11)
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    reference = ReferenceInputs(*(x.double() for x in reference))

    def function(hidden, weight):
        settings = {"temperature": 0.7, "softcap": softcap, "entropy": True, "reference": reference}
        return linear_logprob(hidden, weight, targets, **settings)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"targets": torch.tensor([0, 650])}, r"targets lie in \[0, 650\], outside the vocabulary \[0, 650\)"),
        ({"targets": torch.tensor([0, -100])}, r"targets lie in \[-100, 0\]"),
        ({"targets": torch.tensor([0, 1], dtype=torch.int32)}, "targets must be int64"),
        ({"targets": torch.tensor([0])}, r"targets \(1,\)"),
        ({"weight": torch.randn(650, 4)}, r"hidden \(2, 5\), weight \(650, 4\)"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"reference": ReferenceInputs(torch.randn(2, 3), torch.randn(649, 3))}, r"weight \(V=650, D'\), got"),
    ],
)
def test_bad_input_is_named(change, message):
    hidden, weight, targets, _ = problem(2, 5, 650)
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{"hidden": hidden, "weight": weight, "targets": targets} | change)


def test_a_cpu_runs_the_definition_unless_told_otherwise():
    set_kernels("auto")
    assert not use_triton(torch.zeros(1))
    with pytest.raises(ValueError, match="kernels=cuda is not one of auto, torch, triton"):
        set_kernels("cuda")
    if not torch.cuda.is_available() and not interpreting():
        with pytest.raises(ValueError, match="kernels=triton needs a GPU"):
            set_kernels("triton")
