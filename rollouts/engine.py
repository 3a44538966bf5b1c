"""Engines produce rollouts. An engine answers prompts; the code of the rollout is the same for one turn or many."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

from advantages import importance_weights
from model.heads import Policy
from rollouts.ahead import Ahead
from rollouts.environment import Dialogue, SingleTurn
from rollouts.local import Local
from rollouts.server import ENGINES, Server
from rollouts.trajectory import Trajectory, make_trajectory
from runtime.metrics import masked
from runtime.seeds import seed_of
from runtime.shares import number_of


class Engine:
    """Rollouts of a policy, for training and for evaluation.

    Args:
        run: the run of this rank. sampler: writes the policy's turns. environment: writes the messages between them.
        seed: of the run. score_position: as in `make_trajectory`. ahead: whether the rollout of the next step is drawn
            during the updates of this step.
    """

    def __init__(
        self,
        run,
        tokenizer,
        sampler: Local | Server,
        environment: SingleTurn | Dialogue,
        *,
        seed: int,
        score_position: str,
        ahead: bool,
    ):
        self.run, self.tokenizer, self.sampler, self.environment = run, tokenizer, sampler, environment
        self.seed, self.score_position, self.ahead = seed, score_position, Ahead(self, ahead)

    @contextmanager
    def ready(self, policy: Policy) -> Iterator[None]:
        """Inside this block the engine samples from the current policy. All ranks must enter it."""
        self.ahead.wait()  # a rollout that is being sampled uses the weights with which it began
        with self.sampler.ready(policy):
            yield

    def rollout(
        self, policy: Policy, prompts: list[dict], *, step: int, batch: int = 0, samples_per_prompt: int = 1
    ) -> Trajectory:
        """Sample answers to this rank's prompts while the engine is `ready`. Samples of one prompt are consecutive.

        The random numbers of a row depend on the seed, the step, the batch of the step (if there are several), the
        prompt's number among all ranks' prompts and the sample's number. So the trajectory does not depend on the
        number of ranks.
        """
        K, rank, world_size = samples_per_prompt, self.run.rank, self.run.world_size
        prompts = [prompt for prompt in prompts for _ in range(K)]
        numbers = [number_of(i // K, rank, world_size) * K + i % K for i in range(len(prompts))]
        first = len(numbers) * world_size * batch  # number of the first row of this batch of the step
        seeds = [(self.seed, "rollout", step, first + number) for number in numbers]
        episodes = self.environment.begin(prompts)
        while active := [i for i, episode in enumerate(episodes) if not episode.over]:
            asked = [episodes[i].ids for i in active]
            place = [(*seeds[i], episodes[i].num_turns) if episodes[i].num_turns else seeds[i] for i in active]
            turns = self.sampler.answer(policy, asked, [seed_of(*parts) for parts in place])
            for i, turn in zip(active, turns, strict=True):
                episodes[i].add(turn)
            self.environment.speak([episodes[i] for i in active])
        trajectory = make_trajectory(
            episodes,
            prompts,
            pad_id=self.tokenizer.pad_id,
            device=self.run.device,
            score_position=self.score_position,
            max_new_tokens=self.sampler.sampling.max_new_tokens,
        )
        trajectory.rewards |= self.environment.rewards(episodes, trajectory)
        trajectory.step = step
        return trajectory

    def correct(
        self, advantages: Tensor, logprobs: Tensor, rollout: Trajectory, off_policy: DictConfig
    ) -> tuple[Tensor, Tensor, dict[str, Tensor | float]]:
        """`correct_for_sampler` for a rollout of this engine, at the current step."""
        own_sampler = isinstance(self.sampler, Local)
        step = self.run.step
        return correct_for_sampler(advantages, logprobs, rollout, off_policy, step=step, own_sampler=own_sampler)

    def state_dict(self) -> dict:
        """The state for a checkpoint: the rollout that was sampled ahead, if there is one."""
        return self.ahead.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.ahead.load_state_dict(state)


def load_sampler(
    engine: DictConfig, sampling: DictConfig, tokenizer, *, window: int, directory: Path, base: str
) -> Local | Server:
    """What writes the policy's turns: this process, or the server that the config group `engine` describes.

    Args:
        window: number of tokens that the run's models can read. directory: where a server finds the policies, unless
            engine.directory names another place. base: the checkpoint that an adapter belongs to.
    Raises:
        ValueError: engine.kind is unknown, or a setting of a server is wrong. ConnectionError: the server is down.
    """
    if engine.kind == "local":
        return Local(sampling, tokenizer, window=window)
    if engine.kind not in ENGINES:
        known = ", ".join(f"engine={kind}" for kind in ("local", *ENGINES))
        raise ValueError(f"engine.kind={engine.kind!r} is unknown; use {known}")
    if not str(engine.url).startswith(("http://", "https://")):
        raise ValueError(f"engine.url={engine.url} is no address; write it like http://127.0.0.1:8000")
    directory = Path(engine.directory or directory)
    return Server(engine, sampling, tokenizer, window=window, directory=directory, base=base)


def correct_for_sampler(
    advantages: Tensor, logprobs: Tensor, rollout: Trajectory, off_policy: DictConfig, *, step: int, own_sampler: bool
) -> tuple[Tensor, Tensor, dict[str, Tensor | float]]:
    """((B, T) advantages, (B, T) old log-probs, metrics) for tokens that another program or an older policy sampled.

    off_policy.old_logprobs=trainer: ratios are relative to the policy before its updates, and a token's advantage is
    multiplied by the probability ratio of that policy to the sampler (decoupled PPO, Hilton et al. 2021,
    arXiv:2110.00641). =sampler: ratios are relative to the sampler, and only clipping bounds them. The policy's own
    sampler computes in the same precision, so its samples of this policy need no correction. The distance of its
    log-probs from those of training is logged as policy/sampler_kl in any case.

    Args:
        logprobs: (B, T) of the policy before this step's updates. off_policy: the config group.
        own_sampler: whether the policy's own code sampled.
    """
    mask, sampled, stale = rollout.action_mask, rollout.sampler_logprobs, step - rollout.step
    figures: dict[str, Tensor | float] = {"policy/staleness": float(stale)}
    if sampled is None:
        return advantages, logprobs, figures
    figures |= {"policy/sampler_kl": masked(sampled - logprobs, mask)}
    if own_sampler and not stale:
        return advantages, logprobs, figures
    if off_policy.old_logprobs == "sampler":
        return advantages, sampled, figures
    weights = importance_weights(
        logprobs, sampled, mask, correction=off_policy.correction, max_weight=off_policy.max_weight
    )
    return advantages * weights, logprobs, figures | {"policy/sampler_weight": masked(weights, mask)}
