"""The reward sources that `reward` and `watch` name, each with its weight, its scale and its own settings."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor

from rollouts.reward_functions import OF_A_SOURCE, RewardFunction, gather_columns, prompt_text
from rollouts.reward_process import RewardProcess
from runtime.config import check_number, check_positive

ROWS = 1000  # prompts that a reward function is checked on at a time
REWARD_MODEL, ENVIRONMENT = "reward_model", "environment"  # sources that are not functions


class RunningScale:
    """Mean and deviation of all rewards of a source so far, one value per completion."""

    def __init__(self):
        self.count, self.center, self.squares = 0.0, 0.0, 0.0

    def update(self, totals: Tensor, mean: Callable[[Tensor], Tensor]) -> None:
        """Add the (n,) totals of a rollout. `mean` averages a scalar over ranks. Merging as in Chan et al. 1979."""
        totals = totals.double()
        count = mean(torch.tensor(float(len(totals)), device=totals.device, dtype=torch.float64)).item()
        if not count:
            return
        center = mean(totals.sum()).item() / count
        squares = mean((totals - center).square().sum()).item()
        gap, whole = center - self.center, self.count + count
        self.squares += squares + gap * gap * self.count * count / whole
        self.center, self.count = self.center + gap * count / whole, whole

    @property
    def deviation(self) -> float:
        """The standard deviation. 1 if there is no variation yet."""
        deviation = (self.squares / self.count) ** 0.5 if self.count else 0.0
        return deviation if deviation > 1e-8 else 1.0


@dataclass
class Source:
    """One source of reward.

    function: called with prompts, completions and columns. None for the reward model and the environment.
    weight: weight of its rewards in the sum. clip: each of its rewards is clipped to [-clip, clip]; None = never.
    normalise: subtract the running mean from a completion's reward and divide by the running deviation, before the
        clip.
    unjudged: the reward if the function returns None. If this is None, the row is left out.
    """

    name: str
    function: RewardFunction | None = None
    weight: float = 1.0
    clip: float | None = None
    normalise: bool = False
    unjudged: float | None = None
    scale: RunningScale = field(default_factory=RunningScale)


def read_sources(key: str, given, directory: Path, seconds: float, **known: bool) -> list[Source]:
    """The sources that a setting names: a name, or a list of names and mappings.

    key: the setting. directory: a source may keep files there. seconds: time limit of a function's call.
    known: the sources that exist and are not functions. They also give rewards if `given` omits them.
    Raises:
    ValueError: a name, key or setting is unknown.
    """
    entries = OmegaConf.to_container(given, resolve=True) if isinstance(given, DictConfig | ListConfig) else given
    entries = [entries] if isinstance(entries, str | dict) else list(entries or [])
    sources, fixed = [], {name: Source(name) for name, there in known.items() if there}
    for entry in entries:
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ValueError(f"{key}: {entry!r} is not a reward; write a name, or {{name: NAME, weight: 1, ...}}")
        source = read_source(key, entry, directory, seconds, known)
        if source.name in fixed:
            fixed[source.name] = source
        else:
            sources.append(source)
    names = [source.name for source in sources]
    for i, source in enumerate(sources):
        source.name += f"_{names[:i].count(source.name) + 1}" if names.count(names[i]) > 1 else ""
    place = {REWARD_MODEL: 0, ENVIRONMENT: 2}
    return sorted([*fixed.values(), *sources], key=lambda source: place.get(source.name, 1))


def read_source(key: str, entry: dict, directory: Path, seconds: float, known: dict[str, bool]) -> Source:
    """One entry as a source. Settings that are not in OF_A_SOURCE are the function's own."""
    name, own = entry["name"], {k: value for k, value in entry.items() if k not in OF_A_SOURCE}
    weight, clip, unjudged = entry.get("weight", 1.0), entry.get("clip"), entry.get("unjudged")
    check_number(float("-inf"), **{f"{key}.{name}.weight": weight})
    check_number(float("-inf"), **({} if unjudged is None else {f"{key}.{name}.unjudged": unjudged}))
    check_positive(**({} if clip is None else {f"{key}.{name}.clip": clip}))
    if not isinstance(normalise := entry.get("normalise", False), bool):
        raise ValueError(f"{key}.{name}.normalise={normalise} must be true or false")
    scales = {"weight": float(weight), "clip": clip, "normalise": normalise, "unjudged": unjudged}
    if name in known:
        if not known[name] or own:
            setting = {REWARD_MODEL: "reward_model=PATH", ENVIRONMENT: "env=FILE.py:CLASS"}[name]
            raise ValueError(
                f"{key}: {name} has no setting {next(iter(own))}"
                if own
                else f"{key}: {name} needs the setting {setting}"
            )
        return Source(name, **scales)
    function = RewardProcess(name, seconds=seconds, key=key, settings=own, directory=directory / name)
    return Source(name.rpartition(":")[2], function, **scales)


def check_columns(key: str, sources: Collection[Source], prompts: Sequence[dict]) -> None:
    """Raise ValueError if a source reads a column that none of the prompts has, or a value that it cannot judge by.

    The functions of rewards/ are called on an empty completion of every prompt, so that a wrong answer in the data is
    found before the first step.
    """
    there = {"prompts", "completions", "messages", "tokens"} | {
        name for prompt in prompts for name in prompt["columns"]
    }
    for source in sources:
        needed = getattr(source.function, "columns", [])
        if missing := [name for name in needed if name not in there]:
            has = ", ".join(sorted(there - {"prompts", "completions", "messages", "tokens"})) or "none"
            raise ValueError(
                f"{key}: {source.name} reads the column {', '.join(missing)}, which no prompt has (they have {has}; "
                f"the first is {prompts[0]['where']})"
            )
        if isinstance(source.function, RewardProcess):
            for start in range(0, len(prompts), ROWS):
                part = list(prompts[start : start + ROWS])
                columns = gather_columns(part) | {"tokens": [[] for _ in part]}
                source.function.check_rows([prompt_text(prompt) for prompt in part], columns)
