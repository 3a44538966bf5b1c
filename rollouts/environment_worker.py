"""The process that runs environments. `rollouts/environment.py` uses it through `rollouts/own_process.py`."""

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path

from rollouts.reward_functions import load_reward_function
from rollouts.reward_worker import connected, loaded_modules, requests, write


class Environments:
    """One object of the user's class for each episode of a rollout."""

    def __init__(self, make: Callable):
        self.make = make
        self.episodes: list = []

    def reset(self, records: list[dict]) -> list:
        """The first messages for each new episode. The objects of the last rollout are deleted."""
        self.episodes = [None] * len(records)
        return [self.call(i, "reset", record) for i, record in enumerate(records)]

    def step(self, talks: list[tuple[int, list[dict]]]) -> list:
        """The next messages of the environments of these episodes."""
        return [self.call(i, "step", messages) for i, messages in talks]

    def call(self, i: int, method: str, given):
        """The result of a method of episode i. Raises Failed if the user's code raises."""
        try:
            if method == "reset":
                self.episodes[i] = self.make()
            return getattr(self.episodes[i], method)(given)
        except (Exception, SystemExit) as error:
            raise Failed(i, f"{method}() raised {type(error).__name__}: {error}") from error


class Failed(Exception):
    """(the number of the episode, the failure of its environment)."""


def serve(spec: str, settings: str, known: str, descriptor: str, parent: str) -> None:
    """Load the class with its settings (JSON), and answer until the other end is closed."""
    with connected(descriptor, parent) as pipe:
        try:
            environments = Environments(make_environment(spec, json.loads(settings), json.loads(known)))
        except ValueError as error:
            write(pipe, {"refused": str(error)})
            return
        write(pipe, {"modules": loaded_modules()})
        for request in requests(pipe):
            try:
                write(pipe, {"returned": getattr(environments, request["method"])(request["given"])})
            except Failed as failed:
                number, what = failed.args
                write(pipe, {"number": number, "failed": what})
            except (TypeError, ValueError) as error:  # the result is not JSON
                write(pipe, {"number": None, "failed": f"{request['method']}(): {error}"})


def make_environment(spec: str, settings: dict, known: dict) -> Callable:
    """The class with its settings and those of `known` that it takes. Raises ValueError if they do not fit."""
    make = load_reward_function(spec, "env")
    if not isinstance(make, type) or not all(callable(getattr(make, name, None)) for name in ("reset", "step")):
        raise ValueError(f"env={spec} must name a class with reset(record) and step(messages)")
    known = known | {"directory": Path(known["directory"])}
    settings |= {key: value for key, value in known.items() if key in inspect.signature(make).parameters}
    try:
        inspect.signature(make).bind(**settings)
    except TypeError as error:
        raise ValueError(
            f"env={make.__name__}: {error}; write {{name: FILE.py:{make.__name__}, SETTING: ...}}"
        ) from None
    return functools.partial(make, **settings)
