"""Rewards computed by a Python function: verifiable answers, formats, lengths.

A reward function is called as `function(prompts, completions, **columns)`: lists of strings and, as further keywords,
the prompt records' other columns (lists alike). It returns one float per row.
"""

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path

RewardFunction = Callable[..., list[float]]
ROOT = Path(__file__).resolve().parents[1]


def load_reward_function(spec: str) -> RewardFunction:
    """The function named by `package.module:function` (of this project) or `path/to/file.py:function`.

    Only code that the user points at is executed: a module must lie inside the project, a file is named by its path.

    Raises:
        ValueError: no such module, file or function, or a module from elsewhere.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError(f"reward_fn={spec!r} must read package.module:function or path/to/file.py:function")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place, spec)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward_fn={spec!r}: {place} has no function {name!r}")
    return function


def call_reward(
    function: RewardFunction, prompts: list[str], completions: list[str], columns: dict[str, list]
) -> list[float]:
    """One finite float per row; columns that the function does not take are left out.

    Raises:
        ValueError: the function raised, or returned anything but one finite number per row.
    """
    name = getattr(function, "__name__", "reward_fn")
    try:
        rewards = list(function(prompts, completions, **_accepted(function, columns)))
    except Exception as error:
        raise ValueError(f"reward function {name} raised {type(error).__name__}: {error}") from error
    if len(rewards) != len(completions):
        raise ValueError(f"reward function {name} returned {len(rewards)} rewards for {len(completions)} completions")
    for row, reward in enumerate(rewards):
        if not isinstance(reward, (int, float)) or not math.isfinite(reward):
            raise ValueError(
                f"reward function {name} returned {reward!r} for row {row} ({completions[row][:80]!r}); "
                "it must return one finite number per row"
            )
    return [float(reward) for reward in rewards]


def _accepted(function: RewardFunction, columns: dict[str, list]) -> dict[str, list]:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return columns
    names = {p.name for p in parameters}
    return {name: column for name, column in columns.items() if name in names}


def _load_file(path: Path):
    if not path.is_file():
        raise ValueError(f"reward_fn: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"reward_fn: {path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _load_module(name: str, given: str):
    relative = Path(*name.split("."))
    if not any((ROOT / path).is_file() for path in (relative.with_suffix(".py"), relative / "__init__.py")):
        raise ValueError(
            f"reward_fn={given!r}: {name} is no module of this project; name a file: path/to/file.py:function"
        )
    return importlib.import_module(name)
