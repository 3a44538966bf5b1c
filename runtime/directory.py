"""The directory of a run: one run at a time, never written over by accident."""

import fcntl
import os
import shutil
from pathlib import Path
from typing import TextIO

from omegaconf import DictConfig

# What a run leaves; a directory with any of these holds a run.
LEAVES = (
    "run.json", "config.yaml", "git.diff", "metrics.jsonl", "samples.jsonl", "bad_rows.jsonl", "curves.png", "model",
    "model.writing", "model.old", "adapter", "engine", "engine.writing", "engine.old", "checkpoints", "nonfinite",
    "wandb",
)  # fmt: skip
LOCK = ".lock"


def claim(directory: Path, cfg: DictConfig) -> TextIO:
    """Hold the directory for this process until the returned file is closed. Writes nothing else.

    Raises:
        ValueError: another process holds it, it cannot be written, or it holds a run and neither resume nor overwrite
            was asked for.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = _lock(directory / LOCK)
    except BlockingIOError:
        raise ValueError(f"another run is writing {directory}; wait for it, or choose another hydra.run.dir") from None
    except OSError as error:
        raise ValueError(f"cannot write hydra.run.dir={directory}: {error.strerror}; choose another") from None
    held = [name for name in LEAVES if (directory / name).exists()]
    if held and not (cfg.resume or cfg.overwrite):
        lock.close()
        raise ValueError(
            f"{directory} holds a run ({', '.join(held)}); say resume=true to go on, overwrite=true to replace it, or "
            "choose another hydra.run.dir"
        )
    return lock


def _lock(path: Path) -> TextIO:
    """The file, opened and locked. Raises BlockingIOError: another process holds it."""
    while True:
        lock = open(path, "w")  # noqa: SIM115 - held until the run ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
                return lock
        except FileNotFoundError:
            pass  # the run that ended between the two lines took the name away with it: lock the new file
        except OSError:
            lock.close()
            raise
        lock.close()


def clear(directory: Path) -> None:
    """Delete what an earlier run left, and nothing else."""
    for name in LEAVES:
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
