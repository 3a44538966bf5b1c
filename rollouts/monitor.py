"""Detection of a policy that exploits its reward, by other rewards that it is not trained on."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rollouts.rewards import asked, completion_texts
from rollouts.sources import Source
from rollouts.trajectory import Trajectory
from runtime.metrics import wide
from runtime.plots import plot_against_kl

log = logging.getLogger(__name__)


def repeated_share(text: str, n: int = 3) -> float:
    """The share of a text's runs of n words that occurred earlier in it; 0 if it has none."""
    words = text.lower().split()
    runs = list(zip(*(words[i:] for i in range(n)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def unique_share(text: str) -> float:
    """The share of a text's words that are first occurrences. 0 for a text without words."""
    words = text.lower().split()
    return len(set(words)) / len(words) if words else 0.0


class Monitor:
    """Rewards that are measured at every evaluation, and a warning if the score rises while one of them falls.

    Args:
        sources: the rewards in `watch`, in addition to the figures of every text. patience: evaluations in a row.
        mean: averages a scalar tensor over ranks (`run.mean`). picture: file of a plot of both over the KL.
    """

    def __init__(
        self, sources: list[Source], tokenizer, *, patience: int, mean: Callable[[Tensor], Tensor], picture: Path
    ):
        self.sources, self.tokenizer, self.patience, self.mean, self.picture = (
            sources,
            tokenizer,
            patience,
            mean,
            picture,
        )
        self.seen: list[dict] = []  # for every evaluation: its step, and (mean, half of the 95 % interval) by name

    def figures(self, rollout: Trajectory, prefix: str = "objective") -> dict[str, Tensor]:
        """Metrics of every rollout: the repetition in its texts."""
        texts = completion_texts(rollout, self.tokenizer)
        shares = {"repetition": map(repeated_share, texts), "unique_words": map(unique_share, texts)}
        device = rollout.tokens.device
        return {f"{prefix}/{name}": torch.tensor(list(values), device=device) for name, values in shares.items()}

    def evaluated(
        self, step: int, rollout: Trajectory | None, scores: Tensor, kl: Tensor, *, last: bool
    ) -> dict[str, Tensor]:
        """Metrics of an evaluation. Warns if the reward is exploited; plots then and at the last evaluation.

        All ranks call it. rollout is this rank's, or None if it has no held-out prompt. scores, kl: (B,).
        """
        rows = {"score": scores, "kl": kl}
        for source in self.sources:
            rows[source.name] = scores[:0]
        for source, values, _ in asked(self.sources, rollout, self.tokenizer) if rollout else ():
            known = [x if x is not None else source.unjudged for x in values]
            if bad := [x for x in known if not (x is None or isinstance(x, int | float))]:
                raise ValueError(
                    f"watch: {source.name} returned {str(bad[0])[:80]}; it must return a number for each completion, "
                    "or None"
                )
            rows[source.name] = scores.new_tensor([float(x) for x in known if x is not None])
        self.seen.append({"step": step} | {name: self.interval(values) for name, values in rows.items()})
        if self.sources and (self.warn() or last):
            plot_against_kl(self.picture, self.seen, [source.name for source in self.sources])
        figures = {f"eval/watch/{source.name}": rows[source.name] for source in self.sources}
        return figures | (self.figures(rollout, "eval") if rollout else {})

    def interval(self, values: Tensor) -> tuple[float, float]:
        """The mean over the rows of all ranks and half of its 95 % interval. NaN without a row."""
        values = wide(values)
        count = self.mean(values.new_tensor(float(len(values))))
        center = self.mean(values.sum()) / count
        squares = self.mean((values - center).square().sum())
        ranks = 1 if not torch.distributed.is_initialized() else torch.distributed.get_world_size()
        error = (squares / count / (count * ranks - 1)).sqrt()
        return center.item(), 1.96 * error.item()

    def warn(self) -> bool:
        """Warn if, beyond their errors, the score rose at each of the last evaluations and a watched reward fell."""
        last = self.seen[-self.patience - 1 :]
        if len(last) <= self.patience:
            return False

        def moves(name: str, sign: int) -> bool:
            means = [row[name][0] for row in last]
            steady = all(sign * (b - a) > 0 for a, b in zip(means, means[1:], strict=False))
            error = (last[0][name][1] ** 2 + last[-1][name][1] ** 2) ** 0.5
            return steady and abs(means[-1] - means[0]) > error

        exploited = [s for s in self.sources if moves("score", 1) and moves(s.name, -1)]
        for source in exploited:
            (a, b), (c, d) = ((last[0][name], last[-1][name]) for name in ("score", source.name))
            log.warning(
                "step %d: in %d evaluations in a row the score rose (%.3g to %.3g, +- %.2g) while %s fell (%.3g to "
                "%.3g, +- %.2g): the policy may be exploiting its reward. Stop at an earlier checkpoint, raise "
                "kl_coef, or correct the reward; %s shows both", last[-1]["step"], self.patience, a[0], b[0], b[1],
                source.name, c[0], d[0], d[1], self.picture.name,
            )  # fmt: skip
        return bool(exploited)

    def state_dict(self) -> dict:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict) -> None:
        self.seen = [
            {name: value if name == "step" else tuple(value) for name, value in row.items()} for row in state["seen"]
        ]
