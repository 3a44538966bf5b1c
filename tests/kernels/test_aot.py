"""Every Triton kernel compiles for four GPUs at every block its table can choose, without a spill."""

import pytest
import torch

from bench.kernels.ahead_of_time import ARCHS, capture
from kernels import backend, gae, logprob
from kernels.clips import Clips
from kernels.fold_triton import BLOCKS
from kernels.gated import gated_backward, gated_forward
from kernels.logprob import ReferenceInputs, linear_logprob
from kernels.norm import MAX_WIDTH, add_rms_norm_backward, add_rms_norm_forward
from kernels.ppo import ppo_triton
from kernels.rotary import rotary_backward, rotary_forward

pytestmark = pytest.mark.aot


@pytest.fixture(autouse=True)
def triton_on_cpu_tensors(monkeypatch):
    monkeypatch.setattr(backend, "_choice", "triton")  # nothing runs: `capture` compiles what would be launched


def launch_logprob(width, dtype, everything):
    hidden = torch.randn(3, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(width, 16, dtype=dtype, requires_grad=True)
    settings = {"softcap": 30.0, "entropy": True, "reference": ReferenceInputs(hidden, weight)} if everything else {}
    out = linear_logprob(hidden, weight, torch.zeros(3, dtype=torch.int64), **settings)
    sum(x.sum() for x in (out if everything else (out,))).backward()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("width", [*BLOCKS, max(BLOCKS) + 1])  # a full block each, and a row of several
def test_the_folds_do_not_spill(arch, width, monkeypatch):
    monkeypatch.setitem(logprob.TILES, "cpu", 2 * max(BLOCKS))
    with capture(arch) as rows:
        launch_logprob(width, torch.bfloat16, everything=True)
        launch_logprob(width, torch.bfloat16, everything=False)
        launch_logprob(width, torch.float32, everything=True)
    assert {row["kernel"] for row in rows} == {"_fold_kernel", "_unfold_kernel"}
    assert [row["spills"] for row in rows] == [0] * len(rows) and len(rows) >= 6


@pytest.mark.parametrize("arch", ARCHS)
def test_ppo_and_gae_do_not_spill(arch):
    floats = [torch.randn(4, 600, requires_grad=i in (0, 3)) for i in range(6)]
    mask = torch.ones(4, 600, dtype=torch.bool)
    with capture(arch) as rows:
        for clips in (Clips(0.2, 3.0, 0.2, 0.1), Clips(0.2, None, None, 0.1)):
            ppo_triton(*floats[:3], mask, *floats[3:], mask, clips=clips, num_tokens=9.0, num_states=9.0)[0].backward()
        for T in [1 << power for power in range(gae.MAX_BLOCK.bit_length())]:
            x = torch.randn(1, T)
            gae.gae(x, x, x > 0, gamma=0.99, gae_lambda=0.95)
    assert {row["kernel"] for row in rows} == {"_forward_kernel", "_backward_kernel", "_gae_kernel"}
    assert [row["spills"] for row in rows] == [0] * len(rows)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_norms_do_not_spill(arch):
    with capture(arch) as rows:
        for D in (128, 512, 2048, MAX_WIDTH):
            x, delta, weight = torch.randn(2, D), torch.randn(2, D, dtype=torch.bfloat16), torch.randn(D)
            for added in (delta, None):
                add_rms_norm_forward(x, added, weight, 1e-5, 0.0, torch.bfloat16)
                grads = (delta, x, 0.0, torch.bfloat16) if added is not None else (delta, None, 0.0, None)
                add_rms_norm_backward(x, weight, torch.ones(2), *grads)
    assert {row["kernel"] for row in rows} == {"_forward_kernel", "_backward_kernel"}
    assert [row["spills"] for row in rows] == [0] * len(rows)


@pytest.mark.parametrize("arch", ARCHS)
def test_rotation_and_gates_do_not_spill(arch):
    with capture(arch) as rows:
        for head_dim, rotated in ((64, 64), (128, 128), (256, 256), (256, 64)):
            qkv, angles = torch.randn(2, 4 * head_dim, dtype=torch.bfloat16), torch.randn(2, 1, rotated)
            grads = [torch.randn(2, n, head_dim, dtype=torch.bfloat16) for n in (2, 1, 1)]
            for weight in (None, torch.randn(head_dim)):
                settings = (angles, angles, weight, weight, 1e-5, 0.0)
                rotary_forward(qkv, *settings, 2, 1)
                rotary_backward(qkv, *settings, *grads)
        for gelu in (False, True):
            gate_up, grad = torch.randn(2, 4096, dtype=torch.bfloat16), torch.randn(2, 2048, dtype=torch.bfloat16)
            gated_forward(gate_up, gelu), gated_backward(gate_up, grad, gelu)
    assert [row["spills"] for row in rows] == [0] * len(rows) and len(rows) >= 20
