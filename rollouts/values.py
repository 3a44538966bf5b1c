"""Updates of the value model only."""

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from losses import ppo_value_loss
from rollouts.trajectory import Trajectory
from runtime.devices import send
from runtime.optim import clip_grads
from runtime.run import Run


def teach_values(
    cfg: DictConfig,
    run: Run,
    value_model: nn.Module,
    optimizer: Optimizer,
    rollout: Trajectory,
    old_values: Tensor,
    returns: Tensor,
) -> None:
    """value_epochs passes over the rollout in minibatches of value_minibatch_size rows. null: no passes, because the
    value model learns together with the policy. The policy has no gradient here, so the shared optimizer does not
    change it.

    Args:
        old_values, returns: (B, T).
    """
    mask, size = rollout.value_mask, cfg.value_minibatch_size or cfg.minibatch_size
    for minibatch in run.minibatches(len(mask), cfg.value_epochs or 0, size, cfg.samples_per_prompt):
        num_states = run.mean(mask[send(minibatch, run.device)].sum().float()).clamp_min(1)
        minibatch, row_sums = minibatch.sort().values, []
        for part in map(rollout.part, minibatch.split(cfg.micro_batch_size)):
            rows, values = part.index, value_model(*part.states)  # (b, T)
            loss, metrics = ppo_value_loss(
                values,
                old_values[rows],
                returns[rows],
                mask[rows],
                clip_range=cfg.value_clip_range,
                num_tokens=num_states,
            )
            (cfg.value_coef * loss).backward()
            run.metrics.add(metrics)
            row_sums.append(values.detach().sum(1))
        norm = clip_grads(value_model, cfg.optim.max_grad_norm)
        run.stop_if_not_finite(norm, torch.cat(row_sums), [rollout.where[i] for i in minibatch.tolist()])
        optimizer.step()
        optimizer.zero_grad()
        run.metrics.add({"value/grad_norm": norm})
