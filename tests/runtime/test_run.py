import fcntl
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import runtime.run
import train_sft
from runtime import plots
from runtime.checkpoint import find_damage
from runtime.config import check_batch
from runtime.metrics import read_log
from runtime.resume import changed_keys
from runtime.run import Run


@pytest.fixture
def settings(tmp_path):
    """settings(**changes) -> the least config that Run reads."""

    def settings(**changes):
        cfg = dict(
            name="test", run_dir=str(tmp_path / "run"), seed=0, resume=False, resume_anyway=False, overwrite=False
        )
        cfg |= dict(num_steps=4, save_every=2, keep_last=2, dist={"strategy": "single"})
        return OmegaConf.create(
            cfg | dict(log={"backend": "wandb", "wandb": "disabled", "project": "helpful"}) | changes
        )

    return settings


def count_to_four(cfg) -> list[float]:
    """A loop whose numbers come from the run's generator: what it drew, step by step."""
    drawn = []
    model = nn.Linear(1, 1, bias=False)
    with Run(cfg) as run:
        nn.init.zeros_(model.weight)
        run.resume(model=model)
        while run.step < cfg.num_steps:
            drawn.append(torch.rand((), generator=run.rng).item() + torch.rand(()).item())
            with torch.no_grad():
                model.weight += drawn[-1]
            run.metrics.add({"x": drawn[-1]})
            run.end_step(num_tokens=10)
        run.finish("x")
    return drawn


def test_a_run_leaves_config_metrics_origin_and_curves(settings, monkeypatch):
    monkeypatch.setattr(runtime.run, "plot_metrics", plots.plot_metrics)
    cfg = settings()
    count_to_four(cfg)
    left = {name for name in os.listdir(cfg.run_dir)}
    assert left == {"config.yaml", "run.json", "git.diff", "metrics.jsonl", "curves.png", "checkpoints"}
    rows = read_log(Path(cfg.run_dir, "metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["perf/tokens_per_second"] > 0 and row["perf/peak_memory_gb"] > 0 for row in rows)
    assert json.loads(Path(cfg.run_dir, "run.json").read_text())["steps"] == 4


def test_the_same_seed_draws_the_same_numbers(settings):
    first = count_to_four(settings())
    assert count_to_four(settings(overwrite=True)) == first
    assert count_to_four(settings(overwrite=True, seed=1)) != first


def test_a_directory_that_holds_a_run_is_refused(settings):
    count_to_four(settings())
    with pytest.raises(ValueError, match="resume=true"):
        count_to_four(settings())


def test_overwrite_deletes_what_the_run_left_and_nothing_else(settings, tmp_path):
    count_to_four(settings())
    (tmp_path / "run" / "notes.txt").write_text("mine")
    count_to_four(settings(overwrite=True, num_steps=1, save_every=0))
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_what_a_kill_left_half_written_is_gone_after_the_next_start(settings, tmp_path, how):
    count_to_four(settings())
    for name in (".git.diff.4711.tmp", ".curves.png.tmp", ".run.json.4711.tmp"):
        (tmp_path / "run" / name).write_text("half of")
    (tmp_path / "run" / ".notes.tmp").write_text("somebody's own")
    count_to_four(settings(**{how: True}))
    assert [path.name for path in (tmp_path / "run").glob(".*tmp")] == [".notes.tmp"]


def test_a_refused_input_leaves_the_old_run_even_with_overwrite(settings, tmp_path):
    count_to_four(settings())
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="bad"), Run(settings(overwrite=True)):
        raise ValueError("bad input, found before the first step")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_two_runs_in_one_directory_are_refused(settings, tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run"):
            count_to_four(settings())
    count_to_four(settings())


def test_a_directory_that_cannot_be_made_is_refused(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        count_to_four(settings(run_dir=str(tmp_path / "file" / "run")))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_exits_with_75_and_resume_goes_on(settings, monkeypatch, number):
    whole = count_to_four(settings())
    end_step = Run.end_step

    def interrupted(run, **words):
        if run.step == 2:
            os.kill(os.getpid(), number)
        end_step(run, **words)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Run, "end_step", interrupted)
        count_to_four(settings(overwrite=True, save_every=0))
    assert stop.value.code == 75
    assert count_to_four(settings(resume=True, save_every=0)) == whole[3:]


def test_handlers_and_process_group_are_put_back(settings):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    count_to_four(settings())
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert not torch.distributed.is_initialized()


def test_resume_forgets_rows_after_the_checkpoint(settings, tmp_path):
    count_to_four(settings(num_steps=3))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000003")
    count_to_four(settings(num_steps=3, resume=True))
    assert [row["step"] for row in read_log(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_resume_with_nothing_there_starts(settings):
    assert len(count_to_four(settings(resume=True))) == 4


def test_resume_refuses_a_config_that_changes_numbers_and_names_the_keys(settings):
    count_to_four(settings(num_steps=2))
    with pytest.raises(ValueError, match=r"seed: 0 -> 1.*resume_anyway=true"):
        count_to_four(settings(num_steps=2, resume=True, seed=1))
    count_to_four(settings(num_steps=2, resume=True, resume_anyway=True, seed=1))


def test_what_changes_no_number_may_change_at_a_resume(compose):
    before = compose("train_sft", "data.train=[a]")
    now = compose("train_sft", "data.train=[a]", "save_every=7", "log.wandb=disabled", "keep_last=9", "resume=true")
    assert changed_keys(before, now) == []


def test_a_run_may_be_prolonged_under_a_constant_rate_or_a_schedule_whose_length_is_named(compose):
    words = ["data.train=[a]", "optim.schedule=constant"]
    assert changed_keys(compose("train_sft", *words), compose("train_sft", *words, "num_steps=999")) == []
    changed = changed_keys(
        compose("train_sft", "data.train=[a]"), compose("train_sft", "data.train=[a]", "num_steps=999")
    )
    assert changed[0] == "num_steps: 100 -> 999" and changed[1].startswith("optim.num_steps: 100 -> 999")
    assert "set optim.num_steps=100" in changed[1]
    longer = compose("train_sft", "data.train=[a]", "num_steps=999", "optim.num_steps=100")
    assert changed_keys(compose("train_sft", "data.train=[a]"), longer) == []


def test_due_is_every_so_often_and_at_both_ends(settings):
    run = Run(settings(num_steps=10))
    assert [step for step in range(11) if run.due(4, step)] == [0, 4, 8, 10]
    assert not any(run.due(0, step) for step in range(11))
    assert not run.due(4) and run.due(1)  # the step under way is the first


def test_minibatches_visit_every_row_once_an_epoch(settings):
    with Run(settings()) as run:
        parts = list(run.minibatches(12, epochs=2, size=4))
        assert [len(part) for part in parts] == [4] * 6
        for epoch in (parts[:3], parts[3:]):
            assert sorted(torch.cat(epoch).tolist()) == list(range(12))
        with pytest.raises(ValueError, match="minibatch_size=5"):
            next(run.minibatches(12, epochs=1, size=5))


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("ranks", [2, 4])
def test_minibatches_are_the_same_on_any_number_of_ranks(settings, samples, ranks):
    prompts, drawn = 8, {}
    with Run(settings()) as run:
        for world_size in (1, ranks):
            run.world_size, shares = world_size, []
            for run.rank in range(world_size):  # prompt p of all is prompt p // world_size of rank p % world_size
                own = torch.arange(run.rank, prompts, world_size)
                rows = (own[:, None] * samples + torch.arange(samples)).flatten()  # among all ranks' rows
                parts = run.minibatches(len(rows), epochs=2, size=4, samples_per_prompt=samples)
                shares.append([rows[part] for part in parts])
            drawn[world_size] = [sorted(torch.cat(parts).tolist()) for parts in zip(*shares, strict=True)]
            assert {len(part) for share in shares for part in share} == {4 // world_size}
        run.rank, run.world_size = 0, 1
    assert drawn[1] == drawn[ranks] and drawn[1][: len(drawn[1]) // 2] != drawn[1][len(drawn[1]) // 2 :]


@pytest.mark.parametrize("whole, micro, ranks, fits", [(10, 4, 1, "8 or 12"), (6, 4, 2, "8"), (17, 2, 4, "16 or 24")])
def test_batches_that_do_not_divide_are_refused_with_sizes_that_do(whole, micro, ranks, fits):
    with pytest.raises(ValueError, match=f"use {fits}"):
        check_batch(whole, micro, ranks)


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_rows(settings, tmp_path):
    with Run(settings()) as run:
        run.resume()
        run.stop_if_not_finite(torch.tensor(1.0), torch.ones(2), ["a:1", "a:2"])
        with pytest.raises(FloatingPointError, match=r"step 1.*a:2.*no step was taken"):
            run.stop_if_not_finite(torch.tensor(float("nan")), torch.tensor([1.0, float("inf")]), ["a:1", "a:2"])
    assert find_damage(tmp_path / "run" / "nonfinite" / "step_000000") is None
    assert json.loads((tmp_path / "run" / "bad_rows.jsonl").read_text()) == {"step": 1, "rank": 0, "row": "a:2"}


def test_a_dashboard_that_fails_never_stops_a_run(settings, monkeypatch, capsys):
    import wandb

    def fail(**words):
        raise RuntimeError("no such host")

    monkeypatch.setattr(wandb, "init", fail)
    assert len(count_to_four(settings(log={"backend": "wandb", "wandb": "offline", "project": "helpful"}))) == 4
    assert "wandb failed" in capsys.readouterr().out


BAD = {  # words -> what the message must say
    "nokey=1": "nokey",
    "optim.lrr=1": "lrr",
    "model=nope": "nope",
    "optim.lr=[1": "override",
    "batch_size=6": "use 4 or 8",
    "batch_size=0": "at least 1",
    "num_steps=0": "num_steps=0",
    "num_steps=two": "num_steps=two",
    "seed=-1": "seed=-1",
    "save_every=-1": "save_every=-1",
    "keep_last=0": "keep_last=0",
    "precision=fp8": "fp32, bf16",
    "optim.schedule=step": "linear, cosine",
    "optim.lr=-1": "optim.lr",
    "log.wandb=on": "offline",
    "log.backend=mlflow": "wandb, trackio, tensorboard",
    "dist=fsdp": "launch.py",
    "model.vocab_size=null": "tokenizer=PATH",
    "policy=some/model": "exactly one",
    "data.train=[/nowhere.jsonl]": "/nowhere.jsonl",
    "data.train=[]": "data.train",
    "data.on_bad_row=ignore": "on_bad_row",
    "data.max_length=2": "max_length",
    "residual_dropout=[0.1]": "residual_dropout",
    "residual_dropout=[0.1,1.5]": "dropout",
    "neftune_alpha=-1": "neftune_alpha",
    "num_samples=-1": "num_samples",
    "sampling.temperature=-1": "temperature",
    "hydra.run.dir=/proc/none": "/proc/none",
}


@pytest.mark.parametrize("word", BAD)
def test_bad_input_gets_one_message_and_exit_code_2(word, run_script, sft_words, tmp_path, capsys):
    directory = tmp_path / "run"
    assert run_script(train_sft, *sft_words, f"hydra.run.dir={directory}", word) == 2
    told = capsys.readouterr().err
    assert told.count("error:") == 1 and BAD[word] in told and "Traceback" not in told
    assert not directory.exists()


def test_a_missing_value_is_named(run_script, sft_words, tmp_path, capsys):
    words = [word for word in sft_words if not word.startswith("data.train")]
    assert run_script(train_sft, *words, f"hydra.run.dir={tmp_path / 'run'}") == 2
    assert "data.train" in capsys.readouterr().err
