"""activation_checkpointing=selective: the same gradients to the bit, less kept, and no matmul twice."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.backend import HAS_TRITON
from model.build import new_policy
from model.config import ModelConfig
from model.footprint import Forward, kept_bytes
from model.lora import TARGETS, add_lora
from tests.tiny_models import FAMILY, batch_of, random_ids, shaken, tiny_config

ROWS = [(random_ids(5, 0), random_ids(7, 1)), (random_ids(3, 2), random_ids(4, 3))]


class Matmuls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm", "baddbmm_")
        return operator(*args, **(kwargs or {}))


def gradients(policy, how):
    policy.transformer.checkpointing = how
    policy.zero_grad()
    with Matmuls() as matmuls:
        policy.logprobs(*batch_of(ROWS, "right")).sum().backward()
    return [p.grad.clone() for p in policy.parameters() if p.grad is not None], matmuls.count


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("family", FAMILY)
def test_gradients_keep_their_bits_and_no_matmul_runs_twice(family, rank, precision):
    policy = shaken(new_policy(tiny_config(family), seed=0, precision=precision))
    if rank:
        add_lora(policy, rank=rank, alpha=4.0, targets=TARGETS, seed=0)
        torch.manual_seed(0)
        for name, p in policy.named_parameters():
            if name.endswith("lora.B"):
                torch.nn.init.normal_(p)
    (none, matmuls), (selective, also) = gradients(policy, False), gradients(policy, "selective")
    assert len(none) > 4 and all(map(torch.equal, none, selective))
    assert matmuls == also


@pytest.mark.skipif(not HAS_TRITON, reason="without Triton the torch definitions run")
def test_the_norms_outputs_and_the_gated_activation_are_not_kept():
    rows, length, D, F = 2, 512, 1024, 2816
    config = ModelConfig(
        vocab_size=1000, hidden_size=D, intermediate_size=F, num_layers=2, num_heads=16, num_kv_heads=8, head_dim=64,
        max_length=8192, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True,
    )  # fmt: skip
    settings = dict(rows=rows, length=length, dtype=torch.bfloat16, master=torch.float32, fused_attention=True)
    kept = {how: kept_bytes(config, Forward(checkpointing=how, **settings)) for how in (False, "selective", True)}
    assert kept[False].layer - kept["selective"].layer == rows * length * 2 * (2 * D + F)
    assert kept[True].layer < kept["selective"].layer and kept["selective"].rest == kept[False].rest
