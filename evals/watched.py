"""`watch`: rewards that score a training's answers to held-out prompts, and are not trained on."""

from collections.abc import Sequence

import torch
from omegaconf import DictConfig
from torch import Tensor

from rollouts.reward_functions import call_rows, gather_columns, prompt_text
from rollouts.sources import check_columns, read_sources
from runtime.run import Run


class Watched:
    """The rewards that `watch` names, applied to answers.

    Args:
        seconds: for a reply of a reward (`reward_timeout`). has_answers: whether answers to data.prompts are sampled.
    Raises:
        ValueError: `watch` names a reward, and there are no such answers.
    """

    def __init__(self, watch: DictConfig | None, run: Run, *, seconds: float, has_answers: bool):
        self.sources = read_sources("watch", watch, run.dir / "watched", seconds)
        if self.sources and not has_answers:
            raise ValueError(
                "watch scores the answers to data.prompts, every sample_every steps; give data.prompts=[FILES]"
            )
        self.device = run.device

    def check(self, prompts: Sequence[dict]) -> None:
        """Raise ValueError if a reward reads a column that no prompt has, or cannot judge one of the prompts."""
        if self.sources:
            check_columns("watch", self.sources, prompts)

    def figures(self, prompts: Sequence[dict], texts: list[str]) -> dict[str, Tensor]:
        """{"eval/watch/NAME": (n,) scores of the answers}. Answers that a reward cannot judge are left out.

        Args:
            prompts: items of `data/prompts.py`. texts: the answer to each, without its stop token.
        Raises:
            ValueError: a reward returns anything but a number or None for each answer.
        """
        if not self.sources:  # the prompts may then be from conversations, which have no columns
            return {}
        figures, columns = {}, gather_columns(list(prompts))
        for source in self.sources:
            scores = call_rows(source.function, [prompt_text(prompt) for prompt in prompts], texts, columns)
            known = [value if value is not None else source.unjudged for value in scores]
            if bad := [value for value in known if not (value is None or isinstance(value, int | float))]:
                raise ValueError(
                    f"watch: {source.name} returned {str(bad[0])[:80]}; it must return a number for each completion, "
                    "or None"
                )
            values = [float(value) for value in known if value is not None]
            figures[f"eval/watch/{source.name}"] = torch.tensor(values, device=self.device)
        return figures
