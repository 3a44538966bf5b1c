"""The rollout of a step, with the number of groups that it needs: DAPO's dynamic sampling."""

import torch
from torch import Tensor, nn

from data.loader import Loader
from model.heads import Policy
from rollouts.engine import Engine
from rollouts.rewards import Scorer
from rollouts.trajectory import Trajectory
from runtime.distributed import any_rank
from runtime.run import Run


def draw(
    run: Run, engine: Engine, policy: Policy, prompts: Loader, score: Scorer, samples_per_prompt: int, batches: int
) -> tuple[Trajectory, Tensor]:
    """The step's rollout, and its (B, T) rewards.

    With `batches` above 0 (the setting dynamic_sampling), groups with equal scores, which have no gradient, are
    replaced by others, from up to so many batches in total (DAPO, Yu et al. 2025, arXiv:2503.14476). Places that are
    still open are filled with groups of equal scores.
    """
    K, drawn, kept = samples_per_prompt, [], None
    if not batches:
        rollout = engine.ahead.next(policy, prompts, K, step=run.step, is_last=run.is_last_step)
        return rollout, score(rollout, learned_from=True)
    for number in range(batches):
        with engine.ready(policy):
            rollout = engine.rollout(policy, next(prompts), step=run.step, batch=number, samples_per_prompt=K)
        rewards = score(rollout, learned_from=True)
        drawn.append((rollout, rewards))
        wanted = len(rollout) // K
        scores = torch.cat([rewards.sum(1) for _, rewards in drawn]).view(-1, K)
        differ = scores.amax(1) - scores.amin(1) > 1e-6
        kept = torch.cat([differ.nonzero().flatten(), (~differ).nonzero().flatten()])[:wanted].sort().values  # groups
        if not any_rank(int(differ.sum()) < wanted, run.device):
            break
    run.metrics.add({"objective/batches_drawn": float(len(drawn)), "objective/groups_differ": differ[kept].float()})
    rows = (kept[:, None] * K + torch.arange(K, device=kept.device)).flatten()
    width = max(rollout.tokens.shape[1] for rollout, _ in drawn)
    rewards = torch.cat([nn.functional.pad(rewards, (0, width - rewards.shape[1])) for _, rewards in drawn])
    return joined([rollout for rollout, _ in drawn], engine.tokenizer.pad_id).select(rows), rewards[rows]


def joined(rollouts: list[Trajectory], pad_id: int) -> Trajectory:
    """One trajectory of all rows, as wide as the widest one."""
    width = max(rollout.tokens.shape[1] for rollout in rollouts)

    def stacked(get, fill) -> Tensor:
        return torch.cat([nn.functional.pad(get(r), (0, width - r.tokens.shape[1]), value=fill) for r in rollouts])

    known = rollouts[0].sampler_logprobs is not None
    return Trajectory(
        tokens=stacked(lambda r: r.tokens, pad_id),
        attention_mask=stacked(lambda r: r.attention_mask, False),
        action_mask=stacked(lambda r: r.action_mask, False),
        value_mask=stacked(lambda r: r.value_mask, False),
        done=stacked(lambda r: r.done, False),
        turn=stacked(lambda r: r.turn, -1),
        finished=torch.cat([r.finished for r in rollouts]),
        judged=torch.cat([r.judged for r in rollouts]),
        sampler_logprobs=stacked(lambda r: r.sampler_logprobs, 0.0) if known else None,
        prompts=[prompt for r in rollouts for prompt in r.prompts],
        step=rollouts[0].step,
        rewards={name: stacked(lambda r, name=name: r.rewards[name], 0.0) for name in rollouts[0].rewards},
    )
