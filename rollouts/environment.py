"""Environments write messages between a policy's turns, and give rewards for them.

    class Mine:
        def reset(self, record): ...      the first messages to the policy; record: the prompt's columns
        def step(self, messages): ...     (messages, reward, done): the next messages, [] at the end

`env=path/to/file.py:Mine` creates an object for every episode, `env={name:path/to/file.py:Mine,SETTING:VALUE}` with
arguments. Arguments called `directory` and `max_turns` are set here. The dialogue so far is a list of
{"role", "content"}. All objects are in one separate process (`rollouts/environment_worker.py`), which is killed if it
hangs.
"""

import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from data.chat import ROLES, encode_prompt
from data.prompts import WHOLE
from rollouts.environment_worker import Environments
from rollouts.own_process import OwnProcess
from rollouts.reward_functions import RewardFailed
from rollouts.trajectory import Episode, Trajectory


class SingleTurn:
    """No environment: the policy answers once, and gets no reward here."""

    def begin(self, prompts: list[dict]) -> list[Episode]:
        """An episode for every prompt."""
        return [begin(prompt, [int(i) for i in prompt["input_ids"]]) for prompt in prompts]

    def speak(self, episodes: list[Episode]) -> None:
        """End the episodes, because each has one answer."""
        for episode in episodes:
            episode.over = True

    def rewards(self, episodes: list[Episode], trajectory: Trajectory) -> dict[str, Tensor]:
        """None."""
        return {}


def begin(prompt: dict, ids: list[int]) -> Episode:
    """The episode before the policy's first turn."""
    return Episode(prompt, ids, [-1] * len(ids), [0.0] * len(ids), list(prompt["messages"]))


class Dialogue:
    """Several turns with the user's environment.

    Args:
        environments: the user's objects, or the process that has them. name: name of their class.
        window: largest number of tokens of an episode. max_new_tokens: of a turn. max_turns: of the policy.
    """

    def __init__(
        self,
        environments: "Environments | EnvironmentProcess",
        tokenizer,
        *,
        name: str,
        window: int,
        max_new_tokens: int,
        max_turns: int,
    ):
        self.environments, self.tokenizer, self.name = environments, tokenizer, name
        self.longest, self.max_turns = window - max_new_tokens, max_turns

    def begin(self, prompts: list[dict]) -> list[Episode]:
        """Begin the episodes. Raises ValueError if the environment's first messages are invalid or leave no tokens to
        answer.
        """
        episodes, records = [], [prompt["columns"] | {"messages": prompt["messages"]} for prompt in prompts]
        for number, (prompt, asked) in enumerate(zip(prompts, self.environments.reset(records), strict=True)):
            messages = self.check(asked, prompt)
            with self.named(prompt):
                ids = encode_prompt(messages, self.tokenizer, max_length=WHOLE)
            if not messages or len(ids) > self.longest:
                raise ValueError(
                    f"env={self.name}: reset() of {prompt['where']} gives {len(messages)} messages, {len(ids)} tokens; "
                    f"it must give at least one message, and at most {self.longest} tokens so that an answer fits "
                    "the window"
                )
            episode = begin(prompt | {"messages": messages}, ids)
            episode.number = number
            episodes.append(episode)
        return episodes

    def speak(self, episodes: list[Episode]) -> None:
        """The environments answer the policy's turns. An episode without a further turn ends."""
        for episode in episodes:
            turn = [i for i, number in zip(episode.ids, episode.turns, strict=True) if number == episode.num_turns - 1]
            message = {"role": "assistant", "content": self.tokenizer.decode(turn)}
            episode.messages = [*episode.messages, message]
        answers = self.environments.step([(episode.number, episode.messages) for episode in episodes])
        for episode, given in zip(episodes, answers, strict=True):
            if not isinstance(given, tuple | list) or len(given) != 3:
                raise ValueError(
                    f"env={self.name}: step() returned {str(given)[:80]}; it must return (messages, reward, done)"
                )
            messages, reward, done = given
            if not isinstance(reward, int | float) or not math.isfinite(reward):
                raise ValueError(f"env={self.name}: step() returned the reward {reward!r}; it must be a finite number")
            episode.rewards.append(float(reward))
            episode.over = bool(done) or not episode.finished or episode.num_turns == self.max_turns
            if episode.over:
                continue
            messages = self.check(messages, episode.prompt)
            if not messages:
                raise ValueError(
                    f"env={self.name}: step() returned no message and done=False; return a message, or done=True"
                )
            with self.named(episode.prompt):
                ids = self.observation(episode.messages, messages)
            # the episode is not finished, like a completion at its limit
            if len(episode.ids) + len(ids) > self.longest:
                episode.over, episode.finished = True, False
                continue
            episode.messages += messages
            episode.ids, episode.turns = episode.ids + ids, episode.turns + [-1] * len(ids)
            if episode.logprobs is not None:
                episode.logprobs = episode.logprobs + [0.0] * len(ids)

    def observation(self, before: list[dict], messages: list[dict]) -> list[int]:
        """Token ids between the stop token of the policy's turn and its next one.

        The sampled tokens are not changed, because their text may be tokenised differently. Only the text after them is
        encoded.
        """
        spelled = self.tokenizer.chat_template.after_answer(before, messages)
        ids, follows = self.tokenizer.encode_spelled(spelled)
        return [token for token, after in zip(ids, follows, strict=True) if after]

    @contextmanager
    def named(self, prompt: dict) -> Iterator[None]:
        """An error inside of this block gets the name of the environment and the place of the prompt."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"env={self.name}, {prompt['where']}: {error}") from None

    def check(self, messages, prompt: dict) -> list[dict]:
        """The messages. Raises ValueError if they are not valid."""
        for message in messages if isinstance(messages, list) else [messages]:
            fits = (
                isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
            )
            if not fits or message["role"] == "assistant" and message is messages[-1]:
                raise ValueError(
                    f"env={self.name}, {prompt['where']}: {str(message)[:80]} is not a message; it needs a list of "
                    '{"role": "user", "content": "..."} that does not end with a message of the assistant'
                )
        return messages

    def rewards(self, episodes: list[Episode], trajectory: Trajectory) -> dict[str, Tensor]:
        """{"environment": (B, T)}: the reward of each turn, on its last token."""
        rewards = torch.zeros(trajectory.tokens.shape, dtype=torch.float32)
        turns = trajectory.turn.cpu()
        for row, episode in enumerate(episodes):
            for number, reward in enumerate(episode.rewards):
                rewards[row, int((turns[row] == number).nonzero().max())] = reward
        return {"environment": rewards.to(trajectory.tokens.device)}


class EnvironmentProcess(OwnProcess):
    """`Environments` in a separate process.

    Args:
        spec, settings, known: as for make_environment. seconds: time limit for loading, and for a turn of all episodes.
    """

    def __init__(self, spec: str, settings: dict, known: dict, *, seconds: float):
        words = (spec, json.dumps(settings), json.dumps(known))
        name = f"env={spec.rpartition(':')[2]}"
        super().__init__(name, "rollouts.environment_worker", *words, seconds=seconds)

    def reset(self, records: list[dict]) -> list:
        """The first messages of the environments of new episodes."""
        return self.ask("reset", records)

    def step(self, talks: list[tuple[int, list[dict]]]) -> list:
        """The next messages of the environments of these episodes."""
        return self.ask("step", talks)

    def ask(self, method: str, given: list) -> list:
        """The replies. Raises RewardFailed if an environment fails, hangs or ends its process."""
        seed = random.getrandbits(32)  # from the run's own generator, so that a resumed run draws the same
        self.send({"seed": seed, "method": method, "given": given})
        reply = self.reply("")
        if "failed" in reply:
            at = "" if reply["number"] is None else f" (episode {reply['number']} of the rollout)"
            raise RewardFailed(f"{self.called}: {reply['failed']}{at}")
        return reply["returned"]


def load_environment(
    env: str | DictConfig | None,
    tokenizer,
    *,
    window: int,
    max_new_tokens: int,
    max_turns: int,
    directory: Path,
    seconds: float,
) -> SingleTurn | Dialogue:
    """The environment of the setting `env`. Raises ValueError if it is not a class with reset and step.

    Args:
        directory: where the environment may keep files. seconds: for a reply of its process (`reward_timeout`).
    """
    if env is None:
        return SingleTurn()
    given = {"name": env} if isinstance(env, str) else OmegaConf.to_container(env, resolve=True)
    settings = {key: value for key, value in given.items() if key != "name"}
    known = {"directory": str(directory), "max_turns": max_turns}
    environments = EnvironmentProcess(str(given.get("name")), settings, known, seconds=seconds)
    return Dialogue(
        environments,
        tokenizer,
        name=environments.called.removeprefix("env="),
        window=window,
        max_new_tokens=max_new_tokens,
        max_turns=max_turns,
    )
