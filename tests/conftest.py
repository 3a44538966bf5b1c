"""What the tests of scripts share: composed configs, scripts run in this process, a few real conversations."""

import gzip
import json
import sys
from pathlib import Path

import hydra
import pytest
import torch
from absl.logging import get_absl_handler
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus

import runtime.run
from runtime import devices

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # the suite's processes share the cores
# TensorBoard's handler closes its stream when Hydra closes all handlers, unless that is stderr: pytest's file would be.
get_absl_handler().python_handler.stream = sys.__stderr__
runtime.run.plot_metrics = lambda rows, path: None  # takes longer than a small training; test_run.py draws
# `python SCRIPT` composes its config once more to see whether it sets hydra.mode, which none of ours does.
Hydra.get_mode = lambda self, config_name, overrides: None
devices.native_bf16 = lambda device_type: False  # precision=auto is fp32 in tests, whatever the machine has


def outcome_of(job: JobReturn):
    """What the job returned or raised. Hydra's own repeats the command line on stderr, where a test that looks for a
    key of it in an error message would always find it."""
    if job.status != JobStatus.COMPLETED:
        raise job._return_value
    return job._return_value


JobReturn.return_value = property(outcome_of, JobReturn.return_value.fset)


@pytest.hookimpl(tryfirst=True)  # before -m reads the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of tests/slow.txt are slow tests: a line is one test, or all variants of one."""
    lines = (ROOT / "tests" / "slow.txt").read_text(encoding="utf-8").splitlines()
    slow = {line for line in lines if line and not line.startswith("#")}
    for item in items:
        if item.nodeid in slow or item.nodeid.partition("[")[0] in slow:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def compose(tmp_path):
    """compose(script, *overrides) -> the config that the script would get, its run directory under tmp_path."""

    def compose(script: str, *overrides: str):
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base=None):
            return hydra.compose(script, [f"++run_dir={tmp_path / 'run'}", *overrides])

    yield compose
    GlobalHydra.instance().clear()


@pytest.fixture
def run_script(monkeypatch):
    """run_script(module, *words) -> exit code of `python module.py words`, run in this process."""

    def run_script(module, *words: str) -> int:
        from runtime.run import main

        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *words])
        GlobalHydra.instance().clear()
        try:
            main(module.train, module.__name__)
        except SystemExit as exit:
            return exit.code
        return 0

    yield run_script
    GlobalHydra.instance().clear()


@pytest.fixture(scope="session")
def coffee(tmp_path_factory) -> dict[str, Path]:
    """Two small files of real conversations: "train" (40) and "eval" (8)."""
    with gzip.open(ROOT / "data/embedded/sft_coffee_train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(48), file, strict=False)]
    directory = tmp_path_factory.mktemp("coffee")
    files = {"train": rows[:40], "eval": rows[40:]}
    for name, part in files.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return {name: directory / f"{name}.jsonl" for name in files}


@pytest.fixture(scope="session")
def sft_words(coffee) -> list[str]:
    """A training of seconds: 1 layer, 6 steps of 8 conversations, everything on."""
    return [
        "model=tiny", "model.vocab_size=400", "model.num_layers=1", "model.hidden_size=32",
        "model.intermediate_size=48",
        "model.num_heads=2", "model.num_kv_heads=1", "model.head_dim=16", f"data.train=[{coffee['train']}]",
        f"data.eval=[{coffee['eval']}]", "num_steps=6", "batch_size=8", "micro_batch_size=4", "eval_every=3",
        "sample_every=3", "save_every=2", "num_samples=2", "sampling.max_new_tokens=6", "optim.lr=1e-2",
        "log.wandb=disabled",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def read_metrics():
    """read_metrics(directory) -> the rows of metrics.jsonl without what the clock decides."""

    def read(directory: Path) -> list[dict]:
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]

    return read
