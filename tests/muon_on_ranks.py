"""Three Muon steps on drawn gradients, split over the ranks and whole on each: matrices end with the same bits.

Prints how many matrices this rank made orthogonal for the split model, and how many numbers they have.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from omegaconf import OmegaConf
from torch.distributed.tensor import distribute_tensor

from model.build import new_policy
from runtime import muon
from runtime.distributed import shard_model, start_ranks, stop_ranks, whole
from runtime.optim import build_optimizer
from tests.tiny_models import tiny_config

SHAPES = dict(hidden_size=20, intermediate_size=33)  # rows that two ranks share unevenly
OPTIM = dict(kind="muon", lr=0.01, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, momentum=0.95, max_grad_norm=1.0,
             schedule="constant", warmup_steps=0, min_lr_ratio=0.0, num_steps=3)  # fmt: skip


def main() -> None:
    _, _, device = start_ranks("fsdp")
    alone = new_policy(tiny_config(**SHAPES), seed=0)
    model = shard_model(new_policy(tiny_config(**SHAPES), seed=0), device, shard_size=None, cpu_offload=False)
    one, split = (build_optimizer(m, OmegaConf.create(OPTIM)) for m in (alone, model))
    generator, made, orthogonal = torch.Generator().manual_seed(0), [], muon.orthogonal
    for _ in range(3):
        for a, b in zip(alone.parameters(), model.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = distribute_tensor(a.grad, b.device_mesh, b.placements)
        muon.orthogonal = lambda matrix: made.append(matrix.numel()) or orthogonal(matrix)
        split.step()
        muon.orthogonal = orthogonal
        one.step()
    for (name, a), b in zip(alone.named_parameters(), model.parameters(), strict=True):
        close = torch.equal if ".layers." in name and a.ndim == 2 else torch.allclose  # AdamW's kernel: the last bit
        assert close(a, whole(b)), name
    print(f"made {len(made)} {sum(made)}", flush=True)


if __name__ == "__main__":
    main()
    stop_ranks()
