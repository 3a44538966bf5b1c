"""PPO's fused kernel against its definition in losses.py in float64."""

import pytest
import torch

import losses
from kernels.backend import interpreting, set_kernels
from kernels.clips import Clips
from kernels.ppo import ppo_triton
from losses import ppo_policy_loss, ppo_value_loss

pytestmark = pytest.mark.interpreter
if interpreting():
    from bench.kernels.interpreter import repair

    repair()

CLIPS = [Clips(0.2, None, 0.2, 0.1), Clips(0.1, 1.5, None, 1.0, 0.25)]


def minibatch(B, T, dtype=torch.float32):
    """logprobs, old_logprobs, advantages, mask, values, old_values, returns, value_mask; nan where nothing counts."""
    generator = torch.Generator().manual_seed(0)
    logprobs, old_logprobs, advantages, values, old_values, returns = torch.randn(6, B, T, generator=generator)
    old_logprobs = logprobs + 0.3 * old_logprobs  # ratios on both sides of the clip
    old_values = values + 0.3 * old_values
    mask, value_mask = (torch.rand(B, T, generator=generator) > 0.3 for _ in range(2))
    mask[0, 0] = value_mask[0, 0] = True
    policy = [x.where(mask, torch.nan).to(dtype) for x in (logprobs, old_logprobs, advantages)]
    value = [x.where(value_mask, torch.nan).to(dtype) for x in (values, old_values, returns)]
    policy[0].requires_grad_(), value[0].requires_grad_()
    return [*policy, mask, *value, value_mask]


def by_definition(inputs, clips, num_tokens, num_states):
    policy, values = inputs[:4], inputs[4:]
    dual = {"dual_clip": clips.dual, "clip_range_high": clips.policy_high}
    policy_loss, metrics = ppo_policy_loss(*policy, clip_range=clips.policy, num_tokens=num_tokens, **dual)
    value_loss, value_metrics = ppo_value_loss(*values, clip_range=clips.value, num_tokens=num_states)
    return policy_loss + clips.value_coef * value_loss, metrics | value_metrics


def as_double(inputs):
    exact = [x if x.dtype == torch.bool else x.detach().double() for x in inputs]
    exact[0].requires_grad_(), exact[4].requires_grad_()
    return exact


@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, T", [(1, 1), (3, 7), (9, 129)])
def test_loss_metrics_and_gradients_are_as_exact_as_torch(B, T, dtype, clips):
    inputs = minibatch(B, T, dtype)
    exact = as_double(inputs)
    loss, metrics = ppo_triton(*inputs, clips=clips, num_tokens=1000.0, num_states=torch.tensor(500.0))
    truth, true_metrics = by_definition(exact, clips, 1000.0, 500.0)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-7)
    for name, (total, count) in metrics.items():
        assert count == true_metrics[name].count
        torch.testing.assert_close(total.double(), true_metrics[name].total, rtol=1e-5, atol=1e-5, msg=name)

    grads = torch.autograd.grad(loss, (inputs[0], inputs[4]))
    true_grads = torch.autograd.grad(truth, (exact[0], exact[4]))
    rounding = torch.finfo(dtype).eps  # the gradient is rounded once, to the input's dtype
    for grad, true_grad, mask in zip(grads, true_grads, (inputs[3], inputs[7]), strict=True):
        torch.testing.assert_close(grad.double(), true_grad, rtol=max(rounding, 1e-5), atol=1e-9)
        assert not grad[~mask].any()


def test_the_gradient_of_the_loss_scales_the_gradients():
    inputs = minibatch(3, 400)
    loss = [ppo_triton(*inputs, clips=CLIPS[0], num_tokens=10.0, num_states=10.0)[0] for _ in range(2)]
    once = torch.autograd.grad(loss[0], (inputs[0], inputs[4]))
    thrice = torch.autograd.grad(3 * loss[1], (inputs[0], inputs[4]))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_a_second_backward_is_refused():
    inputs = minibatch(3, 7)
    loss, _ = ppo_triton(*inputs, clips=CLIPS[0], num_tokens=10.0, num_states=10.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_shapes_that_differ_are_named():
    inputs = minibatch(3, 7)
    inputs[2] = inputs[2][:2]
    with pytest.raises(ValueError, match=r"\(2, 7\), \(3, 7\)"):
        ppo_triton(*inputs, clips=CLIPS[0], num_tokens=10.0, num_states=10.0)


def test_an_edited_definition_is_not_replaced_in_silence(monkeypatch):
    """The kernel computes the clipped loss; a definition that was edited meanwhile stops the run and is named."""
    inputs = minibatch(3, 7)
    inputs[0].data, inputs[4].data = inputs[0].data.nan_to_num(), inputs[4].data.nan_to_num()
    terms = losses.PolicyTerms(*inputs[:4]), losses.ValueTerms(*inputs[4:])
    counts = {"num_tokens": 10.0, "num_states": 10.0}
    set_kernels("triton")
    losses.ppo_loss(*terms, CLIPS[0], **counts)  # they agree
    real = losses.ppo_policy_loss

    def edited(*tensors, **more):
        loss, metrics = real(*tensors, **more)
        return 1.1 * loss, metrics

    monkeypatch.setitem(losses.POLICY_LOSSES, "clip", edited)
    losses.ppo_loss(*terms, CLIPS[0], **counts)  # the first minibatch is over: nothing is computed twice
    set_kernels("triton")  # another run
    with pytest.raises(ValueError, match="kernel of losses.py and its definition .* kernels=torch"):
        losses.ppo_loss(*terms, CLIPS[0], **counts)
    set_kernels("torch")
    losses.ppo_loss(*terms, CLIPS[0], **counts)
    set_kernels("auto")
