"""A run for TensorBoard (log.backend=tensorboard): `tensorboard --logdir runs` shows every run below runs/."""

from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch.utils.tensorboard import SummaryWriter


def check(cfg: DictConfig) -> None:
    """There is nothing to check: events are in the run's own directory."""


class Log:
    """Events in RUN_DIR/tensorboard. A resumed run writes a further file there."""

    def __init__(self, cfg: DictConfig, directory: Path, *, job: str, run_id: str | None, say: Callable[[str], None]):
        self.id = run_id or str(directory / "tensorboard")
        self.writer = SummaryWriter(directory / "tensorboard")
        self.writer.add_text("config", f"```yaml\n{OmegaConf.to_yaml(cfg, resolve=True)}```")

    def log(self, step: int, row: dict[str, float]) -> None:
        """One row of metrics."""
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)

    def log_samples(self, step: int, columns: list[str], rows: list[list[str]]) -> None:
        """Sample texts, one below the other."""
        texts = ["\n".join(f"    {name}: {cell}" for name, cell in zip(columns, row, strict=True)) for row in rows]
        self.writer.add_text("samples", "\n\n".join(texts), step)

    def close(self, exit_code: int) -> None:
        """Write everything that is waiting."""
        self.writer.close()
