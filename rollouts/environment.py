"""Environments: what speaks between a policy's turns, and pays for them.

    class Mine:
        def reset(self, record): ...      a list of messages: what the policy is asked; record: the prompt's columns
        def step(self, messages): ...     (messages, reward, done): what is said next, [] at the end

`env=path/to/file.py:Mine` makes an object for every episode, `env={name:path/to/file.py:Mine,SETTING:VALUE}` with
arguments; those called `directory` and `max_turns` are given. The dialogue so far is a list of {"role", "content"}.
All objects live in a process of their own (`rollouts/environment_worker.py`), which is killed where it hangs.
"""

import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from data.chat import ROLES, encode_prompt
from data.prompts import WHOLE
from rollouts.environment_worker import Environments
from rollouts.own_process import OwnProcess
from rollouts.reward_functions import RewardFailed
from rollouts.trajectory import Trajectory, Turn


@dataclass
class Episode:
    """One row of a rollout under way."""

    prompt: dict  # encoded, with its record's messages and columns
    ids: list[int]  # all tokens so far
    turns: list[int]  # beside them: the policy's turn, -1 for what it did not say
    logprobs: list[float] | None  # beside them: what the sampler drew them with
    messages: list[dict] = field(default_factory=list)  # the dialogue as texts
    rewards: list[float] = field(default_factory=list)  # the environment's reward of each turn
    num_turns: int = 0
    finished: bool = False  # the last turn ended with a stop token
    over: bool = False
    number: int = 0  # in its rollout

    def add(self, turn: Turn) -> None:
        """The policy has spoken."""
        self.ids = self.ids + turn.ids
        self.turns = self.turns + [self.num_turns] * len(turn.ids)
        known = self.logprobs is not None and turn.logprobs is not None
        self.logprobs = self.logprobs + turn.logprobs if known else None
        self.num_turns, self.finished = self.num_turns + 1, turn.stopped


class SingleTurn:
    """No environment: the policy answers once, and nobody pays it here."""

    def begin(self, prompts: list[dict]) -> list[Episode]:
        """An episode for every prompt."""
        return [begin(prompt, [int(i) for i in prompt["input_ids"]]) for prompt in prompts]

    def speak(self, episodes: list[Episode]) -> None:
        """After its one answer an episode is over."""
        for episode in episodes:
            episode.over = True

    def rewards(self, episodes: list[Episode], trajectory: Trajectory) -> dict[str, Tensor]:
        """None."""
        return {}


def begin(prompt: dict, ids: list[int]) -> Episode:
    """The episode before the policy's first turn."""
    return Episode(prompt, ids, [-1] * len(ids), [0.0] * len(ids), list(prompt["messages"]))


class Dialogue:
    """Several turns with an environment of the user's.

    Args:
        environments: the user's objects, or the process that has them. name: of their class.
        window: tokens of an episode at most. max_new_tokens: of a turn. max_turns: of the policy.
    """

    def __init__(
        self, environments: "Environments | EnvironmentProcess", tokenizer,
        *, name: str, window: int, max_new_tokens: int, max_turns: int,
    ):  # fmt: skip
        self.environments, self.tokenizer, self.name = environments, tokenizer, name
        self.longest, self.max_turns = window - max_new_tokens, max_turns

    def begin(self, prompts: list[dict]) -> list[Episode]:
        """Raises ValueError where the environment's first messages are none, or leave no room for an answer."""
        episodes, records = [], [prompt["columns"] | {"messages": prompt["messages"]} for prompt in prompts]
        for number, (prompt, asked) in enumerate(zip(prompts, self.environments.reset(records), strict=True)):
            messages = self.check(asked, prompt)
            with self.named(prompt):
                ids = encode_prompt(messages, self.tokenizer, max_length=WHOLE)
            if not messages or len(ids) > self.longest:
                raise ValueError(
                    f"env={self.name}: reset() of {prompt['where']} gives {len(messages)} messages, {len(ids)} tokens; "
                    f"wanted at least one message, and at most {self.longest} tokens so that an answer fits the window"
                )
            episode = begin(prompt | {"messages": messages}, ids)
            episode.number = number
            episodes.append(episode)
        return episodes

    def speak(self, episodes: list[Episode]) -> None:
        """The environments answer the policy's turns; an episode that has no further turn is over."""
        for episode in episodes:
            turn = [i for i, number in zip(episode.ids, episode.turns, strict=True) if number == episode.num_turns - 1]
            message = {"role": "assistant", "content": self.tokenizer.decode(turn)}
            episode.messages = [*episode.messages, message]
        answers = self.environments.step([(episode.number, episode.messages) for episode in episodes])
        for episode, given in zip(episodes, answers, strict=True):
            if not isinstance(given, tuple | list) or len(given) != 3:
                raise ValueError(f"env={self.name}: step() returned {str(given)[:80]}; wanted (messages, reward, done)")
            messages, reward, done = given
            if not isinstance(reward, int | float) or not math.isfinite(reward):
                raise ValueError(f"env={self.name}: step() returned the reward {reward!r}; expected a finite number")
            episode.rewards.append(float(reward))
            episode.over = bool(done) or not episode.finished or episode.num_turns == self.max_turns
            if episode.over:
                continue
            messages = self.check(messages, episode.prompt)
            if not messages:
                raise ValueError(f"env={self.name}: step() says nothing and is not done; say something, or done=True")
            with self.named(episode.prompt):
                ids = self.observation(episode.messages, messages)
            if len(episode.ids) + len(ids) > self.longest:  # as a completion at its limit: it did not come to its end
                episode.over, episode.finished = True, False
                continue
            episode.messages += messages
            episode.ids, episode.turns = episode.ids + ids, episode.turns + [-1] * len(ids)
            if episode.logprobs is not None:
                episode.logprobs = episode.logprobs + [0.0] * len(ids)

    def observation(self, before: list[dict], messages: list[dict]) -> list[int]:
        """Token ids between the stop token of the policy's turn and its next one.

        What the policy sampled stays as it is: its text might be tokenised otherwise, so only what follows is encoded.
        """
        spelled = self.tokenizer.chat_template.after_answer(before, messages)
        ids, follows = self.tokenizer.encode_spelled(spelled)
        return [token for token, after in zip(ids, follows, strict=True) if after]

    @contextmanager
    def named(self, prompt: dict) -> Iterator[None]:
        """What cannot be encoded is this environment's, in an episode of this prompt."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"env={self.name}, {prompt['where']}: {error}") from None

    def check(self, messages, prompt: dict) -> list[dict]:
        """The messages. Raises ValueError where they are none."""
        for message in messages if isinstance(messages, list) else [messages]:
            fits = (
                isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
            )
            if not fits or message["role"] == "assistant" and message is messages[-1]:
                raise ValueError(
                    f"env={self.name}, {prompt['where']}: {str(message)[:80]} is no message; wanted a list of "
                    '{"role": "user", "content": "..."}, the last of them not the assistant\'s'
                )
        return messages

    def rewards(self, episodes: list[Episode], trajectory: Trajectory) -> dict[str, Tensor]:
        """{"environment": (B, T)}: each turn's reward, on its last token."""
        rewards = torch.zeros(trajectory.tokens.shape, dtype=torch.float32)
        turns = trajectory.turn.cpu()
        for row, episode in enumerate(episodes):
            for number, reward in enumerate(episode.rewards):
                rewards[row, int((turns[row] == number).nonzero().max())] = reward
        return {"environment": rewards.to(trajectory.tokens.device)}


class EnvironmentProcess(OwnProcess):
    """`Environments` in a process of its own.

    Args:
        spec, settings, known: as make_environment takes them. seconds: for loading, and for a turn of all episodes.
    """

    def __init__(self, spec: str, settings: dict, known: dict, *, seconds: float):
        words = (spec, json.dumps(settings), json.dumps(known))
        name = f"env={spec.rpartition(':')[2]}"
        super().__init__(name, "rollouts.environment_worker", *words, seconds=seconds)

    def reset(self, records: list[dict]) -> list:
        """What the environments of new episodes ask first."""
        return self.ask("reset", records)

    def step(self, talks: list[tuple[int, list[dict]]]) -> list:
        """What the environments of these episodes say next."""
        return self.ask("step", talks)

    def ask(self, method: str, given: list) -> list:
        """Raises RewardFailed where an environment fails, hangs or ends its process."""
        seed = random.getrandbits(32)  # of the run's own state: a resumed run draws the same
        self.send({"seed": seed, "method": method, "given": given})
        reply = self.reply("")
        if "failed" in reply:
            at = "" if reply["number"] is None else f" (episode {reply['number']} of the rollout)"
            raise RewardFailed(f"{self.called}: {reply['failed']}{at}")
        return reply["returned"]


def load_environment(cfg: DictConfig, tokenizer, window: int) -> SingleTurn | Dialogue:
    """What `env` names. Raises ValueError where it is no class with reset and step."""
    if cfg.env is None:
        return SingleTurn()
    given = {"name": cfg.env} if isinstance(cfg.env, str) else OmegaConf.to_container(cfg.env, resolve=True)
    settings = {key: value for key, value in given.items() if key != "name"}
    known = {"directory": str(Path(cfg.run_dir) / "env"), "max_turns": cfg.max_turns}
    environments = EnvironmentProcess(str(given.get("name")), settings, known, seconds=cfg.reward_timeout)
    return Dialogue(
        environments,
        tokenizer,
        name=environments.called.removeprefix("env="),
        window=window,
        max_new_tokens=cfg.sampling.max_new_tokens,
        max_turns=cfg.max_turns,
    )
