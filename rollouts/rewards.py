"""What a rollout is paid: a reward model, Python functions, the environment, or several of these.

A function is called as `function(prompts, completions, **columns)` (`data/rewards.py`) and says for every row one of
    1.5                     the completion's reward, paid at its end
    [0.0, 0.5, ...]         a reward for each of its tokens, stop token included (their ids are the column `tokens`)
    [((0, 12), 1.0), ...]   rewards of stretches of its text, as (first character, one past the last)
    None                    nothing: the row is left out of the loss and of the means, and counted
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data.rewards import RewardFailed, RewardFunction, call_rows, gather_columns, is_number, prompt_text
from rollouts.parts import of_actions
from rollouts.trajectory import Part, Trajectory

ENVIRONMENT = "environment"


class Scorer:
    """Pays rollouts.

    Args:
        reward_model: frozen, or None. functions: each called once per rollout.
        weights, clips: one per source, the reward model first, then the functions, then the environment where it pays;
            None = a weight of 1 each, and no clip. A clip holds for each of the source's rewards.
        tokenizer: decodes what the functions read. micro_batch_size: rows of a forward.
        from_environment: whether the environment pays.
    """

    def __init__(
        self, reward_model, functions: list[RewardFunction], weights: Sequence[float] | None, tokenizer,
        *, micro_batch_size: int, clips: Sequence[float | None] | None = None, from_environment: bool = False,
    ):  # fmt: skip
        self.reward_model, self.tokenizer, self.micro_batch_size = reward_model, tokenizer, micro_batch_size
        self.functions = dict(zip(names_of(functions), functions, strict=True))
        sources = ["reward_model"] * (reward_model is not None) + list(self.functions)
        sources += [ENVIRONMENT] * from_environment
        if not sources:
            raise ValueError("nothing gives a reward: set reward_model=PATH, reward_fn=MODULE:FUNCTION, or both")
        for key, given in (("reward_weights", weights), ("reward_clips", clips)):
            if given is not None and len(given) != len(sources):
                raise ValueError(f"{key} has {len(given)} entries for {len(sources)} sources of reward")
        self.weights = dict(zip(sources, [1.0] * len(sources) if weights is None else map(float, weights), strict=True))
        self.clips = dict(zip(sources, [None] * len(sources) if clips is None else clips, strict=True))

    @torch.no_grad()
    def __call__(self, rollout: Trajectory, parts: list[Part] | None = None) -> Tensor:
        """(B, T) what the sources pay together, weighed; what each pays is left in rollout.rewards.

        Args:
            parts: the rollout packed, where the caller has it.
        Raises:
            ValueError: a function says something else, or a reward is not finite; it names the row.
        """
        if self.reward_model is not None:
            parts = parts or rollout.parts(self.micro_batch_size)
            scores = of_actions(self.reward_model.score, parts).float()
            rollout.rewards["reward_model"] = torch.where(rollout.done, scores[:, None], 0.0)
        if self.functions:
            texts = completion_texts(rollout, self.tokenizer)
            prompts, columns = [prompt_text(prompt) for prompt in rollout.prompts], gather_columns(rollout.prompts)
            columns["tokens"] = [
                ids[mask].tolist() for ids, mask in zip(rollout.tokens, rollout.action_mask, strict=True)
            ]
            for name, function in self.functions.items():
                said = call_rows(function, prompts, texts, columns)
                rollout.rewards[name] = self.on_tokens(name, said, rollout, texts)
        self.check(rollout)
        total = torch.zeros(rollout.tokens.shape, device=rollout.tokens.device)
        for name, weight in self.weights.items():
            clip, rewards = self.clips[name], rollout.rewards[name]
            total = total + weight * (rewards if clip is None else rewards.clamp(-clip, clip))
        return total

    def on_tokens(self, name: str, said: list, rollout: Trajectory, texts: list[str]) -> Tensor:
        """(B, T) float32 what a function said, each reward on the token that it is for."""
        rewards = torch.zeros(rollout.tokens.shape, dtype=torch.float32)
        masks, last = rollout.action_mask.cpu(), rollout.done.int().argmax(1).tolist()
        for row, value in enumerate(said):
            value = value.tolist() if hasattr(value, "tolist") else value
            if value is None:
                rollout.judged[row] = False
            elif is_number(value):
                rewards[row, last[row]] = value
            elif isinstance(value, list) and len(value) == masks[row].sum() and all(map(is_number, value)):
                rewards[row, masks[row]] = torch.tensor(value, dtype=torch.float32)
            elif isinstance(value, list) and all(map(is_stretch, value)):
                ids = rollout.tokens[row].cpu()[masks[row]].tolist()
                ends = [
                    len(self.tokenizer.decode(ids[: n + 1])) for n in range(len(ids))
                ]  # characters after each token
                columns = masks[row].nonzero().flatten().tolist()
                for (start, stop), reward in value:
                    if not 0 <= start < stop <= len(texts[row]):
                        raise RewardFailed(
                            f"reward function {name} pays characters {start} to {stop} of row {row}, whose completion "
                            f"has {len(texts[row])} ({texts[row][:80]!r})"
                        )
                    token = next(n for n, end in enumerate(ends) if end >= stop)
                    rewards[row, columns[token]] += reward
            else:
                raise RewardFailed(
                    f"reward function {name} returned {str(value)[:80]} for row {row} ({texts[row][:80]!r}); it must "
                    f"return one finite number, one for each of its {int(masks[row].sum())} tokens, "
                    "[((start, stop), reward), ...] in characters, or None"
                )
        return rewards.to(rollout.tokens.device)

    def check(self, rollout: Trajectory) -> None:
        """Raises ValueError where a reward is not finite."""
        for name, rewards in rollout.rewards.items():
            if not rewards.isfinite().all():
                row = int((~rewards.isfinite()).any(1).nonzero()[0])
                raise ValueError(
                    f"{name}: the score of row {row} is {rewards[row].sum().item()}: prompt {rollout.where[row]}, "
                    f"completion {completion_texts(rollout, self.tokenizer)[row][:200]!r}; the reward model or the "
                    "policy has diverged: lower optim.lr, or look at the last samples"
                )

    def figures(self, rollout: Trajectory, mean: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """What is logged of the sources: what each pays a row, before weights, and how they go together.

        mean: averages a scalar tensor over ranks (`run.mean`).
        """
        figures = {"objective/unjudged": ~rollout.judged}
        if len(self.weights) < 2:
            return figures
        totals = {name: rollout.rewards[name].sum(1)[rollout.judged] for name in self.weights}
        names = list(totals)
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        figures |= {f"objective/reward/{name}": total for name, total in totals.items()}
        return figures | {f"objective/correlation/{a}/{b}": correlation(totals[a], totals[b], mean) for a, b in pairs}


def correlation(a: Tensor, b: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """() Pearson's correlation over the rows of all ranks; 0 where one of the two does not vary."""
    a, b = a.double(), b.double()
    count = mean(torch.tensor(float(len(a)), device=a.device)).clamp_min(1e-12)
    center_a, center_b = (mean(x.sum()) / count for x in (a, b))
    moments = [
        mean((x * y).sum()) / count for x, y in ((a - center_a, b - center_b), (a - center_a,) * 2, (b - center_b,) * 2)
    ]
    spread = (moments[1] * moments[2]).sqrt()
    return torch.where(spread > 1e-12, moments[0] / spread.clamp_min(1e-12), 0.0)


def names_of(functions: list[RewardFunction]) -> list[str]:
    """The functions' names, numbered where two are alike."""
    names = [getattr(function, "__name__", "reward_fn") for function in functions]
    return [name if names.count(name) == 1 else f"{name}_{names[:i].count(name) + 1}" for i, name in enumerate(names)]


def is_stretch(value) -> bool:
    """((start, stop), reward)."""
    pair = isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], list | tuple)
    return pair and len(value[0]) == 2 and all(isinstance(n, int) for n in value[0]) and is_number(value[1])


def completion_texts(rollout: Trajectory, tokenizer) -> list[str]:
    """What the policy said, without its stop tokens."""
    said = zip(rollout.tokens, rollout.action_mask, strict=True)
    return [tokenizer.decode(ids[mask].tolist()) for ids, mask in said]
