"""Evaluation on held-out prompts, sampled by the engine of the training with the same seeds each time."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from model.heads import Policy
from rollouts.engine import Engine
from rollouts.monitor import Monitor
from rollouts.parts import of_actions
from rollouts.rewards import Scorer
from rollouts.viewer import answer_samples
from runtime.distributed import gathered
from runtime.run import Run
from runtime.shares import share


@dataclass(frozen=True)
class Evaluation:
    """Held-out prompts, and what answers and measures them every `every` steps (0: never)."""

    run: Run
    engine: Engine
    score: Scorer
    monitor: Monitor
    prompts: Sequence[dict]
    every: int
    micro_batch_size: int
    temperature: float
    num_samples: int  # answers that are logged as texts
    num_steps: int  # of the training

    @torch.no_grad()
    def measure(self, policy: Policy, ref_policy: Policy, *, step: int) -> None:
        """Log score, exact KL and length of the answers, and the first few as texts, when the step is due."""
        run, prompts = self.run, self.prompts
        if not prompts or not run.due(self.every, step):
            return
        own = [prompts[number] for number in share(len(prompts), run.rank, run.world_size)]
        rollout, scores, kl = None, torch.zeros(0, device=run.device), torch.zeros(0, device=run.device)
        readers = filter(None, (policy, ref_policy, self.score.reward_model))
        with run.off_the_clock(), gathered(*readers), self.engine.ready(policy):
            if own:  # with more ranks than held-out prompts, some ranks have none
                rollout = self.engine.rollout(policy, own, step=0)
                parts = rollout.parts(self.micro_batch_size)
                scores = self.score(rollout, parts).sum(1)
                exact_kl = partial(policy.exact_kl, ref_policy)
                kl = of_actions(exact_kl, parts, temperature=self.temperature).sum(1)
                figures = {"kl": kl, "length": rollout.action_mask.sum(1), "truncated": ~rollout.finished}
                figures |= {"score": scores[rollout.judged]}
                figures |= {f"reward/{name}": x.sum(1)[rollout.judged] for name, x in rollout.rewards.items()}
                run.metrics.add({f"eval/{name}": value for name, value in figures.items()})
                samples = answer_samples(rollout, self.engine.tokenizer, scores, kl, count=self.num_samples)
                run.log_samples(samples, step)
                scores = scores[rollout.judged]
            run.metrics.add(self.monitor.evaluated(step, rollout, scores, kl, last=step == self.num_steps))
        if step == 0:
            run.log_metrics(step=0)
