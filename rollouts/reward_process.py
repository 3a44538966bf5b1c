"""A reward function in a separate process that can be killed (rollouts/reward_worker.py)."""

import contextlib
import json
import random
from collections.abc import Collection
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
        self.columns = self.loaded["columns"][2:]  # that it requires, after prompts and completions
        self.key, self.cheap = key, self.loaded["cheap"]

    def check_columns(self, given: Collection[str]) -> None:
        """Raise ValueError if the function requires a column that is not among `given`."""
        if missing := [name for name in self.columns if name not in given]:
            raise RewardFailed(
                f"{self.key}: {self.called} needs {', '.join(missing)}, which is not given here; given are prompts, "
                f"completions and {', '.join(given) or 'no column of the data'}"
            )

    def __call__(self, prompts: list[str], completions: list[str], **columns: list) -> list:
        """The function's result. Numbers of NumPy or torch become Python's, and tuples become lists."""
        self.check_columns(columns)
        seed = random.getrandbits(32)  # from the run's own generator, so that a resumed run draws the same
        return self._rewards(seed, prompts, completions, columns)

    def check_rows(self, prompts: list[str], columns: dict[str, list]) -> None:
        """Call the function on empty completions, if it is cheap. Raises RewardFailed where it cannot read a column."""
        if self.cheap:
            self._rewards(0, prompts, [""] * len(prompts), columns)

    def _rewards(self, seed: int, prompts: list[str], completions: list[str], columns: dict[str, list]) -> list:
        self.send({"seed": seed, "prompts": prompts, "completions": completions, "columns": columns})
        reply = self.reply("")
        if "failed" in reply:
            with contextlib.suppress(RewardFailed):  # the search for the row may hang although the call did not
                reply["failed"] += self.reply("")["at"]
            raise RewardFailed(f"{self.called} {reply['failed']}")
        return reply["rewards"]
