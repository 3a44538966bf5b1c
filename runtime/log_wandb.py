"""A run in Weights & Biases (log.backend=wandb)."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import wandb
from omegaconf import DictConfig, OmegaConf

from runtime.config import check_choice

MODES = ("online", "offline", "disabled")


def check(cfg: DictConfig) -> None:
    """Raise ValueError if log.wandb is not one of MODES."""
    check_choice("log.wandb", cfg.log.wandb, MODES)


class Log:
    """One wandb run. A resumed run continues the run with this `id`."""

    def __init__(self, cfg: DictConfig, directory: Path, *, job: str, run_id: str | None, say: Callable[[str], None]):
        mode = cfg.log.wandb
        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.login(prompt=False, verify=False)):
            mode = "offline"
            say(f"wandb: there is no login, so the run stays in {directory / 'wandb'} (`wandb sync` sends it)")
        config: Any = OmegaConf.to_container(cfg, resolve=True)
        setting = ", ".join(
            word for word in job.split(", ") if not word.startswith("seed=")
        )  # the dashboard groups by it
        self.run = wandb.init(
            project=cfg.log.project,
            group=cfg.name,
            name=job,
            id=run_id,
            resume="allow" if run_id else None,
            dir=directory,
            config=config | {"setting": setting},
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
        )
        self.id = self.run.id

    def log(self, step: int, row: dict[str, float]) -> None:
        """One row of metrics."""
        self.run.log(row, step=step)

    def log_samples(self, step: int, columns: list[str], rows: list[list[str]]) -> None:
        """A table of sample texts."""
        self.run.log({"samples": wandb.Table(columns=columns, data=rows)}, step=step)

    def close(self, exit_code: int) -> None:
        """Send everything that is waiting."""
        self.run.finish(exit_code=exit_code)
