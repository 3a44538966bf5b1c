"""A reward function in a separate process that can be killed (rollouts/reward_worker.py)."""

import contextlib
import json
import random
from pathlib import Path

from rollouts.own_process import ROOT, OwnProcess
from rollouts.reward_functions import RewardFailed


class RewardProcess(OwnProcess):
    """The function of `spec`, called as `function(prompts, completions, **columns)` as in this process.

    Args:
        spec, key, settings, directory: as for make_reward. seconds: time limit for loading, and for each call.
    Raises:
        ValueError: it cannot be loaded. RewardFailed: a call failed, or did not end in time and was killed.
    """

    def __init__(
        self, spec: str, *, seconds: float, key: str = "reward_fn", settings: dict | None = None, directory: Path = ROOT
    ):
        self.__name__ = spec.rpartition(":")[2]
        words = (spec, key, json.dumps(settings or {}), str(directory))
        super().__init__(f"reward function {self.__name__}", "rollouts.reward_worker", *words, seconds=seconds)
        self.columns = self.loaded["columns"]  # the columns that it requires

    def __call__(self, prompts: list[str], completions: list[str], **columns: list) -> list:
        """The function's result. Numbers of NumPy or torch become Python's, and tuples become lists."""
        seed = random.getrandbits(32)  # from the run's own generator, so that a resumed run draws the same
        self.send({"seed": seed, "prompts": prompts, "completions": completions, "columns": columns})
        reply = self.reply("")
        if "failed" in reply:
            with contextlib.suppress(RewardFailed):  # the search for the row may hang although the call did not
                reply["failed"] += self.reply("")["at"]
            raise RewardFailed(f"{self.called} {reply['failed']}")
        return reply["rewards"]
