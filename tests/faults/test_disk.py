"""A disk that is full: the run stops with a message, and goes on from its last good checkpoint.

The disk is a real one, of 6 MB (tmpfs); where none may be mounted, the tests are skipped.
"""

import shutil
import subprocess

import pytest

from tests.faults.kills import Training
from tests.faults.test_kills import EVERY_DOOR, TINY

LONG = pytest.mark.slow


@pytest.fixture
def disk(tmp_path):
    """A directory on a disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.parametrize(
    "free, where", [(150, "save"), pytest.param(370, "save", marks=LONG), pytest.param(0, "at once", marks=LONG)]
)
def test_a_full_disk_stops_a_run_with_a_message_and_loses_nothing(free, where, disk, tmp_path, coffee):
    """With 150 kB the tensors' file of the next save breaks off, with 370 kB one that comes after it."""
    words = [*TINY, *EVERY_DOOR, f"data.train=[{coffee['train']}]", "batch_size=8", "eval_every=0", "sample_every=0"]
    words.append("optim.schedule=constant")  # may be prolonged
    left_alone = Training("train_sft", [*words, "num_steps=5"], tmp_path / "whole")
    left_alone.finish()
    struck = Training("train_sft", words, disk / "run")
    struck.log = tmp_path / "run.log"  # outside the full disk
    struck.finish("num_steps=2")
    (disk / "others").write_bytes(bytes(shutil.disk_usage(disk).free - 1024 * free))
    process = struck.start("num_steps=5", "resume=true")
    process.join()
    told = struck.log.read_text()
    assert process.exitcode == 1 and "Traceback" not in told
    assert told.count("error:") == 1 and "No space left" in told.splitlines()[-1]
    if where == "save":
        assert "after step 3" in told and "last good checkpoint is step_000002; the same command with resume" in told
        assert (disk / "run/checkpoints/.step_000003.tmp").exists()
    (disk / "others").unlink()
    struck.finish("num_steps=5", "resume=true")
    assert f"resumed from {disk}/run/checkpoints/step_000002" in struck.log.read_text().split("error:")[1]
    assert struck.result() == left_alone.result()
    assert not list(disk.glob("run/checkpoints/.*"))
