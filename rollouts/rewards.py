"""The rewards of a rollout, from a reward model, Python functions, the environment, or several of these.

A function is called as `function(prompts, completions, **columns)` (`rollouts/reward_functions.py`) and returns for
every row one of
    1.5                     the completion's reward, given at its end
    [0.0, 0.5, ...]         a reward for each of its tokens, including the stop token (column `tokens`: their ids)
    [((0, 12), 1.0), ...]   rewards of spans of its text, as (first character, one past the last)
    None                    no verdict: the row is left out of the loss and of the means, and counted
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rollouts.parts import of_actions
from rollouts.reward_functions import RewardFailed, call_rows, gather_columns, is_number, prompt_text
from rollouts.sources import REWARD_MODEL, Source
from rollouts.trajectory import Part, Trajectory
from runtime.devices import widest


class Scorer:
    """Computes the rewards of rollouts.

    Args:
        reward_model: frozen, or None. sources: all sources (`rollouts/sources.py`), including the reward model.
        tokenizer: decodes the texts for the functions. micro_batch_size: rows per forward.
        mean: averages a scalar tensor over ranks (`run.mean`).
    """

    def __init__(
        self,
        reward_model,
        sources: list[Source],
        tokenizer,
        *,
        micro_batch_size: int,
        mean: Callable[[Tensor], Tensor] = lambda value: value,
    ):
        if not sources:
            raise ValueError("nothing gives a reward: set reward_model=PATH, reward=NAME (docs/rewards.md), or both")
        self.reward_model, self.tokenizer, self.micro_batch_size = reward_model, tokenizer, micro_batch_size
        self.sources, self.mean = {source.name: source for source in sources}, mean

    @torch.no_grad()
    def __call__(self, rollout: Trajectory, parts: list[Part] | None = None, *, learned_from: bool = False) -> Tensor:
        """(B, T) weighted sum of the sources' rewards. The rewards of each source are stored in rollout.rewards.

        Args:
            parts: the packed rollout, if the caller has it.
            learned_from: whether the policy learns from it. Only then running scales are updated and rewards
                normalised, so that all evaluations are on one scale.
        Raises:
            ValueError: a function returns another value, or a reward is not finite. The message names the row.
        """
        if self.reward_model is not None:
            parts = parts or rollout.parts(self.micro_batch_size)
            scores = of_actions(self.reward_model.score, parts).float()
            rollout.rewards[REWARD_MODEL] = torch.where(rollout.done, scores[:, None], 0.0)
        functions = [source for source in self.sources.values() if source.function]
        for source, returned, texts in asked(functions, rollout, self.tokenizer):
            rollout.rewards[source.name] = self.on_tokens(source, returned, rollout, texts)
        self.check(rollout)
        total = torch.zeros(rollout.tokens.shape, device=rollout.tokens.device)
        for source in self.sources.values():
            rewards = rollout.rewards[source.name]
            if source.normalise and learned_from:
                source.scale.update(rewards.sum(1)[rollout.judged], self.mean)
                rewards = (rewards - source.scale.center * rollout.done) / source.scale.deviation
            rewards = rewards if source.clip is None else rewards.clamp(-source.clip, source.clip)
            total = total + source.weight * rewards
        return total

    def on_tokens(self, source: Source, returned: list, rollout: Trajectory, texts: list[str]) -> Tensor:
        """(B, T) float32: a function's rewards, each on its token."""
        name, rewards = source.name, torch.zeros(rollout.tokens.shape, dtype=torch.float32)
        masks, last = rollout.action_mask.cpu(), rollout.done.int().argmax(1).tolist()
        for row, value in enumerate(returned):
            value = value.tolist() if hasattr(value, "tolist") else value
            value = source.unjudged if value is None else value
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
                ]  # number of characters up to each token
                columns = masks[row].nonzero().flatten().tolist()
                for (start, stop), reward in value:
                    if not 0 <= start < stop <= len(texts[row]):
                        raise RewardFailed(
                            f"reward function {name} rewards characters {start} to {stop} of row {row}, whose "
                            "completion "
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
        """Raise ValueError if a reward is not finite."""
        for name, rewards in rollout.rewards.items():
            if not rewards.isfinite().all():
                row = int((~rewards.isfinite()).any(1).nonzero()[0])
                raise ValueError(
                    f"{name}: the score of row {row} is {rewards[row].sum().item()}: prompt {rollout.where[row]}, "
                    f"completion {completion_texts(rollout, self.tokenizer)[row][:200]!r}; the reward model or the "
                    "policy has diverged: lower optim.lr, or check the last samples"
                )

    def figures(self, rollout: Trajectory) -> dict[str, Tensor]:
        """Metrics of the sources: mean reward of each per row, before scales and weights, and their correlations."""
        figures = {"objective/unjudged": ~rollout.judged}
        if len(self.sources) < 2:
            return figures
        totals = {name: rollout.rewards[name].sum(1)[rollout.judged] for name in self.sources}
        names = list(totals)
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        figures |= {f"objective/reward/{name}": total for name, total in totals.items()}
        return figures | {
            f"objective/correlation/{a}/{b}": correlation(totals[a], totals[b], self.mean) for a, b in pairs
        }

    def state_dict(self) -> dict[str, list[float]]:
        """The running scales."""
        scales = {name: source.scale for name, source in self.sources.items() if source.normalise}
        return {name: [scale.count, scale.center, scale.squares] for name, scale in scales.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        for name, (count, center, squares) in state.items():
            scale = self.sources[name].scale
            scale.count, scale.center, scale.squares = count, center, squares


def asked(sources: list[Source], rollout: Trajectory, tokenizer) -> Iterator[tuple[Source, list, list[str]]]:
    """(source, its value for every row, the texts of the completions) for each source."""
    if not sources:
        return
    texts = completion_texts(rollout, tokenizer)
    prompts, columns = [prompt_text(prompt) for prompt in rollout.prompts], gather_columns(rollout.prompts)
    columns["tokens"] = [ids[mask].tolist() for ids, mask in zip(rollout.tokens, rollout.action_mask, strict=True)]
    for source in sources:
        yield source, call_rows(source.function, prompts, texts, columns), texts


def correlation(a: Tensor, b: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """() Pearson's correlation over the rows of all ranks. 0 if one of the two is constant."""
    a, b = a.to(widest(a.device)), b.to(widest(b.device))
    count = mean(torch.tensor(float(len(a)), device=a.device)).clamp_min(1e-12)
    center_a, center_b = (mean(x.sum()) / count for x in (a, b))
    moments = [
        mean((x * y).sum()) / count for x, y in ((a - center_a, b - center_b), (a - center_a,) * 2, (b - center_b,) * 2)
    ]
    spread = (moments[1] * moments[2]).sqrt()
    return torch.where(spread > 1e-12, moments[0] / spread.clamp_min(1e-12), 0.0)


def is_stretch(value) -> bool:
    """Whether the value is ((start, stop), reward)."""
    pair = isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], list | tuple)
    return pair and len(value[0]) == 2 and all(isinstance(n, int) for n in value[0]) and is_number(value[1])


def completion_texts(rollout: Trajectory, tokenizer) -> list[str]:
    """The policy's texts, without stop tokens."""
    sampled = rollout.turn >= 0  # not action_mask, which lacks the rows that are left out of training
    return [tokenizer.decode(ids[mask].tolist()) for ids, mask in zip(rollout.tokens, sampled, strict=True)]
