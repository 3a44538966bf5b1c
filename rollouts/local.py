"""Turns of the policy by this process's own sampler (engine=local)."""

from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf import DictConfig

from model.heads import Policy
from model.sampling import generate
from rollouts.trajectory import Turn
from runtime.distributed import gathered


class Local:
    """The sampler of this process.

    Args:
        sampling: the config group. window: number of tokens that the run's models can read.
    """

    def __init__(self, sampling: DictConfig, tokenizer, *, window: int):
        self.sampling, self.tokenizer, self.window = sampling, tokenizer, window

    @contextmanager
    def ready(self, policy: Policy) -> Iterator[None]:
        """Full weights while the policy samples."""
        with gathered(policy):
            yield

    def answer(self, policy: Policy, prompts: list[list[int]], seeds: list[int]) -> list[Turn]:
        """One turn for each prompt. Prompts are token ids."""
        made = generate(
            policy,
            prompts,
            **self.sampling,
            stop_ids=self.tokenizer.stop_ids,
            seeds=seeds,
            pad_id=self.tokenizer.pad_id,
        )
        rows = zip(made.rows.input_ids.cpu(), made.rows.completion_mask.cpu(), strict=True)
        completions = [ids[mask].tolist() for ids, mask in rows]
        return [
            Turn(ids, logprobs, reason == "stop")
            for ids, logprobs, reason in zip(completions, made.logprobs, made.finish_reasons, strict=True)
        ]
