"""The directory of a run: only one run uses it at a time, and it is never overwritten by accident."""

import fcntl
import os
from pathlib import Path
from typing import TextIO

from runtime.files import remove, sync

# The files of a run, in the order of deletion: first those that resume=true would read, last those that identify
# the run. A directory with any of these holds a run.
LEAVES = (
    "checkpoints", "nonfinite", "model", "model.writing", "model.old", "adapter", "adapter.writing", "engine",
    "engine.writing", "engine.old", "metrics.jsonl", "samples.jsonl", "bad_rows.jsonl", "curves.png", "hacking.png",
    "calibration.png", "git.diff", "wandb", "config.yaml", "run.json",
)  # fmt: skip
DELETING = ".deleting"  # each is moved here, which is atomic, before its files are deleted
LOCK = ".lock"


def claim(directory: Path, *, may_hold_run: bool) -> TextIO:
    """Lock the directory for this process until the returned file is closed. Deletes unfinished files of a killed run.

    Raises:
        ValueError: another process holds the lock, the directory cannot be written, a part of it is a link, or it
            holds a run and may not (neither resume nor overwrite is set).
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = _lock(directory / LOCK)
    except BlockingIOError:
        raise ValueError(f"another run is writing {directory}; wait for it, or choose another hydra.run.dir") from None
    except OSError as error:
        raise ValueError(f"cannot write hydra.run.dir={directory}: {error.strerror}; choose another") from None
    parts = [*(directory / name for name in LEAVES), *directory.glob("checkpoints/step_*")]
    if linked := [path for path in parts if path.is_symlink()]:
        lock.close()
        raise ValueError(
            f"{linked[0]} is a link to {os.readlink(linked[0])}: a run writes and deletes only in its own directory; "
            "put the files themselves there, or let the whole directory be a link"
        )
    existing = [name for name in LEAVES if (directory / name).exists()]
    if existing and not may_hold_run:
        lock.close()
        raise ValueError(
            f"{directory} has a run ({', '.join(existing)}); set resume=true to continue it, overwrite=true to "
            "replace it, or "
            "choose another hydra.run.dir"
        )
    for name in LEAVES:
        for unfinished in directory.glob(f".{name}.*tmp"):  # left by a run that was killed while it wrote the file
            remove(unfinished)
    return lock


def _lock(path: Path) -> TextIO:
    """The file, opened and locked. Raises BlockingIOError: another process holds it."""
    while True:
        lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "w")  # locked until the run ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
                return lock
        except FileNotFoundError:
            pass  # the other run ended between the two lines and deleted the name: lock the new file
        except OSError:
            lock.close()
            raise
        lock.close()


def clear(directory: Path) -> None:
    """Delete the files of an earlier run, and nothing else. If it is killed, the rest cannot be resumed by mistake."""
    remove(directory / DELETING)
    for name in LEAVES:
        if (directory / name).exists():
            os.replace(directory / name, directory / DELETING)
            sync(directory)
            remove(directory / DELETING)
