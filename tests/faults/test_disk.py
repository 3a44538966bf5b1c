"""A disk that is full: the run stops with a message, and goes on from its last good checkpoint.

The disk is a real one, of 6 MB (tmpfs); where none may be mounted, the tests are skipped.
"""

import os
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest

import train_dpo
import train_sft
from arena.store import Store
from data import tokenizer
from data.records import write_jsonl
from generation.answer_store import AnswerStore
from model.build import load_policy
from runtime.files import write_whole
from runtime.metrics import append_row, each_log_row
from tests.faults.kills import Training
from tests.faults.test_kills import EVERY_SCRIPT, TINY
from tests.faults.test_same_inputs import models, place, words_of  # noqa: F401 - fixtures

LONG = pytest.mark.slow


@pytest.fixture
def disk(tmp_path):
    """A directory on a disk of its own."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", mounted], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield mounted
    subprocess.run(["umount", "--lazy", mounted], check=True)


@pytest.mark.parametrize(
    "free, where", [(150, "save"), pytest.param(370, "save", marks=LONG), pytest.param(0, "at once", marks=LONG)]
)
def test_a_full_disk_stops_a_run_with_a_message_and_loses_nothing(free, where, disk, tmp_path, coffee):
    """With 150 kB the tensors' file of the next save breaks off, with 370 kB one that comes after it."""
    words = [*TINY, *EVERY_SCRIPT, f"data.train=[{coffee['train']}]", "batch_size=8", "eval_every=0", "sample_every=0"]
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


@pytest.fixture
def full(disk):
    """full(kilobytes) fills the disk but for so many; returns the file that takes the room."""

    def full(kilobytes: int) -> Path:
        taken = disk / "others"
        taken.write_bytes(bytes(max(shutil.disk_usage(disk).free - 1024 * kilobytes, 0)))
        return taken

    return full


def test_a_full_disk_at_the_export_is_named_and_resume_exports(full, disk, run_script, place, capfd):  # noqa: F811
    words = [*words_of("train_sft", place), f"hydra.run.dir={disk}/run", "num_steps=1"]
    taken, export = None, train_sft.export_model

    def export_to_a_full_disk(*given):
        nonlocal taken
        taken = full(8)
        export(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sft, "export_model", export_to_a_full_disk)
        assert run_script(train_sft, *words) == 1
    told = capfd.readouterr().err
    assert "after step 1:" in told and str(disk / "run/model.writing") in told and "Traceback" not in told
    assert "the last good checkpoint is step_000001" in told and not (disk / "run/model").exists()
    taken.unlink()
    assert run_script(train_sft, *words, "resume=true") == 0 and load_policy(disk / "run/model")


def test_a_full_disk_at_the_reference_cache_is_named(full, disk, run_script, place, capfd):  # noqa: F811
    full(0)
    words = [*words_of("train_dpo", place), f"ref_cache={disk}/cache", "num_steps=1"]
    assert run_script(train_dpo, *words) == 1
    told = capfd.readouterr().err
    assert str(disk / "cache") in told and "Traceback" not in told and not list(disk.rglob("*.safetensors"))


ROWS = [{"text": "x" * 2000}] * 100
WRITERS = {  # name of what is there before -> how another 200 kB of it are written
    "rows.jsonl": lambda path: write_jsonl(path, ROWS),
    "rows.jsonl.gz": lambda path: write_jsonl(path, [{"text": os.urandom(10**5).hex()}]),
    "page.html": lambda path: write_whole(path, "x" * 200_000),
    "metrics.jsonl": lambda path: append_row(path, {"step": 2, "text": "x" * 200_000}),
    "tokenizer.model": lambda path: tokenizer._write(path, bytes(200_000)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_names_the_file_and_leaves_what_was_there(name, full, disk):
    path = disk / name
    path.write_text('{"step": 1}\n')
    full(8)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        WRITERS[name](path)
    assert path.read_text().startswith('{"step": 1}\n')
    assert name == "metrics.jsonl" or path.read_text() == '{"step": 1}\n'
    if name == "metrics.jsonl":  # what broke off is no row
        assert list(each_log_row(path)) == [{"step": 1}]


def test_a_full_disk_at_the_answers_keeps_those_that_are_there(full, disk):
    store = AnswerStore(disk / "cache")
    store.put("first", {"text": "kept"})
    taken = full(8)
    with pytest.raises(OSError, match="answers.sqlite: .*full.*answers so far are kept"):
        store.put("second", {"text": os.urandom(50_000).hex()})
    assert store.get("first") == {"text": "kept"} and store.get("second") is None
    taken.unlink()
    store.put("second", {"text": "later"})
    assert AnswerStore(disk / "cache").get("second") == {"text": "later"}


def test_no_answers_are_begun_on_a_full_disk(full, disk):
    full(0)
    with pytest.raises(OSError, match="answers.sqlite"):
        AnswerStore(disk / "cache").put("a", {})


def test_nobody_is_thanked_for_a_vote_that_a_full_disk_did_not_take(full, disk):
    store, thanked = Store(disk / "arena.sqlite"), []
    for number in range(3):
        store.begin_battle(f"b{number}", "v", "x", "y")
        store.add_turn(f"b{number}", 0, "p", "a", "b")
    store.vote("b0", "v", "a")
    taken = full(0)
    for number in range(1000):
        try:
            store.begin_battle(f"c{number}", "v", "x" * 2000, "y")
            thanked.append(f"c{number}")
        except sqlite3.Error:
            break
    else:
        raise AssertionError("the disk was not full")
    taken.unlink()
    store.vote("b1", "v", "b")
    store.close()
    store = Store(disk / "arena.sqlite")
    assert [battle["verdict"] for battle in store.battles()] == ["a", "b"]
    assert {row["id"] for row in store.read("SELECT id FROM battles")} == {"b0", "b1", "b2", *thanked}
    store.close()
