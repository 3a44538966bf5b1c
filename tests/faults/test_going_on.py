"""Going on with a run: what is refused, what is kept, and what is said when there is trouble on the way."""

import json
import os
from pathlib import Path

import pytest
import torch
import wandb
from omegaconf import OmegaConf

import runtime.run
import train_dpo
import train_sft
from runtime import directory
from runtime.run import Run
from runtime.script import enter


@pytest.fixture
def sft(run_script, sft_words, tmp_path):
    """sft(*words) -> exit code of a training of 2 steps in tmp_path/run."""
    words = [*sft_words, "num_steps=2", "eval_every=0", "sample_every=0", f"hydra.run.dir={tmp_path}/run"]
    return lambda *more: run_script(train_sft, *words, *more)


def test_a_finished_run_without_checkpoints_is_not_begun_again_by_resume(sft, tmp_path, capsys):
    assert sft("save_every=0") == 0
    weights = (tmp_path / "run/model/model.safetensors").stat().st_mtime_ns
    assert sft("save_every=0", "resume=true") == 2
    assert "finished run without checkpoints" in capsys.readouterr().err
    assert (tmp_path / "run/model/model.safetensors").stat().st_mtime_ns == weights
    assert sft("save_every=0", "resume=true", "overwrite=true") == 0  # to resume where one can, to begin where not


def test_resume_in_the_directory_of_another_run_deletes_nothing(sft, run_script, tmp_path, capsys):
    """Also where that run has no checkpoint yet: its config tells."""
    assert sft("save_every=0") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert sft("save_every=0", "resume=true", "optim.lr=3e-3") == 2
    assert "optim.lr: 0.01 -> 0.003" in capsys.readouterr().err
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(8)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"policy={tmp_path}/run/model", f"data.train=[{pairs}]", "batch_size=4", "micro_batch_size=4"]
    words += ["num_steps=1", "log.wandb=disabled", f"hydra.run.dir={tmp_path}/run", "resume=true"]
    assert run_script(train_dpo, *words) == 2
    assert "this has changed" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_how_often_a_run_is_looked_at_changes_no_weight(sft, tmp_path):
    """So a resume may change it, also where the training draws dropout's noise."""
    weights = []
    for words in ("eval_every=1", "sample_every=1"), ("eval_every=0", "sample_every=0"):
        assert sft("residual_dropout=[0.1,0.1]", "overwrite=true", "save_every=0", *words) == 0
        weights.append((tmp_path / "run/model/model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_latest_leads_to_the_checkpoint_a_run_went_on_from(sft, tmp_path):
    assert sft("save_every=1") == 0
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").symlink_to("step_000001")  # as a kill between the renaming and the link leaves it
    assert sft("save_every=1", "resume=true") == 0
    assert os.readlink(checkpoints / "latest") == "step_000002"


def test_a_metric_that_keep_best_does_not_find_is_said(sft, tmp_path, capsys):
    assert sft("save_every=1", "keep_last=1", "keep_best=eval/los") == 0
    assert "keep_best=eval/los: no checkpoint" in capsys.readouterr().err
    assert sft("save_every=1", "keep_last=1", "keep_best=-perf/step_seconds", "overwrite=true") == 0
    assert "keep_best" not in capsys.readouterr().err


@pytest.mark.parametrize("how", ["offline", "disabled", "failing"])
def test_a_resumed_run_goes_on_with_its_wandb_run(how, tmp_path, monkeypatch, capsys):
    """Also when wandb was off, or failed, in between."""
    ids = []
    init = wandb.init

    def noted(**words):
        ids.append((words["id"], words["resume"]))
        return init(**words)

    def fail(**words):
        raise RuntimeError("no such host")

    cfg = {"name": "test", "run_dir": str(tmp_path / "run"), "seed": 0, "resume": False, "resume_anyway": False}
    cfg |= {"overwrite": False, "num_steps": 1, "save_every": 1, "keep_last": 1, "dist": {"strategy": "single"}}

    def go(steps: int, mode: str, start) -> str:
        monkeypatch.setattr(wandb, "init", start)
        log = {"backend": "wandb", "wandb": mode, "project": "helpful"}
        optim = {"schedule": "constant"}
        with Run(OmegaConf.create(cfg | {"num_steps": steps, "resume": steps > 1, "log": log, "optim": optim})) as run:
            run.resume()
            while run.step < steps:
                run.metrics.add({"x": 1.0})
                run.end_step(num_tokens=1)
            return run._snapshot()["board_id"].removeprefix("wandb:")

    first = go(1, "offline", noted)
    assert go(2, "disabled" if how == "disabled" else "offline", fail if how == "failing" else noted) == first
    assert go(3, "offline", noted) == first
    assert ids[0] == (None, None) and set(ids[1:]) == {(first, "allow")}
    files = list((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(files) == len(ids) and all(first in path.name for path in files)  # two within a second: -1 at the end


def test_a_lock_whose_name_was_taken_away_is_not_a_lock(tmp_path, monkeypatch):
    """The run that ended unlinked the file between another's open and flock: locking it would lock nobody out."""
    lock, flock = tmp_path / directory.LOCK, directory.fcntl.flock
    tries = []

    def ended_meanwhile(file, how):
        if not tries:
            lock.unlink()
        tries.append(os.fstat(file.fileno()).st_ino)
        flock(file, how)

    monkeypatch.setattr(directory.fcntl, "flock", ended_meanwhile)
    with directory._lock(lock) as held:
        assert len(tries) == 2 and os.fstat(held.fileno()).st_ino == lock.stat().st_ino
        with pytest.raises(BlockingIOError):
            directory._lock(lock)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError("Unable to allocate 8.00 GiB for an array"),
    ],
    ids=["gpu", "torch on the CPU", "numpy"],
)
def test_out_of_memory_names_the_settings_to_lower(error, sft, monkeypatch, capsys):
    def out_of_memory(*args, **words):
        raise error

    monkeypatch.setattr(train_sft, "sft_loss", out_of_memory)
    assert sft() == 1
    told = capsys.readouterr().err
    assert f"out of memory ({error})" in told
    assert "lower micro_batch_size=4 or data.max_length=512 or" in told and "precision=bf16" in told


def test_other_errors_are_no_lack_of_memory(monkeypatch):
    def bug(cfg):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("sys.argv", ["plan.py", "script=train_sft"])
    with pytest.raises(RuntimeError, match="shapes differ"):
        enter(bug, "plan")


@pytest.mark.parametrize(
    "error, text",
    [
        (FileNotFoundError(2, "No such file or directory", "a.jsonl"), "error: a.jsonl: No such file or directory; "),
        (FileNotFoundError("No such file: b.safetensors"), "error: No such file: b.safetensors; "),  # as of safetensors
    ],
)
def test_a_file_that_cannot_be_read_is_named(error, text, monkeypatch, capsys):
    def missing(cfg):
        raise error

    monkeypatch.setattr("sys.argv", ["plan.py", "script=train_sft"])
    with pytest.raises(SystemExit) as ended:
        enter(missing, "plan")
    assert ended.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.parametrize("how", ["| head -1", ">&-"])
def test_a_run_goes_on_when_nobody_reads_its_output(how, sft, tmp_path, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", None if how == ">&-" else stdout)
        assert sft() == 0
    assert (tmp_path / "run/model/model.safetensors").exists()
    assert "Error" not in capsys.readouterr().err


def test_a_directory_that_may_no_longer_be_written_is_a_failure_not_bad_input(sft, tmp_path, monkeypatch, capsys):
    def denied(path: Path, row: dict):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(runtime.run, "append_row", denied)
    assert sft() == 1
    assert "Permission denied" in (told := capsys.readouterr().err) and "nothing was saved" in told
