"""The dashboard of a run, besides metrics.jsonl: wandb, Trackio or TensorBoard."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from runtime.config import check_choice

BACKENDS = ("wandb", "trackio", "tensorboard")


class Board:
    """The dashboard that log.backend names. A failure of it is reported once and never stops a training.

    A resumed run continues the board's run `id`, also if the board was off or failed meanwhile.
    """

    def __init__(self, cfg: DictConfig, directory: Path, *, job: str, run_id: str | None, say: Callable[[str], None]):
        self.say, self.name, self.id = say, cfg.log.backend, run_id
        self.open: Any = None  # the backend's Log, while it works
        if cfg.log.wandb != "disabled" or self.name != "wandb":
            self._try(lambda: self._start(cfg, directory, job))

    def log(self, step: int, row: dict[str, float]) -> None:
        """One row of metrics."""
        if self.open is not None:
            self._try(lambda: self.open.log(step, row))

    def log_samples(self, step: int, samples: list[dict]) -> None:
        """A table of sample texts; the fields of their records are only for the file."""
        columns = list(dict.fromkeys(name for sample in samples for name in sample if name != "columns"))
        rows = [[str(sample.get(name, "")) for name in columns] for sample in samples]
        if self.open is not None:
            self._try(lambda: self.open.log_samples(step, columns, rows))

    def close(self, exit_code: int) -> None:
        """Send everything that is waiting, and close the board."""
        if self.open is not None:
            self._try(lambda: self.open.close(exit_code))
        self.open = None

    def _start(self, cfg: DictConfig, directory: Path, job: str) -> None:
        backend, _, own = (self.id or "").partition(":")  # a run that another backend logged starts from step 0 here
        known = own if backend == self.name else None
        self.open = _backend(self.name).Log(cfg, directory, job=job, run_id=known, say=self.say)
        self.id = f"{self.name}:{self.open.id}"

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - a dashboard may fail in any way; the training must not
            self.say(f"{self.name} failed and is off for the rest of the run: {type(error).__name__}: {error}")
            self.open = None


def check_board(cfg: DictConfig) -> None:
    """Raise ValueError if log.backend is unknown or not installed, or its settings are invalid."""
    check_choice("log.backend", cfg.log.backend, BACKENDS)
    if cfg.log.backend == "wandb" and cfg.log.wandb == "disabled":
        return
    try:
        _backend(cfg.log.backend).check(cfg)
    except ImportError as error:
        name = cfg.log.backend
        raise ValueError(f"log.backend={name} is not installed ({error}); `pip install {name}`, or use wandb") from None


def _backend(name: str):
    return importlib.import_module(f"runtime.log_{name}")  # imported here, because it takes half a second
