"""Rewards computed by a Python function: a ready one (rewards/) or the user's own.

A reward function is called as `function(prompts, completions, **columns)`: lists of strings and, as further keywords,
the other columns of the prompt records, which are also lists. It returns one float per row. Keyword-only parameters
with a default are its settings. A class is instantiated once and then called.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

RewardFunction = Callable[..., list[float]]
OF_A_SOURCE = ("name", "weight", "clip", "normalise", "unjudged")  # settings that each source of reward has
ROOT = Path(__file__).resolve().parents[1]


class RewardFailed(ValueError):
    """The failure of a reward function, as a whole sentence."""


def load_reward_function(spec: str, key: str = "reward_fn") -> Callable:
    """The function `NAME` of rewards/NAME.py, `package.module:function` of this project, or `path/to/file.py:function`.

    Only code that the user names is executed: a module must be inside the project, a file is named by its path.

    Raises:
        ValueError: there is no such module, file or function, or the module is outside of the project.
    """
    place, _, name = spec.rpartition(":")
    if not place and name.isidentifier():
        return _load_ready(name, key)
    if not place or not name.isidentifier():
        raise ValueError(f"{key}={spec!r} must be NAME, package.module:function or path/to/file.py:function")
    module = _load_file(Path(place), key) if place.endswith(".py") else _load_module(place, spec, key)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{key}={spec!r}: {place} has no function {name!r}")
    return function


def make_reward(
    spec: str, key: str, settings: dict | None = None, directory: str | Path | None = None
) -> RewardFunction:
    """The named function with its settings, or the instance of a class.

    Args:
        directory: a class that has an argument with this name may keep files there.
    Raises:
        ValueError: it cannot be loaded, or has no such setting.
    """
    function, name, own = load_reward_function(spec, key), spec.rpartition(":")[2], dict(settings or {})
    parameters = inspect.signature(function).parameters
    is_class = isinstance(function, type)
    names = [p.name for p in parameters.values() if (is_class or _is_setting(p)) and p.name != "directory"]
    if unknown := set(own) - set(names):
        raise ValueError(
            f"{key}: {name} has no setting {', '.join(sorted(unknown))}; its own are {', '.join(names) or 'none'}, "
            f"those of all sources {', '.join(OF_A_SOURCE)}"
        )
    if not is_class:
        return functools.partial(function, **own) if own else function
    own |= {"directory": Path(directory or ".")} if "directory" in parameters else {}
    try:
        return function(**own)
    except TypeError as error:
        raise ValueError(f"{key}: {name}: {error}; write {{name: {name}, SETTING: ...}}") from None


def columns_read(function: RewardFunction) -> list[str]:
    """The columns that a function requires."""
    parameters = inspect.signature(function).parameters.values()
    any_number = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in any_number]


def is_cheap(function: RewardFunction) -> bool:
    """Whether it is a function of rewards/: they need no model, server or program. The classes there may need one."""
    function = getattr(function, "func", function)
    return inspect.isfunction(function) and function.__module__.startswith("rewards.")


def name_of(function: RewardFunction) -> str:
    """The name of a function. Of a function with settings, the function's; of an object, its class's name."""
    function = getattr(function, "func", function)
    return getattr(function, "__name__", type(function).__name__)


def call_reward(
    function: RewardFunction, prompts: list[str], completions: list[str], columns: dict[str, list]
) -> list[float]:
    """One finite float per row, from numbers, NumPy or torch. Columns that the function does not take are left out.

    Raises:
        ValueError: the function raised, or returned anything but one finite number per row.
    """
    name = name_of(function)
    rewards = call_rows(function, prompts, completions, columns)
    for row, reward in enumerate(rewards):
        if not is_number(reward):
            raise RewardFailed(
                f"reward function {name} returned {reward!r} for row {row} ({completions[row][:80]!r}); "
                "it must return one finite number per row"
            )
    return [float(reward) for reward in rewards]


def call_rows(function: RewardFunction, prompts: list[str], completions: list[str], columns: dict[str, list]) -> list:
    """The function's value of each row, with numbers of NumPy or torch converted to Python's. Only their count is
    checked.

    Raises:
        ValueError: the function raised, or returned another number of rows.
    """
    name = name_of(function)
    try:
        rewards = call_function(function, prompts, completions, columns)
    except RewardFailed:  # the function is in a separate process (rollouts/reward_process.py)
        raise
    except (Exception, SystemExit) as error:
        at = first_bad_row(function, prompts, completions, columns)
        raise RewardFailed(f"reward function {name} raised {type(error).__name__}: {error}{at}") from error
    if len(rewards) != len(completions):
        raise RewardFailed(f"reward function {name} returned {len(rewards)} rewards for {len(completions)} completions")
    return rewards


def call_function(
    function: RewardFunction, prompts: list[str], completions: list[str], columns: dict[str, list]
) -> list:
    """The function's result as a list. Columns that it does not take are left out."""
    rewards = list(function(prompts, completions, **_accepted(function, columns)))
    return [
        reward.item() if hasattr(reward, "item") and not getattr(reward, "ndim", 0) else reward for reward in rewards
    ]


def first_bad_row(function: RewardFunction, prompts: list, completions: list, columns: dict[str, list]) -> str:
    """A text that names the row on which the function fails alone. Empty if it fails only on all rows together."""
    for row, completion in enumerate(completions):
        own = {name: column[row : row + 1] for name, column in columns.items()}
        try:
            call_function(function, prompts[row : row + 1], [completion], own)
        except (Exception, SystemExit):
            return f" on row {row} (prompt {prompts[row][:80]!r}, completion {completion[:80]!r})"
    return ""


def _accepted(function: RewardFunction, columns: dict[str, list]) -> dict[str, list]:
    parameters = [p for p in inspect.signature(function).parameters.values() if not _is_setting(p)]
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters}
    given = ("prompts", "completions")  # a ranking has a column `completions`; the policy's completions replace it
    return {name: column for name, column in columns.items() if name not in given and (any_name or name in names)}


def _is_setting(parameter: inspect.Parameter) -> bool:
    return parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty


def _load_ready(name: str, key: str) -> Callable:
    """rewards/exact.py has the function `exact`, rewards/reward_server.py the class `RewardServer`."""
    known = sorted(path.stem for path in (ROOT / "rewards").glob("[a-z]*.py"))
    if name not in known:
        raise ValueError(
            f"{key}={name} is not a ready reward ({', '.join(known)}); a function of your own is FILE.py:function"
        )
    module = importlib.import_module(f"rewards.{name}")
    return getattr(module, name, None) or getattr(module, name.title().replace("_", ""))


def _load_file(path: Path, key: str):
    if not path.is_file():
        raise ValueError(f"{key}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{key}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _load_module(name: str, given: str, key: str):
    relative = Path(*name.split("."))
    inside = all(part.isidentifier() for part in name.split("."))
    if not inside or not any((ROOT / p).is_file() for p in (relative.with_suffix(".py"), relative / "__init__.py")):
        raise ValueError(
            f"{key}={given!r}: {name} is not a module of this project; name a file: path/to/file.py:function"
        )
    return importlib.import_module(name)


def prompt_text(prompt: dict) -> str:
    """The prompt as a text for reward functions: the text of a single message, or every message after its role."""
    messages = prompt["messages"]
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def gather_columns(prompts: list[dict]) -> dict[str, list]:
    """The records' further columns (None if a record lacks one), and `messages`, the prompts as messages."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt["columns"])
    columns = {name: [prompt["columns"].get(name) for prompt in prompts] for name in names}
    return columns | {"messages": [prompt["messages"] for prompt in prompts]}


def is_number(value) -> bool:
    """Whether the value is a number that fits a float: not NaN, not infinite, not a larger whole number."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max
