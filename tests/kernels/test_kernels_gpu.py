"""On a CUDA device: the compiled kernels and the library products against the definitions in float64."""

import pytest
import torch

from kernels.clips import Clips
from kernels.gae import gae, gae_ref
from kernels.logprob import ReferenceInputs, linear_logprob, linear_logprob_ref
from kernels.ppo import ppo_triton
from losses import ppo_policy_loss, ppo_value_loss

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.mark.parametrize("softcap, temperature", [(None, 1.0), (30.0, 0.7)])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M, D, V", [(1, 7, 129), (129, 507, 40001)])  # 40,001 takes three tiles
def test_the_log_prob_is_as_exact_as_torch(M, D, V, hidden_dtype, weight_dtype, softcap, temperature):
    torch.manual_seed(0)
    hidden = torch.randn(M, D, device=DEVICE, dtype=hidden_dtype).requires_grad_()
    weight = torch.randn(V, D, device=DEVICE, dtype=weight_dtype).mul_(D**-0.5).requires_grad_()
    reference = ReferenceInputs(torch.randn_like(hidden), weight.detach())
    targets = torch.randint(0, V, (M,), device=DEVICE)

    def run(function, hidden, weight, reference):
        settings = {"temperature": temperature, "softcap": softcap, "entropy": True, "reference": reference}
        out = function(hidden, weight, targets, **settings)
        return [*out, *torch.autograd.grad(sum(x.sum() for x in out), (hidden, weight))]

    double = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = run(linear_logprob_ref, *double, ReferenceInputs(*(x.double() for x in reference)))
    by_torch = run(linear_logprob_ref, hidden, weight, reference)
    for exact, other, got in zip(truth, by_torch, run(linear_logprob, hidden, weight, reference), strict=True):
        allowed = 2 * (other - exact).abs().max() + 5e-6 * (1 + exact.abs().max())
        assert (got - exact).abs().max() <= allowed


def test_the_scan_is_as_exact_as_the_loop():
    rewards, values = torch.randn(2, 17, 2500, device=DEVICE)
    mask = torch.rand(17, 2500, device=DEVICE) > 0.2
    truth = gae_ref(rewards.double(), values.double(), mask, 0.99, 0.95)
    scanned = gae(rewards, values, mask, gamma=0.99, gae_lambda=0.95)
    torch.testing.assert_close(scanned.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_ppo_has_the_loss_and_gradients_of_its_definition(scale):
    tensors = torch.randn(6, 33, 129, device=DEVICE).unbind()
    logprobs, values = tensors[0].clone().requires_grad_(), tensors[3].clone().requires_grad_()
    policy, value = (logprobs, logprobs.detach() + 0.3 * tensors[1], tensors[2]), (values, tensors[4], tensors[5])
    mask = torch.rand(33, 129, device=DEVICE) > 0.3
    clips = Clips(policy=0.2, dual=3.0, value=0.2, value_coef=0.1)
    loss, _ = ppo_triton(*policy, mask, *value, mask, clips=clips, num_tokens=100.0, num_states=100.0)
    true_policy, _ = ppo_policy_loss(*policy, mask, clip_range=0.2, dual_clip=3.0, num_tokens=100.0)
    true_value, _ = ppo_value_loss(*value, mask, clip_range=0.2, num_tokens=100.0)
    truth = true_policy + 0.1 * true_value
    torch.testing.assert_close(loss, truth, rtol=1e-4, atol=1e-5)
    inputs = (logprobs, values)
    grads, true_grads = torch.autograd.grad(scale * loss, inputs), torch.autograd.grad(scale * truth, inputs)
    torch.testing.assert_close(grads, true_grads, rtol=1e-4, atol=1e-7)
