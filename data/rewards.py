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

import torch
from torch import Tensor

from data.tokenizer import load_tokenizer
from model.packing import Rows

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
    """One finite float per row, from numbers, NumPy's or torch's; columns that the function does not take are left out.

    Raises:
        ValueError: the function raised, or returned anything but one finite number per row.
    """
    name = getattr(function, "__name__", "reward_fn")
    try:
        rewards = list(function(prompts, completions, **_accepted(function, columns)))
        rewards = [reward.item() if hasattr(reward, "item") else reward for reward in rewards]
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
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters}
    given = ("prompts", "completions")  # a ranking has a column of that name: the policy's completions go before it
    return {name: column for name, column in columns.items() if name not in given and (any_name or name in names)}


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
    inside = all(part.isidentifier() for part in name.split("."))
    if not inside or not any((ROOT / p).is_file() for p in (relative.with_suffix(".py"), relative / "__init__.py")):
        raise ValueError(
            f"reward_fn={given!r}: {name} is no module of this project; name a file: path/to/file.py:function"
        )
    return importlib.import_module(name)


class Scorer:
    """(B,) scores of a rollout: a reward model's, Python functions', or their weighted sum.

    Args:
        reward_model: frozen, or None. functions: reward functions, each called once per rollout.
        weights: one per source, the reward model first; None = 1 each.
        tokenizer: decodes what the functions read. micro_batch_size: rows of a forward.
    """

    def __init__(self, reward_model, functions: list[RewardFunction], weights, tokenizer, *, micro_batch_size: int):
        sources = (reward_model is not None) + len(functions)
        if not sources:
            raise ValueError("nothing gives a reward: set reward_model=PATH, reward_fn=MODULE:FUNCTION, or both")
        self.weights = [1.0] * sources if weights is None else [float(w) for w in weights]
        if len(self.weights) != sources:
            raise ValueError(f"reward_weights has {len(self.weights)} entries for {sources} sources of reward")
        self.reward_model, self.functions, self.tokenizer = reward_model, functions, tokenizer
        self.micro_batch_size = micro_batch_size

    @torch.no_grad()
    def __call__(self, rollout: Rows, prompts: list[dict]) -> Tensor:
        """Raises ValueError where a score is not finite, naming the row."""
        sources = []
        if self.reward_model is not None:
            parts = torch.arange(len(prompts), device=rollout.input_ids.device).split(self.micro_batch_size)
            sources.append(torch.cat([self.reward_model.score(*rollout.select(rows)) for rows in parts]))
        if self.functions:
            texts = [prompt_text(prompt) for prompt in prompts]
            completions = completion_texts(rollout, self.tokenizer)
            columns = gather_columns(prompts)
            for function in self.functions:
                rewards = call_reward(function, texts, completions, columns)
                sources.append(torch.tensor(rewards, dtype=torch.float32, device=rollout.input_ids.device))
        scores = sum(weight * source.float() for weight, source in zip(self.weights, sources, strict=True))
        if not scores.isfinite().all():
            row = int((~scores.isfinite()).nonzero()[0])
            raise ValueError(
                f"the score of row {row} is {scores[row].item()}: prompt {prompts[row]['where']}, completion "
                f"{completion_texts(rollout.select([row]), self.tokenizer)[0][:200]!r}; the reward model or the policy "
                "has diverged: lower optim.lr, or look at the last samples"
            )
        return scores


def prompt_text(prompt: dict) -> str:
    """What a reward function reads as the prompt: the text of a lone message, or every message after its role."""
    messages = prompt["messages"]
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def completion_texts(rollout: Rows, tokenizer) -> list[str]:
    """The completions, without their stop tokens."""
    rows = zip(rollout.input_ids, rollout.completion_mask, strict=True)
    return [tokenizer.decode(ids[mask].tolist()) for ids, mask in rows]


def gather_columns(prompts: list[dict]) -> dict[str, list]:
    """The records' further columns (None where a record lacks one), and `messages`, the prompts as messages."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt["columns"])
    columns = {name: [prompt["columns"].get(name) for prompt in prompts] for name in names}
    return columns | {"messages": [prompt["messages"] for prompt in prompts]}


def check_same_tokenizer(path: str, tokenizer) -> None:
    """Raise ValueError unless the model at `path` was made for this tokenizer: ids would mean other words."""
    other = load_tokenizer(path, date=tokenizer.date)
    if other.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"reward_model={path} has another tokenizer or chat template than the policy ({other.vocab_size} ids, "
            f"template {other.template}, against {tokenizer.vocab_size}, {tokenizer.template}); train the reward model "
            "from this policy (train_rm.py policy=...)"
        )
