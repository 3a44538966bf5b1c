"""Evaluation on held-out prompts, sampled by the engine of the training with the same seeds each time."""

import torch
from omegaconf import DictConfig

from model.heads import Policy
from rollouts.engine import Engine
from rollouts.monitor import Monitor
from rollouts.parts import of_actions
from rollouts.rewards import Scorer
from rollouts.viewer import answer_samples
from runtime.distributed import gathered
from runtime.run import Run
from runtime.shares import share


@torch.no_grad()
def evaluate_policy(
    cfg: DictConfig,
    run: Run,
    policy: Policy,
    ref_policy: Policy,
    engine: Engine,
    score: Scorer,
    monitor: Monitor,
    held_out: list[dict],
    *,
    step: int,
) -> None:
    """Log score, exact KL and length of the answers to the held-out prompts, and the first few as texts."""
    if not held_out or not run.due(cfg.eval_every, step):
        return
    own = [held_out[number] for number in share(len(held_out), run.rank, run.world_size)]
    rollout, scores, kl = None, torch.zeros(0, device=run.device), torch.zeros(0, device=run.device)
    readers = filter(None, (policy, ref_policy, score.reward_model))
    with run.off_the_clock(), gathered(*readers), engine.ready(policy):
        if own:  # with more ranks than held-out prompts, some ranks have none
            rollout = engine.rollout(policy, own, step=0)
            parts = rollout.parts(cfg.micro_batch_size)
            scores = score(rollout, parts).sum(1)
            settings = {"temperature": cfg.sampling.temperature}
            kl = of_actions(lambda *rows, **more: policy.exact_kl(ref_policy, *rows, **more), parts, **settings).sum(1)
            figures = {"kl": kl, "length": rollout.action_mask.sum(1), "truncated": ~rollout.finished}
            figures |= {"score": scores[rollout.judged]}
            figures |= {f"reward/{name}": rewards.sum(1)[rollout.judged] for name, rewards in rollout.rewards.items()}
            run.metrics.add({f"eval/{name}": value for name, value in figures.items()})
            run.log_samples(answer_samples(rollout, engine.tokenizer, scores, kl, count=cfg.num_samples), step)
            scores = scores[rollout.judged]
        run.metrics.add(monitor.evaluated(step, rollout, scores, kl, last=step == cfg.num_steps))
    if step == 0:
        run.log_metrics(step=0)
