"""Hostile files are refused by name, in seconds and without memory, whichever reader meets them.

pytest -s tests/faults/test_hostile_files.py     prints how many, the slowest and the largest
"""

import os
import re
import resource
import signal
import time
from pathlib import Path

import pytest

from tests.faults.hostile import HOSTILE

SECONDS, MEGABYTES = 5, 200


def data_bytes() -> int:
    """Private memory of this process."""
    return int(re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def refused(read, directory: Path) -> str:
    """In a fork that may take 5 s of its own and 200 MB more than it has: "" where `read` raised ValueError."""
    told = directory.with_suffix(".told")
    child = os.fork()
    if child == 0:
        os.chdir(directory)
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + MEGABYTES * 2**20,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + SECONDS + 1,) * 2)
        try:
            read(directory)
            told.write_text("it was read")
        except ValueError as error:
            told.write_text("" if str(error).isprintable() or "\n" in str(error) else f"unprintable: {error!r}")
        except BaseException as error:  # noqa: BLE001 - a panic of a library, too, is no refusal
            told.write_text(f"{type(error).__name__}: {error}")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"died of {signal.Signals(os.WTERMSIG(status)).name}"
    return told.read_text()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name, tmp_path):
    write, read = HOSTILE[name]
    directory = tmp_path / "files"
    directory.mkdir()
    write(directory)
    assert refused(read, directory) == ""
    assert not list(tmp_path.rglob("owned"))


def test_there_are_sixty_of_them():
    assert len(HOSTILE) >= 60
