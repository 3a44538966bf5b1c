"""A run in Trackio (log.backend=trackio): `trackio show --project helpful` opens the dashboard on this machine."""

from collections.abc import Callable
from pathlib import Path

import trackio
from omegaconf import DictConfig, OmegaConf


def check(cfg: DictConfig) -> None:
    """There is nothing to check: Trackio stores its runs on this machine, in TRACKIO_DIR."""


class Log:
    """One Trackio run, named by its directory. A resumed run continues it."""

    def __init__(self, cfg: DictConfig, directory: Path, *, job: str, run_id: str | None, say: Callable[[str], None]):
        self.id = run_id or f"{job} {directory.resolve().name}"
        self.run = trackio.init(
            project=cfg.log.project,
            name=self.id,
            group=cfg.name,
            resume="allow" if run_id else "never",
            config=OmegaConf.to_container(cfg, resolve=True),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, row: dict[str, float]) -> None:
        """One row of metrics."""
        self.run.log(row, step=step)

    def log_samples(self, step: int, columns: list[str], rows: list[list[str]]) -> None:
        """A table of sample texts."""
        self.run.log({"samples": trackio.Table(columns=columns, data=rows)}, step=step)

    def close(self, exit_code: int) -> None:
        """Write everything that is waiting."""
        self.run.finish()
