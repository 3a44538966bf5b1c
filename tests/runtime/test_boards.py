"""A run's figures and samples in TensorBoard and Trackio, read back by their own readers."""

import importlib
import logging.config

import pytest
from absl.logging import get_absl_handler
from omegaconf import OmegaConf

from runtime.board import Board

ROWS = {1: {"objective/loss": 2.5, "optim/lr": 1e-3}, 2: {"objective/loss": 2.25, "optim/lr": 5e-4}}
SAMPLES = [{"prompt": "Hi", "completion": "Hello."}, {"prompt": "Tea?", "score": 0.5}]


def write(backend, directory, rows, run_id=None):
    """What a run does with its board; returns the id that a resumed run is given."""
    log = {"backend": backend, "wandb": "offline", "project": "helpful"}
    board = Board(
        OmegaConf.create({"name": "group", "seed": 7, "log": log}), directory, job="job", run_id=run_id, say=pytest.fail
    )
    for step, row in rows.items():
        board.log(step, row)
        board.log_samples(step, SAMPLES)
    board.close(0)
    return board.id


def test_tensorboard_holds_every_figure_and_the_samples_of_a_run_and_of_its_resumption(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = write("tensorboard", tmp_path, {1: ROWS[1]})
    assert write("tensorboard", tmp_path, {2: ROWS[2]}, run_id=first) == first
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ROWS[1]:
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx({step: row[name] for step, row in ROWS.items()})
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/text_summary")]
    assert len(texts) == 2 and "completion: Hello." in texts[0] and "score: 0.5" in texts[1]
    (config, *_) = events.Tensors("config/text_summary")
    assert "seed: 7" in config.tensor_proto.string_val[0].decode()


def test_trackio_goes_on_with_the_run_that_it_had(tmp_path, monkeypatch):
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    first = write("trackio", tmp_path, {1: ROWS[1]})
    assert first.startswith("trackio:job") and write("trackio", tmp_path, {2: ROWS[2]}, run_id=first) == first
    logs = SQLiteStorage.get_logs("helpful", first.removeprefix("trackio:"))
    for name in ROWS[1]:
        found = {row["step"]: row[name] for row in logs if name in row}
        assert found == pytest.approx({step: row[name] for step, row in ROWS.items()})
    assert "Hello." in str(logs) and list((tmp_path / "trackio").glob("*.db"))


def test_an_id_of_another_backend_is_no_run_to_go_on_with(tmp_path):
    assert write("tensorboard", tmp_path, {}, run_id="wandb:abc").startswith("tensorboard:")


def test_the_file_into_which_pytest_captures_outlives_a_script(capfd):
    """Hydra closes every handler at its start, and TensorBoard's closes a stream that is not the stderr of now."""
    stream = get_absl_handler().python_handler.stream
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
    assert not stream.closed


def test_a_sweeps_runs_are_named_by_what_it_varies_and_wandb_groups_the_seeds_of_a_setting(monkeypatch, tmp_path):
    import wandb
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from runtime import host

    assert host.job_name("sft") == "sft" and len(host.job_name("sft" * 99)) == 128
    words = ["batch_size=8", "+launcher=joblib", "data.train=[a,b]"]
    job = OmegaConf.create({"mode": RunMode.MULTIRUN, "overrides": {"task": [*words, "optim.lr=0.001", "seed=1"]}})
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: job)
    monkeypatch.setattr("sys.argv", ["train_sft.py", "-m", *words, "optim.lr=1e-3,1e-2", "seed=0,1"])
    name = host.job_name("sft")
    assert name == "optim.lr=0.001, seed=1"
    monkeypatch.setattr("sys.argv", ["train_sft.py", "-m", "+sweep=beta", *words])  # the file has the values
    assert host.job_name("sft") == "optim.lr=0.001, seed=1"

    started = []
    monkeypatch.setattr(wandb, "init", lambda **settings: started.append(settings))
    log = {"wandb": "offline", "project": "helpful"}
    cfg = OmegaConf.create({"name": "sft", "seed": 1, "log": log})
    with pytest.raises(AttributeError):  # the stand-in has no id
        importlib.import_module("runtime.log_wandb").Log(cfg, tmp_path, job=name, run_id=None, say=pytest.fail)
    assert (started[0]["name"], started[0]["group"]) == (name, "sft")
    assert started[0]["config"] == {"name": "sft", "seed": 1, "log": log, "setting": "optim.lr=0.001"}
