"""Runs that are seeds of one training: directories called NAME_0, NAME_1, ..."""

import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf


def runs_by_training(directories: Sequence[str]) -> dict[str, list[str]]:
    """{training: its runs}, in the order of the directories. A directory without a number is a training of its own.

    Raises:
        ValueError: two runs of a training have the same seed in config.yaml. They are one sample, not two.
    """
    trainings: dict[str, list[str]] = {}
    for directory in directories:
        trainings.setdefault(re.sub(r"_\d+$", "", Path(directory).name), []).append(directory)
    for name, runs in trainings.items():
        first: dict[int, str] = {}
        for run in runs:
            config = Path(run) / "config.yaml"
            seed = OmegaConf.load(config).get("seed") if len(runs) > 1 and config.is_file() else None
            if seed is not None and first.setdefault(seed, run) != run:
                raise ValueError(
                    f"{first[seed]} and {run} are seeds of {name}, but both have seed={seed}; run one of them again "
                    "with another seed, or leave it out"
                )
    return trainings
