"""Updates of the value model only."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from losses import ppo_value_loss
from rollouts.trajectory import Trajectory
from runtime.devices import send
from runtime.optim import clip_grads
from runtime.run import Run


@dataclass(frozen=True)
class ValueEpochs:
    """The value model's own passes over a rollout, before the policy learns from it.

    epochs: 0 if the value model learns together with the policy.
    """

    epochs: int
    minibatch_size: int  # rows of an optimizer step, over all ranks
    micro_batch_size: int  # rows of a forward, per rank
    samples_per_prompt: int
    clip_range: float | None
    coef: float
    max_grad_norm: float | None

    def update(
        self,
        run: Run,
        value_model: nn.Module,
        optimizer: Optimizer,
        rollout: Trajectory,
        old_values: Tensor,
        returns: Tensor,
    ) -> None:
        """Train the value model on the (B, T) returns, with values clipped around the (B, T) old values.

        The policy has no gradient here, so the shared optimizer does not change it.
        """
        mask = rollout.value_mask
        for minibatch in run.minibatches(len(mask), self.epochs, self.minibatch_size, self.samples_per_prompt):
            num_states = run.mean(mask[send(minibatch, run.device)].sum().float()).clamp_min(1)
            minibatch, row_sums = minibatch.sort().values, []
            for part in map(rollout.part, minibatch.split(self.micro_batch_size)):
                rows, values = part.index, value_model(*part.states)  # (b, T)
                loss, metrics = ppo_value_loss(
                    values,
                    old_values[rows],
                    returns[rows],
                    mask[rows],
                    clip_range=self.clip_range,
                    num_tokens=num_states,
                )
                (self.coef * loss).backward()
                run.metrics.add(metrics)
                row_sums.append(values.detach().sum(1))
            norm = clip_grads(value_model, self.max_grad_norm)
            run.stop_if_not_finite(norm, torch.cat(row_sums), [rollout.where[i] for i in minibatch.tolist()])
            optimizer.step()
            optimizer.zero_grad()
            run.metrics.add({"value/grad_norm": norm})
